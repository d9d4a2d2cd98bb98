//! The kernels for x86-64. Each takes a few rows at a time, as many as its registers hold sums for.
//!
//! With VNNI one instruction multiplies four unsigned bytes of weights with four signed ones of activations and adds all to a
//! 32-bit lane. Without it, weights are cut into halves of 4 bits: a whole group of products of halves and activations stays
//! within ±30480, so it is summed in 16-bit lanes without saturating, an 8-bit weight as sixteen times its upper half plus its
//! lower one.

use std::arch::x86_64::{
    __m256i, __m512i, _mm256_add_epi16, _mm256_add_epi32, _mm256_and_si256, _mm256_castsi256_ps, _mm256_cvtepi32_ps,
    _mm256_dpbusd_avx_epi32, _mm256_fmadd_ps, _mm256_load_si256, _mm256_loadu_ps, _mm256_madd_epi16,
    _mm256_maddubs_epi16, _mm256_mul_ps, _mm256_set1_epi8, _mm256_set1_epi16, _mm256_set1_epi32, _mm256_set1_ps,
    _mm256_setzero_si256, _mm256_slli_epi32, _mm256_srli_epi16, _mm256_storeu_ps, _mm512_and_si512,
    _mm512_castsi512_ps, _mm512_cvtepi32_ps, _mm512_dpbusd_epi32, _mm512_fmadd_ps, _mm512_load_si512, _mm512_loadu_ps,
    _mm512_mul_ps, _mm512_set1_epi8, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps, _mm512_slli_epi32,
    _mm512_srli_epi16, _mm512_storeu_ps,
};

use super::GROUP;
use super::kernel::{Block, Kernel};
use super::matrix::{LANES, PANEL, QuantWidth};

/// The kernels that this machine can run, the fastest first.
pub(super) fn kernels() -> impl Iterator<Item = Kernel> {
    let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
    let avx_vnni = avx2 && is_x86_feature_detected!("avxvnni");
    let avx512_vnni = is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512vnni");
    let all: [(bool, Kernel); 3] = [(avx512_vnni, by_avx512_vnni), (avx_vnni, by_avx_vnni), (avx2, by_avx2)];
    all.into_iter().filter_map(|(found, kernel)| found.then_some(kernel))
}

/// Defines a kernel that hands `$function` up to `$most` rows at a time.
macro_rules! kernel {
    ($name:ident, $function:ident, $most:tt: $($rows:literal)*) => {
        fn $name(block: Block, sums: &mut [[f32; PANEL]]) {
            let Block { x, row, width, start, quants, scales } = block;
            assert!(row + sums.len() <= x.rows && start + scales.len() <= x.groups);
            assert!(quants.len() == scales.len() * width.lines());
            for (index, sums) in sums.chunks_mut($most).enumerate() {
                // SAFETY: `kernels` hands this out only where its instructions are present; the lengths were just checked.
                unsafe {
                    match (width, sums.len()) {
                        $((QuantWidth::Int8, $rows) => $function::<$rows, false>(&block, row + index * $most, sums),)*
                        $((QuantWidth::Int4, $rows) => $function::<$rows, true>(&block, row + index * $most, sums),)*
                        _ => unreachable!("chunks have 1 to {} rows", $most),
                    }
                }
            }
        }
    };
}

kernel!(by_avx512_vnni, zmm, 8: 1 2 3 4 5 6 7 8);
kernel!(by_avx_vnni, ymm_vnni, 4: 1 2 3 4);
kernel!(by_avx2, ymm, 4: 1 2 3 4);

/// Four bytes of activations.
///
/// SAFETY: `quants` must have four bytes at `quad`.
unsafe fn quad(quants: *const i8, quad: usize) -> i32 {
    // SAFETY: by this function's contract.
    unsafe { quants.cast::<i32>().add(quad).read_unaligned() }
}

