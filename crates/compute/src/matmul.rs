//! Matrix multiplication: every output one ascending chain of fused multiply-adds, whatever the rows and threads.
//!
//! A few rows are multiplied straight from bf16: one pass over several streams of panels, at the speed of memory. More rows form
//! tiles of as many as a kernel holds sums for. A block of a panel is then widened to f32 by the first tile and used from the
//! nearest cache by the others, while the next block is fetched; the sums wait in memory between blocks and go on where they
//! were.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod kernels;
pub(crate) mod lanes;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;
mod tiles;

use std::cell::RefCell;

use kernels::{Ahead, Kernels, kernels};

pub(crate) use kernels::Row;
pub(crate) use tiles::{Tiles, Tiling};

use crate::cut::Cut;
use crate::disjoint::Disjoint;
use crate::packed::{PANEL, Panels, WORDS};
use crate::{PackedMatrix, Pool};

/// Rows that are multiplied at once: their part of a block stays in the second cache.
pub(crate) const ROWS: usize = 256;

/// Inputs of a block: its f32 weights stay in the nearest cache. A multiple of a panel's outputs, which are the next matrix's
/// inputs.
pub(crate) const BLOCK: usize = 192;

/// Bytes of a panel's words for one input: a cache line.
const LINE: usize = WORDS * size_of::<u32>();

/// Panels of a task: they share what a block of inputs costs to fetch, and are fetched as so many streams.
const GROUP: usize = Ahead::STREAMS;

/// Multiplies `x`, `[rows, inputs]`, with `w` and writes `[rows, outputs]` to `out`.
///
/// `out[r, o]` is the chain `fma(x[r, k], w[o, k], sum)` over ascending `k`, from zero. Panics when the lengths do not fit.
pub fn matmul(x: &[f32], w: &PackedMatrix, out: &mut [f32], pool: &Pool) {
    let (inputs, outputs) = (w.inputs(), w.outputs());
    let rows = x.len() / inputs;
    assert!(x.len() == rows * inputs && out.len() == rows * outputs, "shapes fit");
    for (x, out) in x.chunks(ROWS * inputs).zip(out.chunks_mut(ROWS * outputs)) {
        multiply_into(&Tiles::pack(x, inputs, pool), w.panels(), out, pool);
    }
}

/// Multiplies `x` with `panels` and writes `[x.rows, outputs]` to `out`.
pub(crate) fn multiply_into(x: &Tiles, panels: &Panels, out: &mut [f32], pool: &Pool) {
    let outputs = out.len() / x.rows();
    let out = Disjoint::new(out);
    multiply(x, panels, 1, pool, |first_row, panel, sums| {
        let start = panel * PANEL;
        let columns = PANEL.min(outputs - start);
        for (row, sums) in sums.iter().enumerate() {
            // SAFETY: the sums of a row and panel come once.
            unsafe { out.slice((first_row + row) * outputs + start, columns) }.copy_from_slice(&sums.0[..columns]);
        }
    });
}

/// Multiplies `x` with `panels` and passes the sums on, `unit` panels at a time: `done(first row, first panel, sums)` with the
/// sums of a tile of rows, `[unit, rows of the tile]`.
pub(crate) fn multiply(
    x: &Tiles,
    panels: &Panels,
    unit: usize,
    pool: &Pool,
    done: impl Fn(usize, usize, &[Row]) + Sync,
) {
    thread_local! {
        /// The sums of a task, `[tiles, panels, rows of a tile]`, and the widened weights of a block.
        static SCRATCH: RefCell<Vec<Row>> = const { RefCell::new(Vec::new()) };
    }
    let kernels = kernels(pool.isa());
    let straight = kernels.is_straight(x.rows());
    let cut = if straight {
        Cut::streams(panels.count(), kernels.streams(x.rows()).next_multiple_of(unit), pool)
    } else {
        Cut::new(panels.count(), unit, GROUP, pool)
    };
    let work = x.rows() * panels.inputs() * panels.count() * PANEL;
    pool.for_each(cut.tasks(), work, |task| {
        let (first, count) = cut.task(task);
        let words = panels.range(first, count);
        SCRATCH.with_borrow_mut(|scratch| {
            scratch.clear();
            scratch.resize(x.rows() * count + BLOCK, Row::ZERO);
            let (sums, weights) = scratch.split_at_mut(x.rows() * count);
            if straight {
                kernels.straight(x.all(), words, x.rows(), sums);
            } else {
                let next = pool.threads() * words.len();
                by_blocks(kernels, x, Task { words, sums, weights, next });
            }
            let tiles = sums.chunks_mut(x.tile_rows() * count).enumerate();
            for (tile, sums) in tiles {
                let rows = sums.len() / count;
                for (index, sums) in sums.chunks_exact(unit * rows).enumerate() {
                    done(tile * x.tile_rows(), first + index * unit, sums);
                }
            }
        });
    });
}

/// The work of a task.
struct Task<'a> {
    /// `[panels, inputs, WORDS]`
    words: &'a [u32],
    /// `[tiles, panels, rows of the tile]`
    sums: &'a mut [Row],
    /// Room for the widened weights of a block, `[BLOCK]`.
    weights: &'a mut [Row],
    /// Words from the start of this task's to those of the one that likely follows on the same thread.
    next: usize,
}

