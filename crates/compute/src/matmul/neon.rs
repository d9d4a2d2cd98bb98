//! Kernels in the 128-bit vectors of 64-bit Arm: 24 of 32 registers hold sums.

use std::arch::aarch64::{
    float32x4_t, vandq_u32, vdupq_n_f32, vdupq_n_u32, vfmaq_f32, vld1q_f32, vld1q_u32, vreinterpretq_f32_u32,
    vshlq_n_u32, vst1q_f32,
};
use std::arch::asm;

use super::kernels::{Ahead, Kernels, Row, define};
use super::lanes::{self, Lanes};

define! {
    float32x4_t, features: "neon", words: 4, columns: 4,
    straight: [1: 2, 2: 1, 3: 1], tiles: [1, 2, 3, 4, 5, 6]
}

#[expect(clippy::inline_always, reason = "inlined into the kernels, which enable the instruction set")]
impl Lanes for float32x4_t {
    const COUNT: usize = 4;

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's promise, here and below.
        unsafe { vld1q_f32(from) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: as above.
        unsafe { vst1q_f32(to, self) }
    }

    #[inline(always)]
    unsafe fn splat(from: *const f32) -> Self {
        // SAFETY: as above.
        unsafe { vdupq_n_f32(*from) }
    }

    #[inline(always)]
    unsafe fn add_product(self, x: Self, w: Self) -> Self {
        // SAFETY: as above.
        unsafe { vfmaq_f32(self, x, w) }
    }

    #[inline(always)]
    unsafe fn halves(from: *const u32) -> (Self, Self) {
        // SAFETY: as above.
        unsafe {
            let words = vld1q_u32(from);
            (
                vreinterpretq_f32_u32(vshlq_n_u32::<16>(words)),
                vreinterpretq_f32_u32(vandq_u32(words, vdupq_n_u32(0xffff_0000))),
            )
        }
    }

    #[expect(clippy::pointers_in_nomem_asm_block, reason = "it reads and writes nothing that a program can see")]
    #[inline(always)]
    unsafe fn fetch(at: *const u8) {
        // Stable Rust has no function for it.
        // SAFETY: every processor of this kind has the instruction, and it does nothing where there is no memory.
        unsafe { asm!("prfm pldl1keep, [{}]", in(reg) at, options(nomem, nostack, preserves_flags)) }
    }
}