/// SAFETY: needs AVX-512 F, BW and VNNI, `R` sums, and `R` rows from `row` on that have the block's groups.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn zmm<const R: usize, const INT4: bool>(block: &Block, row: usize, sums: &mut [[f32; PANEL]]) {
    let lines = if INT4 { 8 } else { 16 };
    let (half, upper) = (_mm512_set1_epi8(0xf), _mm512_set1_epi32(0xffff_0000_u32.cast_signed()));
    let mut acc = [[_mm512_setzero_ps(); 2]; R];
    for (acc, sums) in acc.iter_mut().zip(sums.iter()) {
        // SAFETY: a row of sums has room for two vectors.
        *acc = unsafe { [_mm512_loadu_ps(sums.as_ptr()), _mm512_loadu_ps(sums.as_ptr().add(LANES))] };
    }
    for (group, scales) in block.scales.iter().enumerate() {
        let at: [usize; R] = std::array::from_fn(|r| (row + r) * block.x.groups + block.start + group);
        // SAFETY: the rows have the block's groups, and quants, scales and starts one of each.
        let x = at.map(|at| unsafe { block.x.quants.as_ptr().add(at * GROUP) });
        let mut dots = at.map(|at| [_mm512_set1_epi32(unsafe { *block.x.starts.get_unchecked(at) }); 2]);
        // SAFETY: the block has `lines` lines for each group.
        let w = unsafe { block.quants.as_ptr().add(group * lines) }.cast::<__m512i>();
        for index in 0..lines / 2 {
            // SAFETY: `index` is below the lines' half.
            let w = unsafe { [_mm512_load_si512(w.add(2 * index)), _mm512_load_si512(w.add(2 * index + 1))] };
            if INT4 {
                let low = w.map(|w| _mm512_and_si512(w, half));
                let high = w.map(|w| _mm512_and_si512(_mm512_srli_epi16::<4>(w), half));
                for r in 0..R {
                    // SAFETY: a group has eight quads.
                    let x = unsafe { [quad(x[r], index), quad(x[r], index + 4)] }.map(|x| _mm512_set1_epi32(x));
                    for v in 0..2 {
                        dots[r][v] = _mm512_dpbusd_epi32(dots[r][v], low[v], x[0]);
                        dots[r][v] = _mm512_dpbusd_epi32(dots[r][v], high[v], x[1]);
                    }
                }
            } else {
                for r in 0..R {
                    // SAFETY: a group has eight quads.
                    let x = _mm512_set1_epi32(unsafe { quad(x[r], index) });
                    for v in 0..2 {
                        dots[r][v] = _mm512_dpbusd_epi32(dots[r][v], w[v], x);
                    }
                }
            }
        }
        // SAFETY: a line is as long as a vector, and aligned as one.
        let words = unsafe { _mm512_load_si512(scales.0.as_ptr().cast()) };
        let scales = [_mm512_slli_epi32::<16>(words), _mm512_and_si512(words, upper)];
        for r in 0..R {
            // SAFETY: as above.
            let scale = _mm512_set1_ps(unsafe { *block.x.scales.get_unchecked(at[r]) });
            for v in 0..2 {
                let scale = _mm512_mul_ps(_mm512_castsi512_ps(scales[v]), scale);
                acc[r][v] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[r][v]), scale, acc[r][v]);
            }
        }
    }
    for (acc, sums) in acc.iter().zip(sums) {
        // SAFETY: a row of sums has room for two vectors.
        unsafe {
            _mm512_storeu_ps(sums.as_mut_ptr(), acc[0]);
            _mm512_storeu_ps(sums.as_mut_ptr().add(LANES), acc[1]);
        }
    }
}

/// Defines a kernel for vectors of 8 outputs, whose groups `$dots` sums.
macro_rules! ymm {
    ($name:ident, $features:literal, $dots:ident) => {
        /// SAFETY: needs the instructions, `R` sums, and `R` rows from `row` on that have the block's groups.
        #[target_feature(enable = $features)]
        unsafe fn $name<const R: usize, const INT4: bool>(block: &Block, row: usize, sums: &mut [[f32; PANEL]]) {
            const VECTORS: usize = PANEL / 8;
            let lines = if INT4 { 8 } else { 16 };
            let upper = _mm256_set1_epi32(0xffff_0000_u32.cast_signed());
            for (group, scales) in block.scales.iter().enumerate() {
                let at: [usize; R] = std::array::from_fn(|r| (row + r) * block.x.groups + block.start + group);
                // SAFETY: the rows have the block's groups, and quants, scales and starts one of each.
                let x = at.map(|at| unsafe { block.x.quants.as_ptr().add(at * GROUP) });
                let starts = at.map(|at| unsafe { *block.x.starts.get_unchecked(at) });
                let x_scales = at.map(|at| unsafe { *block.x.scales.get_unchecked(at) });
                // SAFETY: the block has `lines` lines for each group.
                let w = unsafe { block.quants.as_ptr().add(group * lines) }.cast::<__m256i>();
                for v in 0..VECTORS {
                    // SAFETY: a quad of the panel has `VECTORS` vectors; a line has two.
                    let (dots, words) = unsafe {
                        let words = scales.0.as_ptr().cast::<__m256i>().add(v % 2);
                        ($dots::<R, INT4, VECTORS>(w.add(v), x, starts), _mm256_load_si256(words))
                    };
                    let words = if v < 2 { _mm256_slli_epi32::<16>(words) } else { _mm256_and_si256(words, upper) };
                    for ((sums, dots), x_scale) in sums.iter_mut().zip(dots).zip(x_scales) {
                        let scale = _mm256_mul_ps(_mm256_castsi256_ps(words), _mm256_set1_ps(x_scale));
                        // SAFETY: a row of sums has room for `VECTORS` vectors.
                        unsafe {
                            let sum = sums.as_mut_ptr().add(8 * v);
                            let next = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots), scale, _mm256_loadu_ps(sum));
                            _mm256_storeu_ps(sum, next);
                        }
                    }
                }
            }
        }
    };
}

