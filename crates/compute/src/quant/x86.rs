//! The kernels for x86-64. Each takes a few rows at a time, as many as its registers hold sums for.
//!
//! With VNNI one instruction multiplies four unsigned bytes of weights with four signed ones of activations and adds all to a
//! 32-bit lane. Without it, weights are cut into halves of 4 bits: a whole group of products of halves and activations stays
//! within ±30480, so it is summed in 16-bit lanes without saturating, an 8-bit weight as sixteen times its upper half plus its
//! lower one.
#![expect(clippy::cast_ptr_alignment, reason = "the loads are those for unaligned addresses")]

use std::arch::x86_64::{
    __m256i, __m512i, _mm256_add_epi16, _mm256_add_epi32, _mm256_and_si256, _mm256_castsi256_ps, _mm256_cvtepi32_ps,
    _mm256_dpbusd_avx_epi32, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_loadu_si256, _mm256_madd_epi16,
    _mm256_maddubs_epi16, _mm256_mul_ps, _mm256_set1_epi8, _mm256_set1_epi16, _mm256_set1_epi32, _mm256_set1_ps,
    _mm256_setzero_si256, _mm256_slli_epi32, _mm256_srli_epi16, _mm256_storeu_ps, _mm512_and_si512,
    _mm512_castsi512_ps, _mm512_cvtepi32_ps, _mm512_dpbusd_epi32, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_loadu_si512,
    _mm512_mul_ps, _mm512_set1_epi8, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_si512, _mm512_slli_epi32,
    _mm512_srli_epi16, _mm512_storeu_ps,
};

use super::kernel::{Block, Kernel, STREAMS};
use super::matrix::{LANES, Line, QuantWidth};
use super::rows::{Group, TILE};
use super::tiled::{QUADS, Rows, lines, quad, tiled};
use crate::Isa;
use crate::matmul::Row;
use crate::packed::PANEL;

/// The fastest kernel for `isa`, which this machine must have.
pub(super) fn kernel(isa: Isa) -> Option<Kernel> {
    match isa {
        Isa::Avx512 if has_avx512_vnni() => Some(by_avx512_vnni),
        Isa::Avx512 | Isa::Avx2 if isa == Isa::best() && is_x86_feature_detected!("avxvnni") => Some(by_avx_vnni),
        Isa::Avx512 | Isa::Avx2 => Some(by_avx2),
        Isa::Portable | Isa::Neon => None,
    }
}

fn has_avx512_vnni() -> bool {
    is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512vnni")
}

/// Every kernel that this machine can run.
#[cfg(test)]
pub(super) fn kernels() -> Vec<Kernel> {
    let avx_vnni = is_x86_feature_detected!("avxvnni");
    let all: [(bool, Kernel); 3] =
        [(has_avx512_vnni(), by_avx512_vnni), (avx_vnni, by_avx_vnni), (Isa::Avx2.is_available(), by_avx2)];
    all.into_iter().filter_map(|(found, kernel)| found.then_some(kernel)).collect()
}

tiled!(by_avx512_vnni, zmm, 8: 1 2 3 4 5 6 7 8);
tiled!(by_avx_vnni, ymm_vnni, 8: 1 2 3 4 5 6 7 8);
tiled!(by_avx2, ymm, 4: 1 2 3 4 5 6 7 8);

/// SAFETY: needs AVX-512 F, BW and VNNI; `block` and `sums` must have the tile's rows, `R` from the first of `rows` on.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn zmm<const R: usize, const INT4: bool>(block: Block, rows: Rows, sums: &mut [Row]) {
    // Where reading is all there is to wait for, and registers have room for all sums: the more a stream is read without a pause,
    // the further a processor reads ahead in it. Fetching ahead as well made it slower.
    let beside = R <= 2 && block.panels.len() == STREAMS;
    // SAFETY: by this function's contract.
    unsafe {
        if beside { panels::<R, STREAMS, INT4>(block, rows, sums) } else { panels::<R, 1, INT4>(block, rows, sums) }
    }
}