/// Adds to `sums` the products of `x` with the panels of `words`.
fn by_blocks(kernels: &Kernels, x: &Tiles, task: Task) {
    let Task { words, sums, weights, next: next_task } = task;
    let panel_len = x.inputs() * WORDS;
    let count = words.len() / panel_len;
    for start in (0..x.inputs()).step_by(BLOCK) {
        let depth = BLOCK.min(x.inputs() - start);
        let weights = &mut weights[..depth];
        let next = if start + depth < x.inputs() {
            words[(start + depth) * WORDS..].as_ptr()
        } else {
            words.as_ptr().wrapping_add(next_task)
        };
        let part = depth.div_ceil(Ahead::STREAMS) * LINE;
        for panel in 0..count {
            // A part of the next block of every panel; where there are not as many, all of the next one in parts.
            let (next, stride) = if count == Ahead::STREAMS {
                (next.cast::<u8>().wrapping_add(panel * part), panel_len * size_of::<u32>())
            } else {
                (next.wrapping_add(panel * panel_len).cast(), part)
            };
            let words = &words[panel * panel_len + start * WORDS..][..depth * WORDS];
            for (tile, sums) in sums.chunks_mut(x.tile_rows() * count).enumerate() {
                let rows = sums.len() / count;
                let sums = &mut sums[panel * rows..][..rows];
                let ahead = Ahead { start: next.wrapping_add(tile * part / x.count()), stride, step: LINE / x.count() };
                let x = x.part(start, tile);
                if tile == 0 {
                    kernels.widen(x, words, weights, sums, ahead);
                } else {
                    kernels.block(x, weights, sums, ahead);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;
    use proptest::prelude::*;

    use super::*;
    use crate::Isa;

    /// Numbers of mixed size and sign, one in `rare` of them special; the same for the same seed.
    pub(crate) fn noise(seed: u64, rare: u64, len: usize) -> Vec<f32> {
        const SPECIAL: [f32; 7] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0, 1e-40, -1e-45, f32::MAX];
        let mut state = seed | 1;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            state >> 33
        };
        let mut value = || {
            let (fraction, size, special) = (next() as f32 / (1 << 30) as f32 - 1.0, next() % 7, next());
            let ordinary = fraction * 8.0_f32.powi(size as i32 - 3);
            if special % rare == 0 { SPECIAL[(special / rare % 7) as usize] } else { ordinary }
        };
        (0..len).map(|_| value()).collect()
    }

    /// The bits of values; one NaN is as good as another.
    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|v| if v.is_nan() { f32::NAN } else { *v }.to_bits()).collect()
    }

    /// The oracle: the rule, as it is written.
    fn oracle(x: &[f32], weights: &[bf16], inputs: usize) -> Vec<f32> {
        let rows = x.chunks(inputs);
        let chain = |x: &[f32], w: &[bf16]| x.iter().zip(w).fold(0.0_f32, |sum, (x, w)| x.mul_add(w.to_f32(), sum));
        rows.flat_map(|x| weights.chunks(inputs).map(|w| chain(x, w))).collect()
    }

    /// Compares every instruction set and several numbers of threads with the oracle.
    fn check(rows: usize, outputs: usize, inputs: usize, seed: u64, rare: u64) {
        let x = noise(seed, rare, rows * inputs);
        let weights: Vec<bf16> = noise(!seed, rare, outputs * inputs).into_iter().map(bf16::from_f32).collect();
        let bytes: Vec<u8> = weights.iter().flat_map(|w| w.to_le_bytes()).collect();
        let packed = PackedMatrix::from_bf16(&bytes, outputs, inputs).unwrap();
        let expected = bits(&oracle(&x, &weights, inputs));
        for isa in Isa::available() {
            for threads in [1, 2, 5] {
                let mut out = vec![f32::NAN; rows * outputs];
                matmul(&x, &packed, &mut out, &Pool::with_isa(threads, isa).unwrap());
                assert!(bits(&out) == expected, "{isa:?}, {threads} threads, {rows} rows, {outputs} by {inputs}");
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn every_instruction_set_and_thread_count_gives_the_oracles_bits(
            seed in any::<u64>(), rows in 1usize..=600, outputs in 1usize..100, inputs in 1usize..150,
        ) {
            check(rows, outputs, inputs, seed, u64::MAX);
        }

        #[test]
        fn few_rows_of_many_inputs_give_the_oracles_bits(
            seed in any::<u64>(), rows in 1usize..=32, outputs in 1usize..300, inputs in 1usize..600,
        ) {
            check(rows, outputs, inputs, seed, u64::MAX);
        }

        #[test]
        fn nan_infinity_denormals_and_negative_zero_go_where_the_oracle_lets_them(
            seed in any::<u64>(), rows in 1usize..=40, outputs in 1usize..80, inputs in 1usize..200, rare in 3u64..5000,
        ) {
            check(rows, outputs, inputs, seed, rare);
        }
    }

    #[test]
    fn no_rows_give_no_result() {
        let packed = PackedMatrix::from_bf16(&[0; 6], 3, 1).unwrap();
        matmul(&[], &packed, &mut [], &Pool::new(2).unwrap());
    }
}
