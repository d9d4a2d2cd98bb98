//! Matrix multiplication: every output one ascending chain of fused multiply-adds, whatever the rows and threads.

use crate::packed::{PANEL, WORDS, weight};
use crate::{PackedMatrix, Pool};

/// Rows a vector kernel takes at once: as many as its registers hold sums for.
const ROWS: usize = 6;

/// Multiplies `x`, `[rows, inputs]`, with `w` and writes `[rows, outputs]` to `out`.
///
/// `out[r, o]` is the chain `fma(x[r, k], w[o, k], sum)` over ascending `k`, from zero. Panics when the lengths do not fit.
pub fn matmul(x: &[f32], w: &PackedMatrix, out: &mut [f32], pool: &Pool) {
    let (inputs, outputs) = (w.inputs(), w.outputs());
    let rows = x.len() / inputs;
    assert!(x.len() == rows * inputs && out.len() == rows * outputs, "shapes fit");
    let kernel = kernel();
    let out = Columns { data: out.as_mut_ptr(), rows, width: outputs };
    pool.for_each(w.panels(), rows * inputs * outputs, |index| {
        let panel = w.panel(index);
        let mut sums = [[0.0; PANEL]; ROWS];
        for (block, x) in x.chunks(ROWS * inputs).enumerate() {
            let rows = x.len() / inputs;
            kernel(x, panel, &mut sums[..rows]);
            for (row, sums) in sums[..rows].iter().enumerate() {
                let start = index * PANEL;
                let columns = PANEL.min(outputs - start);
                // SAFETY: each panel is one task and writes only its own columns.
                unsafe { out.write(block * ROWS + row, start, &sums[..columns]) };
            }
        }
    });
}

/// An output matrix whose columns are written by different threads.
struct Columns {
    data: *mut f32,
    rows: usize,
    width: usize,
}

// SAFETY: the only access is `write`, whose callers promise disjoint ranges.
unsafe impl Sync for Columns {}

impl Columns {
    /// Writes `values` into `row` from `column` on.
    ///
    /// SAFETY: no other thread may write the same elements, and the matrix must outlive the call.
    unsafe fn write(&self, row: usize, column: usize, values: &[f32]) {
        assert!(row < self.rows && column + values.len() <= self.width);
        // SAFETY: within the matrix, as just checked; disjoint from other writes by this function's contract.
        unsafe {
            let target = self.data.add(row * self.width + column);
            std::ptr::copy_nonoverlapping(values.as_ptr(), target, values.len());
        }
    }
}

/// Multiplies up to [`ROWS`] rows with one panel: `x` `[rows, inputs]`, panel `[inputs, WORDS]`, sums `[rows, PANEL]`.
type Kernel = fn(&[f32], &[u32], &mut [[f32; PANEL]]);

/// The fastest kernel this machine has.
fn kernel() -> Kernel {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        return avx2::kernel;
    }
    scalar
}

