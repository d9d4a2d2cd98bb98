//! The kernels' inner loops, written once for vectors of any length.
//!
//! Everything here is inlined into functions that enable an instruction set; see `kernels`.

use super::kernels::{Ahead, Row};
use crate::packed::{PANEL, WORDS};

/// A vector of f32. Each lane is another output, never part of a sum.
///
/// SAFETY: every function needs the instruction set that it is written in, and pointers to [`Lanes::COUNT`] elements.
pub(crate) trait Lanes: Copy {
    /// Lanes of a vector.
    const COUNT: usize;

    /// Reads a vector.
    unsafe fn load(from: *const f32) -> Self;
    /// Writes a vector.
    unsafe fn store(self, to: *mut f32);
    /// One element in every lane.
    unsafe fn splat(from: *const f32) -> Self;
    /// `self + x * w`, rounded once.
    unsafe fn add_product(self, x: Self, w: Self) -> Self;
    /// The f32 whose bf16 is in the lower half of each word, and those of the upper halves.
    unsafe fn halves(from: *const u32) -> (Self, Self);
    /// Asks for the cache line at `at`, which need not be valid, to be brought near.
    unsafe fn fetch(at: *const u8);
}

/// Cache lines of all panels together that are asked for ahead of their use. Panels that are read side by side are parts of long
/// streams, which a processor notices and reads ahead in by itself; more than this only gets in its way.
const AHEAD: usize = 32;

/// Runs `$step` for each input, four at a time: whatever counts and compares takes turns with the multiplications.
macro_rules! each_input {
    ($inputs:ident, $k:ident, $step:block) => {
        let whole = $inputs / 4 * 4;
        for first in (0..whole).step_by(4) {
            each_input!(once $k, first, $step);
            each_input!(once $k, first + 1, $step);
            each_input!(once $k, first + 2, $step);
            each_input!(once $k, first + 3, $step);
        }
        for $k in whole..$inputs $step
    };
    (once $k:ident, $value:expr, $step:block) => {
        let $k = $value;
        $step
    };
}

/// Adds to the sums of `P` panels, `[R]` each, the products of `R` rows `x`, `[inputs, R]`, with the panels, `[inputs, WORDS]`
/// each, in one pass. `apart` is how far a panel lies from the one before it, in panels, with its words and its sums. `J` is how
/// many vectors `WORDS` fill.
///
/// SAFETY: needs `V`'s instruction set and pointers to as much as the shapes say.
#[expect(clippy::inline_always, reason = "compiled once per instruction set, inside the caller that enables it")]
#[inline(always)]
pub(super) unsafe fn straight<V: Lanes, const R: usize, const P: usize, const J: usize>(
    x: *const f32,
    inputs: usize,
    words: *const u32,
    sums: *mut Row,
    apart: usize,
) {
    const { assert!(J * V::COUNT == WORDS) };
    // SAFETY: `p < P`, `r < R`, `k < inputs` and `j * COUNT + COUNT <= WORDS`: all within the shapes.
    unsafe {
        let sum = |p: usize, r: usize, j: usize| sums.add(p * apart * R + r).cast::<f32>().add(j * V::COUNT);
        let mut acc = [[[load_pair::<V>(sum(0, 0, 0)); J]; R]; P];
        for p in 0..P {
            for r in 0..R {
                for j in 0..J {
                    acc[p][r][j] = load_pair(sum(p, r, j));
                }
            }
        }
        each_input!(inputs, k, {
            let mut xs = [V::splat(x.add(k * R)); R];
            for r in 1..R {
                xs[r] = V::splat(x.add(k * R + r));
            }
            for p in 0..P {
                let line = words.add((p * apart * inputs + k) * WORDS);
                V::fetch(line.wrapping_add(AHEAD / P * WORDS).cast());
                for j in 0..J {
                    let (low, high) = V::halves(line.add(j * V::COUNT));
                    for r in 0..R {
                        let acc = &mut acc[p][r][j];
                        *acc = (acc.0.add_product(xs[r], low), acc.1.add_product(xs[r], high));
                    }
                }
            }
        });
        for p in 0..P {
            for r in 0..R {
                for j in 0..J {
                    store_pair(acc[p][r][j], sum(p, r, j));
                }
            }
        }
    }
}

