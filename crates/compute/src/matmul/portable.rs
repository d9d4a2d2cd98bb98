//! The same kernels for any processor, one output at a time.

use super::kernels::{Ahead, Kernels, Row, define};
use super::lanes::{self, Lanes};

define! {
    f32, words: 16, columns: 32,
    straight: [1: 1], tiles: [1, 2, 3, 4]
}

impl Lanes for f32 {
    const COUNT: usize = 1;

    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's promise, here and below.
        unsafe { *from }
    }

    unsafe fn store(self, to: *mut f32) {
        // SAFETY: as above.
        unsafe { *to = self }
    }

    unsafe fn splat(from: *const f32) -> Self {
        // SAFETY: as above.
        unsafe { *from }
    }

    unsafe fn add_product(self, x: Self, w: Self) -> Self {
        x.mul_add(w, self)
    }

    unsafe fn halves(from: *const u32) -> (Self, Self) {
        // SAFETY: as above.
        let word = unsafe { *from };
        (Self::from_bits(word << 16), Self::from_bits(word & 0xffff_0000))
    }

    unsafe fn fetch(_at: *const u8) {}
}
