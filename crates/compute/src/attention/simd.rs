//! The vector registers that attention is written for: one trait, each instruction set an implementation.
//!
//! Lanes are different outputs, and a multiply-add is fused, so a lane's bits do not depend on how many there are.

#[cfg(target_arch = "aarch64")]
use std::arch::aarch64::{float32x4_t, vdupq_n_f32, vfmaq_f32, vld1q_f32, vst1q_f32};
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{
    __m256, __m512, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_set1_ps, _mm256_storeu_ps, _mm512_fmadd_ps,
    _mm512_loadu_ps, _mm512_set1_ps, _mm512_storeu_ps,
};

/// A register of [`Simd::LANES`] f32.
///
/// SAFETY of every function: the machine has the instruction set, and what a pointer points to is [`Simd::LANES`] f32. They must be
/// inlined into a function that enables the instruction set.
pub(super) trait Simd: Copy {
    /// f32 in a register.
    const LANES: usize;
    /// Rows whose sums, two registers each, are kept in registers at once.
    const ROWS: usize;

    /// The f32 from `source` on.
    unsafe fn load(source: *const f32) -> Self;
    /// Writes all lanes from `target` on.
    unsafe fn store(self, target: *mut f32);
    /// `value` in each lane.
    unsafe fn splat(value: f32) -> Self;
    /// `a * b + self`, rounded once.
    unsafe fn add_product(self, a: Self, b: Self) -> Self;
}

/// Four f32 in no particular register.
#[derive(Clone, Copy)]
pub(super) struct Plain([f32; 4]);

#[expect(clippy::inline_always, reason = "compiled inside a caller that enables the instruction set")]
impl Simd for Plain {
    const LANES: usize = 4;
    const ROWS: usize = 4;

    #[inline(always)]
    unsafe fn load(source: *const f32) -> Self {
        // SAFETY: by the contract of the trait.
        Self(unsafe { source.cast::<[f32; 4]>().read() })
    }

    #[inline(always)]
    unsafe fn store(self, target: *mut f32) {
        // SAFETY: by the contract of the trait.
        unsafe { target.cast::<[f32; 4]>().write(self.0) }
    }

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Self([value; 4])
    }

    #[inline(always)]
    unsafe fn add_product(mut self, a: Self, b: Self) -> Self {
        for ((sum, a), b) in self.0.iter_mut().zip(a.0).zip(b.0) {
            *sum = a.mul_add(b, *sum);
        }
        self
    }
}

/// Implements [`Simd`] by intrinsics.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! simd {
    ($name:ident($register:ty), $lanes:literal, $rows:literal, $load:ident, $store:ident, $splat:ident, |$c:ident, $a:ident, $b:ident| $fma:expr) => {
        #[derive(Clone, Copy)]
        pub(super) struct $name($register);

        #[expect(clippy::inline_always, reason = "compiled inside a caller that enables the instruction set")]
        impl Simd for $name {
            const LANES: usize = $lanes;
            const ROWS: usize = $rows;

            #[inline(always)]
            unsafe fn load(source: *const f32) -> Self {
                // SAFETY: by the contract of the trait.
                Self(unsafe { $load(source) })
            }

            #[inline(always)]
            unsafe fn store(self, target: *mut f32) {
                // SAFETY: by the contract of the trait.
                unsafe { $store(target, self.0) }
            }

            #[inline(always)]
            unsafe fn splat(value: f32) -> Self {
                // SAFETY: by the contract of the trait.
                Self(unsafe { $splat(value) })
            }

            #[inline(always)]
            unsafe fn add_product(self, a: Self, b: Self) -> Self {
                let ($c, $a, $b) = (self.0, a.0, b.0);
                // SAFETY: by the contract of the trait.
                Self(unsafe { $fma })
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
simd!(Avx2(__m256), 8, 6, _mm256_loadu_ps, _mm256_storeu_ps, _mm256_set1_ps, |c, a, b| _mm256_fmadd_ps(a, b, c));
#[cfg(target_arch = "x86_64")]
simd!(Avx512(__m512), 16, 12, _mm512_loadu_ps, _mm512_storeu_ps, _mm512_set1_ps, |c, a, b| _mm512_fmadd_ps(a, b, c));
#[cfg(target_arch = "aarch64")]
simd!(Neon(float32x4_t), 4, 8, vld1q_f32, vst1q_f32, vdupq_n_f32, |c, a, b| vfmaq_f32(c, a, b));
