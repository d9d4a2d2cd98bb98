//! Kernels in 256-bit vectors: 12 of 16 registers hold sums.

use std::arch::x86_64::{
    __m256, _MM_HINT_T0, _mm_prefetch, _mm256_and_si256, _mm256_broadcast_ss, _mm256_castsi256_ps, _mm256_fmadd_ps,
    _mm256_loadu_ps, _mm256_loadu_si256, _mm256_set1_epi32, _mm256_slli_epi32, _mm256_storeu_ps,
};

use super::kernels::{Ahead, Kernels, Row, define};
use super::lanes::{self, Lanes};

define! {
    __m256, features: "avx2,fma", words: 2, columns: 2,
    straight: [1: 2, 2: 1, 3: 1], tiles: [1, 2, 3, 4, 5, 6]
}

#[expect(clippy::inline_always, reason = "inlined into the kernels, which enable the instruction set")]
impl Lanes for __m256 {
    const COUNT: usize = 8;

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's promise, here and below.
        unsafe { _mm256_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: as above.
        unsafe { _mm256_storeu_ps(to, self) }
    }

    #[inline(always)]
    unsafe fn splat(from: *const f32) -> Self {
        // SAFETY: as above.
        unsafe { _mm256_broadcast_ss(&*from) }
    }

    #[inline(always)]
    unsafe fn add_product(self, x: Self, w: Self) -> Self {
        // SAFETY: as above.
        unsafe { _mm256_fmadd_ps(x, w, self) }
    }

    #[inline(always)]
    unsafe fn halves(from: *const u32) -> (Self, Self) {
        // SAFETY: as above.
        unsafe {
            let words = _mm256_loadu_si256(from.cast());
            let upper = _mm256_set1_epi32(0xffff_0000_u32.cast_signed());
            (_mm256_castsi256_ps(_mm256_slli_epi32::<16>(words)), _mm256_castsi256_ps(_mm256_and_si256(words, upper)))
        }
    }

    #[inline(always)]
    unsafe fn fetch(at: *const u8) {
        // SAFETY: as above.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
}