ymm!(ymm, "avx2,fma", dots);
ymm!(ymm_vnni, "avx2,fma,avxvnni", dots_vnni);

/// The products of a group of 8 outputs, whose vectors of weights lie `STEP` apart, with `R` rows.
///
/// SAFETY: needs AVX2; `w` must have the vectors of a group, and each of `x` its quads.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn dots<const R: usize, const INT4: bool, const STEP: usize>(
    w: *const __m256i,
    x: [*const i8; R],
    starts: [i32; R],
) -> [__m256i; R] {
    let half = _mm256_set1_epi8(0xf);
    let high_sum = usize::from(!INT4);
    let mut sums = [[_mm256_setzero_si256(); 2]; R];
    for index in 0..if INT4 { 4 } else { 8 } {
        // SAFETY: by this function's contract.
        let w = unsafe { _mm256_load_si256(w.add(index * STEP)) };
        let (low, high) = (_mm256_and_si256(w, half), _mm256_and_si256(_mm256_srli_epi16::<4>(w), half));
        for (sums, x) in sums.iter_mut().zip(x) {
            // SAFETY: by this function's contract.
            let x_low = _mm256_set1_epi32(unsafe { quad(x, index) });
            let x_high = if INT4 { _mm256_set1_epi32(unsafe { quad(x, index + 4) }) } else { x_low };
            sums[0] = _mm256_add_epi16(sums[0], _mm256_maddubs_epi16(low, x_low));
            sums[high_sum] = _mm256_add_epi16(sums[high_sum], _mm256_maddubs_epi16(high, x_high));
        }
    }
    let mut result = starts.map(|start| _mm256_set1_epi32(start));
    for (result, [low, high]) in result.iter_mut().zip(sums) {
        *result = _mm256_add_epi32(*result, _mm256_madd_epi16(low, _mm256_set1_epi16(1)));
        if !INT4 {
            *result = _mm256_add_epi32(*result, _mm256_madd_epi16(high, _mm256_set1_epi16(16)));
        }
    }
    result
}

/// As [`dots`].
///
/// SAFETY: needs AVX-VNNI; otherwise as [`dots`].
#[inline]
#[target_feature(enable = "avx2,avxvnni")]
unsafe fn dots_vnni<const R: usize, const INT4: bool, const STEP: usize>(
    w: *const __m256i,
    x: [*const i8; R],
    starts: [i32; R],
) -> [__m256i; R] {
    let half = _mm256_set1_epi8(0xf);
    let mut sums = starts.map(|start| _mm256_set1_epi32(start));
    for index in 0..if INT4 { 4 } else { 8 } {
        // SAFETY: by this function's contract.
        let w = unsafe { _mm256_load_si256(w.add(index * STEP)) };
        let (low, high) = (_mm256_and_si256(w, half), _mm256_and_si256(_mm256_srli_epi16::<4>(w), half));
        for (sum, x) in sums.iter_mut().zip(x) {
            // SAFETY: by this function's contract.
            let x_low = _mm256_set1_epi32(unsafe { quad(x, index) });
            *sum = _mm256_dpbusd_avx_epi32(*sum, if INT4 { low } else { w }, x_low);
            if INT4 {
                let x_high = _mm256_set1_epi32(unsafe { quad(x, index + 4) });
                *sum = _mm256_dpbusd_avx_epi32(*sum, high, x_high);
            }
        }
    }
    sums
}
