//! The kernels' inner loops, written once for vectors of any length.
//!
//! Everything here is inlined into functions that enable an instruction set; see `kernels`.

use super::BLOCK;
use super::kernels::{Ahead, Row};
use crate::packed::{PANEL, WORDS};

/// A vector of f32. Each lane is another output, never part of a sum.
///
/// SAFETY: every function needs the instruction set that it is written in, and pointers to [`Lanes::COUNT`] elements.
pub(super) trait Lanes: Copy {
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

/// Cache lines that are asked for ahead of their use, so that memory is busy however long it takes to answer.
const AHEAD: usize = 64;

/// Adds to `sums`, `[P, R]`, the products of `R` rows `x`, `[inputs, R]`, with `P` panels, `[P, inputs, WORDS]`, in one pass,
/// `J` vectors of words at a time.
///
/// SAFETY: needs `V`'s instruction set and pointers to as much as the shapes say.
#[expect(clippy::inline_always, reason = "compiled once per instruction set, inside the caller that enables it")]
#[inline(always)]
pub(super) unsafe fn straight<V: Lanes, const R: usize, const P: usize, const J: usize>(
    x: *const f32,
    inputs: usize,
    words: *const u32,
    sums: *mut Row,
) {
    // Several passes over the same words read them from memory once if they stay in the nearest cache in between.
    let block = if J * V::COUNT == WORDS { inputs } else { BLOCK };
    for start in (0..inputs).step_by(block) {
        let end = inputs.min(start + block);
        for part in (0..WORDS).step_by(J * V::COUNT) {
            // SAFETY: `p < P`, `r < R`, `k < inputs` and `part + j * COUNT + COUNT <= WORDS`: all within the shapes.
            unsafe {
                let sum = |p: usize, r: usize, j: usize| sums.add(p * R + r).cast::<f32>().add(part + j * V::COUNT);
                let mut acc = std::array::from_fn::<_, P, _>(|p| {
                    std::array::from_fn::<_, R, _>(|r| std::array::from_fn::<_, J, _>(|j| load_pair::<V>(sum(p, r, j))))
                });
                for k in start..end {
                    for p in 0..P {
                        let line = words.add((p * inputs + k) * WORDS + part);
                        V::fetch(line.wrapping_add(AHEAD / P * WORDS).cast());
                        for j in 0..J {
                            let (low, high) = V::halves(line.add(j * V::COUNT));
                            for r in 0..R {
                                let x = V::splat(x.add(k * R + r));
                                let acc = &mut acc[p][r][j];
                                *acc = (acc.0.add_product(x, low), acc.1.add_product(x, high));
                            }
                        }
                    }
                }
                for p in 0..P {
                    for r in 0..R {
                        for j in 0..J {
                            store_pair(acc[p][r][j], sum(p, r, j));
                        }
                    }
                }
            }
        }
    }
}

/// Adds to `sums`, `[R]`, the products of `R` rows `x`, `[inputs, R]`, with words, `[inputs, WORDS]`, and keeps the words widened
/// to f32 in `weights`, `[inputs, PANEL]`. See [`block`] for `ahead`.
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
            let mut acc = std::array::from_fn::<_, R, _>(|r| load_pair::<V>(sum(r)));
            for k in 0..inputs {
                let pair = V::halves(words.add(k * WORDS + part));
                store_pair(pair, weights.add(k).cast::<f32>().add(part));
                V::fetch(ahead.at.wrapping_add(k * ahead.step));
                for r in 0..R {
                    let x = V::splat(x.add(k * R + r));
                    acc[r] = (acc[r].0.add_product(x, pair.0), acc[r].1.add_product(x, pair.1));
                }
            }
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
            let mut acc = std::array::from_fn::<_, R, _>(|r| std::array::from_fn::<_, C, _>(|c| V::load(sum(r, c))));
            for k in 0..inputs {
                let line = weights.add(k).cast::<f32>().add(part);
                let w = std::array::from_fn::<_, C, _>(|c| V::load(line.add(c * V::COUNT)));
                V::fetch(ahead.at.wrapping_add(k * ahead.step));
                for r in 0..R {
                    let x = V::splat(x.add(k * R + r));
                    for c in 0..C {
                        acc[r][c] = acc[r][c].add_product(x, w[c]);
                    }
                }
            }
            for r in 0..R {
                for c in 0..C {
                    acc[r][c].store(sum(r, c));
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