/// As [`zmm`], a line of each of `P` panels in turn; there must be a multiple of as many.
///
/// SAFETY: as there.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn panels<const R: usize, const P: usize, const INT4: bool>(block: Block, rows: Rows, sums: &mut [Row]) {
    let (half, upper) = (_mm512_set1_epi8(0xf), _mm512_set1_epi32(0xffff_0000_u32.cast_signed()));
    for group in 0..rows.groups {
        // SAFETY: there are the tile's rows of each group.
        let x = unsafe { &*block.x.as_ptr().add(group * rows.all + rows.first).cast::<[Group; R]>() };
        for first in (0..block.panels.len()).step_by(P) {
            // The same for every panel, but kept for the next one these would be more than there are registers.
            let x = std::hint::black_box(x);
            let mut w = [std::ptr::null::<Line>(); P];
            for p in 0..P {
                // SAFETY: there are `P` panels from `first` on, and `lines` lines for each group of one.
                w[p] = unsafe { block.panels.get_unchecked(first + p).as_ptr().add(group * lines(INT4)) };
            }
            let mut dots = [[[_mm512_setzero_si512(); 2]; R]; P];
            for p in 0..P {
                for r in 0..R {
                    dots[p][r] = [_mm512_set1_epi32(x[r].start); 2];
                }
            }
            for index in 0..lines(INT4) / 2 {
                for p in 0..P {
                    let dots = &mut dots[p];
                    // SAFETY: `index` is below half the lines; a line is as long as a vector.
                    let w = unsafe {
                        let w = w[p].cast::<__m512i>().add(2 * index);
                        [_mm512_loadu_si512(w), _mm512_loadu_si512(w.add(1))]
                    };
                    if INT4 {
                        let low = [_mm512_and_si512(w[0], half), _mm512_and_si512(w[1], half)];
                        let high = [
                            _mm512_and_si512(_mm512_srli_epi16::<4>(w[0]), half),
                            _mm512_and_si512(_mm512_srli_epi16::<4>(w[1]), half),
                        ];
                        for r in 0..R {
                            // SAFETY: both quads are of the eight.
                            let (x_low, x_high) = unsafe { (quad(&x[r], index), quad(&x[r], index + QUADS / 2)) };
                            for v in 0..2 {
                                dots[r][v] = _mm512_dpbusd_epi32(dots[r][v], low[v], _mm512_set1_epi32(x_low));
                                dots[r][v] = _mm512_dpbusd_epi32(dots[r][v], high[v], _mm512_set1_epi32(x_high));
                            }
                        }
                    } else {
                        for r in 0..R {
                            // SAFETY: the index is that of a quad.
                            let x = _mm512_set1_epi32(unsafe { quad(&x[r], index) });
                            for v in 0..2 {
                                dots[r][v] = _mm512_dpbusd_epi32(dots[r][v], w[v], x);
                            }
                        }
                    }
                }
            }
            for p in 0..P {
                let scales = w[p].wrapping_add(lines(INT4) - 1);
                // SAFETY: the last line of a group is one of scales; a line is as long as a vector.
                let words = unsafe { _mm512_loadu_si512(scales.cast()) };
                let scales = [_mm512_slli_epi32::<16>(words), _mm512_and_si512(words, upper)];
                for r in 0..R {
                    let x_scale = _mm512_set1_ps(x[r].scale);
                    for v in 0..2 {
                        // SAFETY: each panel has a sum for each row of the tile, with room for two vectors.
                        unsafe {
                            let sum = sums.as_mut_ptr().add((first + p) * block.stride + rows.first + r);
                            let sum = sum.cast::<f32>().add(LANES * v);
                            let scale = _mm512_mul_ps(_mm512_castsi512_ps(scales[v]), x_scale);
                            let dots = _mm512_cvtepi32_ps(dots[p][r][v]);
                            _mm512_storeu_ps(sum, _mm512_fmadd_ps(dots, scale, _mm512_loadu_ps(sum)));
                        }
                    }
                }
            }
        }
    }
}

/// Defines a kernel for vectors of 8 outputs, whose groups `$dots` sums.
macro_rules! ymm {
    ($name:ident, $features:literal, $dots:ident) => {
        /// SAFETY: needs the instructions; `block` and `sums` must have the tile's rows, `R` from the first of `rows` on.
        #[target_feature(enable = $features)]
        unsafe fn $name<const R: usize, const INT4: bool>(block: Block, rows: Rows, sums: &mut [Row]) {
            let upper = _mm256_set1_epi32(0xffff_0000_u32.cast_signed());
            for group in 0..rows.groups {
                // SAFETY: there are the tile's rows of each group.
                let x = unsafe { &*block.x.as_ptr().add(group * rows.all + rows.first).cast::<[Group; R]>() };
                for (panel, lines_of) in block.panels.iter().enumerate() {
                    // The same for every panel, but kept for the next one these would be more than there are registers.
                    let x = std::hint::black_box(x);
                    // SAFETY: there are `lines` lines for each group of a panel.
                    let w = unsafe { lines_of.as_ptr().add(group * lines(INT4)) };
                    let w = w.cast::<__m256i>();
                    for v in 0..VECTORS {
                        // SAFETY: a quad of the panel has `VECTORS` vectors, the line of scales, a group's last, two.
                        let (dots, words) = unsafe {
                            let words = w.add((lines(INT4) - 1) * 2 + v % 2);
                            ($dots::<R, INT4>(w.add(v), x), _mm256_loadu_si256(words))
                        };
                        let words = if v < 2 { _mm256_slli_epi32::<16>(words) } else { _mm256_and_si256(words, upper) };
                        for r in 0..R {
                            let scale = _mm256_mul_ps(_mm256_castsi256_ps(words), _mm256_set1_ps(x[r].scale));
                            // SAFETY: each panel has a sum for each row of the tile, with room for `VECTORS` vectors.
                            unsafe {
                                let sum = sums.as_mut_ptr().add(panel * block.stride + rows.first + r);
                                let sum = sum.cast::<f32>().add(8 * v);
                                let dots = _mm256_cvtepi32_ps(dots[r]);
                                _mm256_storeu_ps(sum, _mm256_fmadd_ps(dots, scale, _mm256_loadu_ps(sum)));
                            }
                        }
                    }
                }
            }
        }
    };
}