/// Adds to `sums`, `[R]`, the products of `R` rows `x`, `[inputs, R]`, with words, `[inputs, WORDS]`, and keeps the words widened
/// to f32 in `weights`, `[inputs, PANEL]`. Meanwhile fetches from `ahead`.
///
/// SAFETY: needs `V`'s instruction set and pointers to as much as the shapes say; those to fetch from need not be valid.
#[expect(clippy::inline_always, reason = "compiled once per instruction set, inside the caller that enables it")]
#[inline(always)]
pub(super) unsafe fn widen<V: Lanes, const R: usize>(
    x: *const f32,
    inputs: usize,
    words: *const u32,
    weights: *mut Row,
    sums: *mut Row,
    ahead: Ahead,
) {
    for part in (0..WORDS).step_by(V::COUNT) {
        // SAFETY: `r < R`, `k < inputs` and `part + COUNT <= WORDS`: all within the shapes.
        unsafe {
            let sum = |r: usize| sums.add(r).cast::<f32>().add(part);
            let mut acc = [load_pair::<V>(sum(0)); R];
            for r in 1..R {
                acc[r] = load_pair(sum(r));
            }
            each_input!(inputs, k, {
                let pair = V::halves(words.add(k * WORDS + part));
                store_pair(pair, weights.add(k).cast::<f32>().add(part));
                V::fetch(ahead.at(k));
                for r in 0..R {
                    let x = V::splat(x.add(k * R + r));
                    acc[r] = (acc[r].0.add_product(x, pair.0), acc[r].1.add_product(x, pair.1));
                }
            });
            for r in 0..R {
                store_pair(acc[r], sum(r));
            }
        }
    }
}

/// Adds to `sums`, `[R]`, the products of `R` rows `x`, `[inputs, R]`, with weights, `[inputs, PANEL]`, `C` vectors of outputs at
/// a time. Meanwhile fetches from `ahead`.
///
/// SAFETY: needs `V`'s instruction set and pointers to as much as the shapes say; those to fetch from need not be valid.
#[expect(clippy::inline_always, reason = "compiled once per instruction set, inside the caller that enables it")]
#[inline(always)]
pub(super) unsafe fn block<V: Lanes, const R: usize, const C: usize>(
    x: *const f32,
    inputs: usize,
    weights: *const Row,
    sums: *mut Row,
    ahead: Ahead,
) {
    for part in (0..PANEL).step_by(C * V::COUNT) {
        // SAFETY: `r < R`, `k < inputs` and `part + c * COUNT + COUNT <= PANEL`: all within the shapes.
        unsafe {
            let sum = |r: usize, c: usize| sums.add(r).cast::<f32>().add(part + c * V::COUNT);
            let mut acc = [[V::load(sum(0, 0)); C]; R];
            for r in 0..R {
                for c in 0..C {
                    acc[r][c] = V::load(sum(r, c));
                }
            }
            each_input!(inputs, k, {
                let line = weights.add(k).cast::<f32>().add(part);
                let mut w = [V::load(line); C];
                for c in 1..C {
                    w[c] = V::load(line.add(c * V::COUNT));
                }
                V::fetch(ahead.at(k));
                for r in 0..R {
                    let x = V::splat(x.add(k * R + r));
                    for c in 0..C {
                        acc[r][c] = acc[r][c].add_product(x, w[c]);
                    }
                }
            });
            for r in 0..R {
                for c in 0..C {
                    V::store(acc[r][c], sum(r, c));
                }
            }
        }
    }
}

/// Reads the sums of the outputs that a vector of words holds.
///
/// SAFETY: as for [`Lanes`], with `WORDS` more elements.
#[expect(clippy::inline_always, reason = "compiled once per instruction set, inside the caller that enables it")]
#[inline(always)]
unsafe fn load_pair<V: Lanes>(from: *const f32) -> (V, V) {
    // SAFETY: this function's own contract.
    unsafe { (V::load(from), V::load(from.add(WORDS))) }
}

/// Writes what [`load_pair`] reads.
///
/// SAFETY: as there.
#[expect(clippy::inline_always, reason = "compiled once per instruction set, inside the caller that enables it")]
#[inline(always)]
unsafe fn store_pair<V: Lanes>(pair: (V, V), to: *mut f32) {
    // SAFETY: this function's own contract.
    unsafe {
        pair.0.store(to);
        pair.1.store(to.add(WORDS));
    }
}
