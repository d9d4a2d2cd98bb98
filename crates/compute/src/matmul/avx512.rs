//! Kernels in 512-bit vectors: 28 of 32 registers hold sums.

use std::arch::x86_64::{
    __m512, _MM_HINT_T0, _mm_prefetch, _mm512_and_si512, _mm512_castsi512_ps, _mm512_fmadd_ps, _mm512_loadu_ps,
    _mm512_loadu_si512, _mm512_set1_epi32, _mm512_set1_ps, _mm512_slli_epi32, _mm512_storeu_ps,
};

use super::kernels::{Ahead, Kernels, Row, define};
use super::lanes::{self, Lanes};

define! {
    __m512, features: "avx512f", words: 1, columns: 2,
    straight: [1: 4, 2: 4, 3: 4, 4: 2, 5: 2, 6: 2], tiles: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
}

#[expect(clippy::inline_always, reason = "inlined into the kernels, which enable the instruction set")]
impl Lanes for __m512 {
    const COUNT: usize = 16;

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's promise, here and below.
        unsafe { _mm512_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: as above.
        unsafe { _mm512_storeu_ps(to, self) }
    }

    #[inline(always)]
    unsafe fn splat(from: *const f32) -> Self {
        // SAFETY: as above.
        unsafe { _mm512_set1_ps(*from) }
    }

    #[inline(always)]
    unsafe fn add_product(self, x: Self, w: Self) -> Self {
        // SAFETY: as above.
        unsafe { _mm512_fmadd_ps(x, w, self) }
    }

    #[inline(always)]
    unsafe fn halves(from: *const u32) -> (Self, Self) {
        // SAFETY: as above.
        unsafe {
            let words = _mm512_loadu_si512(from.cast());
            let upper = _mm512_set1_epi32(0xffff_0000_u32.cast_signed());
            (_mm512_castsi512_ps(_mm512_slli_epi32::<16>(words)), _mm512_castsi512_ps(_mm512_and_si512(words, upper)))
        }
    }

    #[inline(always)]
    unsafe fn fetch(at: *const u8) {
        // SAFETY: as above.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
}