/// Vectors of a quad.
const VECTORS: usize = PANEL / 8;

ymm!(ymm, "avx2,fma", dots);
ymm!(ymm_vnni, "avx2,fma,avxvnni", dots_vnni);

/// The products of a group of 8 outputs with `R` rows.
///
/// SAFETY: needs AVX2; `w` must have the vectors of a group, [`VECTORS`] apart.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn dots<const R: usize, const INT4: bool>(w: *const __m256i, x: &[Group; R]) -> [__m256i; R] {
    let half = _mm256_set1_epi8(0xf);
    let other = usize::from(!INT4);
    let mut sums = [[_mm256_setzero_si256(); 2]; R];
    for index in 0..if INT4 { QUADS / 2 } else { QUADS } {
        // SAFETY: by this function's contract.
        let w = unsafe { _mm256_loadu_si256(w.add(index * VECTORS)) };
        let (low, high) = (_mm256_and_si256(w, half), _mm256_and_si256(_mm256_srli_epi16::<4>(w), half));
        for r in 0..R {
            // SAFETY: both indices are those of quads.
            let (x_low, x_high) = unsafe { (quad(&x[r], index), quad(&x[r], (index + QUADS / 2) % QUADS)) };
            let x_low = _mm256_set1_epi32(x_low);
            let x_high = if INT4 { _mm256_set1_epi32(x_high) } else { x_low };
            sums[r][0] = _mm256_add_epi16(sums[r][0], _mm256_maddubs_epi16(low, x_low));
            sums[r][other] = _mm256_add_epi16(sums[r][other], _mm256_maddubs_epi16(high, x_high));
        }
    }
    let mut result = [_mm256_setzero_si256(); R];
    for r in 0..R {
        let dot = _mm256_add_epi32(_mm256_set1_epi32(x[r].start), _mm256_madd_epi16(sums[r][0], _mm256_set1_epi16(1)));
        let high = _mm256_madd_epi16(sums[r][1], _mm256_set1_epi16(16));
        result[r] = if INT4 { dot } else { _mm256_add_epi32(dot, high) };
    }
    result
}

/// As [`dots`].
///
/// SAFETY: needs AVX-VNNI; otherwise as [`dots`].
#[inline]
#[target_feature(enable = "avx2,avxvnni")]
unsafe fn dots_vnni<const R: usize, const INT4: bool>(w: *const __m256i, x: &[Group; R]) -> [__m256i; R] {
    let half = _mm256_set1_epi8(0xf);
    let mut sums = [_mm256_setzero_si256(); R];
    for r in 0..R {
        sums[r] = _mm256_set1_epi32(x[r].start);
    }
    for index in 0..if INT4 { QUADS / 2 } else { QUADS } {
        // SAFETY: by this function's contract.
        let w = unsafe { _mm256_loadu_si256(w.add(index * VECTORS)) };
        let (low, high) = (_mm256_and_si256(w, half), _mm256_and_si256(_mm256_srli_epi16::<4>(w), half));
        for r in 0..R {
            // SAFETY: both indices are those of quads.
            let (x_low, x_high) = unsafe { (quad(&x[r], index), quad(&x[r], (index + QUADS / 2) % QUADS)) };
            sums[r] = _mm256_dpbusd_avx_epi32(sums[r], if INT4 { low } else { w }, _mm256_set1_epi32(x_low));
            if INT4 {
                sums[r] = _mm256_dpbusd_avx_epi32(sums[r], high, _mm256_set1_epi32(x_high));
            }
        }
    }
    sums
}