/// The oracle: what every other kernel must equal, bit for bit.
fn scalar(x: &[f32], panel: &[u32], sums: &mut [[f32; PANEL]]) {
    let inputs = panel.len() / WORDS;
    for (x, sums) in x.chunks_exact(inputs).zip(sums) {
        *sums = [0.0; PANEL];
        for (&x, words) in x.iter().zip(panel.chunks_exact(WORDS)) {
            for (lane, sum) in sums.iter_mut().enumerate() {
                *sum = x.mul_add(weight(words, lane), *sum);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::{
        __m256i, _mm256_and_si256, _mm256_broadcast_ss, _mm256_castsi256_ps, _mm256_fmadd_ps, _mm256_loadu_si256,
        _mm256_set1_epi32, _mm256_setzero_ps, _mm256_slli_epi32, _mm256_storeu_ps,
    };

    use super::{PANEL, ROWS, WORDS};

    /// Multiplies up to [`ROWS`] rows with one panel.
    pub(super) fn kernel(x: &[f32], panel: &[u32], sums: &mut [[f32; PANEL]]) {
        let inputs = panel.len() / WORDS;
        assert!(sums.len() <= ROWS && x.len() == sums.len() * inputs);
        // SAFETY: `super::kernel` hands this out only where AVX2 and FMA are present; the lengths were just checked.
        unsafe {
            match sums.len() {
                1 => rows::<1>(x, panel, sums),
                2 => rows::<2>(x, panel, sums),
                3 => rows::<3>(x, panel, sums),
                4 => rows::<4>(x, panel, sums),
                5 => rows::<5>(x, panel, sums),
                6 => rows::<6>(x, panel, sums),
                _ => {}
            }
        }
    }

    /// SAFETY: needs AVX2 and FMA, `x` of `R` rows of `panel.len() / WORDS`, and `R` sums.
    #[expect(clippy::cast_ptr_alignment, reason = "the load is one for unaligned addresses")]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn rows<const R: usize>(x: &[f32], panel: &[u32], sums: &mut [[f32; PANEL]]) {
        let inputs = panel.len() / WORDS;
        let upper = _mm256_set1_epi32(0xffff_0000_u32.cast_signed());
        let mut acc = [[_mm256_setzero_ps(); 2]; R];
        for k in 0..inputs {
            // SAFETY: `k < inputs`, and the panel has WORDS words for each input.
            let words = unsafe { _mm256_loadu_si256(panel.as_ptr().add(k * WORDS).cast::<__m256i>()) };
            let low = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(words));
            let high = _mm256_castsi256_ps(_mm256_and_si256(words, upper));
            for (r, acc) in acc.iter_mut().enumerate() {
                // SAFETY: `r < R` and `k < inputs`, and `x` has `R` rows of `inputs`.
                let x = _mm256_broadcast_ss(unsafe { x.get_unchecked(r * inputs + k) });
                acc[0] = _mm256_fmadd_ps(x, low, acc[0]);
                acc[1] = _mm256_fmadd_ps(x, high, acc[1]);
            }
        }
        for (sums, acc) in sums.iter_mut().zip(acc) {
            // SAFETY: a row of sums has room for two vectors.
            unsafe {
                _mm256_storeu_ps(sums.as_mut_ptr(), acc[0]);
                _mm256_storeu_ps(sums.as_mut_ptr().add(WORDS), acc[1]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;
    use proptest::prelude::*;

    use super::*;

    /// Numbers of mixed size and sign, the same for the same seed.
    fn noise(seed: u64, len: usize) -> Vec<f32> {
        let mut state = seed | 1;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..len).map(|_| next() * 8.0_f32.powi((next() * 3.0) as i32)).collect()
    }

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|v| v.to_bits()).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn every_kernel_and_thread_count_gives_the_oracles_bits(
            seed in any::<u64>(), rows in 1usize..=40, outputs in 1usize..70, inputs in 1usize..130,
        ) {
            let x = noise(seed, rows * inputs);
            let weights: Vec<bf16> = noise(!seed, outputs * inputs).into_iter().map(bf16::from_f32).collect();
            let bytes: Vec<u8> = weights.iter().flat_map(|w| w.to_le_bytes()).collect();
            let packed = PackedMatrix::from_bf16(&bytes, outputs, inputs).unwrap();
            let mut expected = vec![0.0; rows * outputs];
            for (i, out) in expected.iter_mut().enumerate() {
                let (row, output) = (i / outputs, i % outputs);
                *out = (0..inputs).fold(0.0, |sum, k| {
                    x[row * inputs + k].mul_add(weights[output * inputs + k].to_f32(), sum)
                });
            }
            for threads in [1, 3] {
                let mut out = vec![f32::NAN; rows * outputs];
                matmul(&x, &packed, &mut out, &Pool::new(threads).unwrap());
                prop_assert_eq!(bits(&out), bits(&expected));
            }
            let mut sums = [[0.0; PANEL]; ROWS];
            let block = &x[..rows.min(ROWS) * inputs];
            scalar(block, packed.panel(0), &mut sums[..rows.min(ROWS)]);
            let width = outputs.min(PANEL);
            for (row, sums) in sums[..rows.min(ROWS)].iter().enumerate() {
                prop_assert_eq!(bits(&sums[..width]), bits(&expected[row * outputs..][..width]));
            }
        }
    }

    #[test]
    fn work_worth_splitting_gives_the_same_bits_on_any_number_of_threads() {
        let (rows, outputs, inputs) = (13, 200, 300);
        let x = noise(7, rows * inputs);
        let bytes: Vec<u8> = noise(9, outputs * inputs).iter().flat_map(|w| bf16::from_f32(*w).to_le_bytes()).collect();
        let packed = PackedMatrix::from_bf16(&bytes, outputs, inputs).unwrap();
        let run = |threads| {
            let mut out = vec![0.0; rows * outputs];
            matmul(&x, &packed, &mut out, &Pool::new(threads).unwrap());
            bits(&out)
        };
        assert_eq!(run(1), run(2));
        assert_eq!(run(1), run(5));
    }
}
