//! The kernels for 64-bit Arm, in vectors of 4 outputs.
//!
//! Weights of 8 bits become signed when their highest bit is turned, which takes 128 off; nothing is left to correct, so their sums
//! start from zero. Halves of 4 bits are 0 to 15, signed or not, and their sums start from [`Group::start`] as everywhere.
//!
//! With the dot product instructions (FEAT_DotProd) one multiplies four bytes of weights with four of activations and adds all to
//! a 32-bit lane. Without them, products are added up in 16-bit lanes, each of one input in four, and those in pairs in 32-bit
//! lanes. Weights are at least -128 (what pads a panel) and activations within ±127. So two products of 8-bit weights stay within
//! 2 * 128 * 127 = 32512, and eight of 4-bit ones, which a lane has in a whole group, within 8 * 15 * 127 = 15240: both below
//! 2^15.

use std::arch::aarch64::{
    int8x16_t, int32x4_t, vaddq_s32, vandq_u8, vandq_u32, vcvtq_f32_s32, vdup_n_s32, vdupq_n_f32, vdupq_n_s8,
    vdupq_n_s16, vdupq_n_s32, vdupq_n_u8, vdupq_n_u32, veorq_u8, vfmaq_f32, vget_high_s8, vget_low_s8, vld1q_f32,
    vld1q_s8, vld1q_u8, vld1q_u32, vmlal_s8, vmulq_f32, vpadalq_s16, vpaddq_s32, vreinterpret_s8_s32,
    vreinterpretq_f32_u32, vreinterpretq_s8_u8, vshlq_n_u32, vshrq_n_u8, vst1q_f32,
};
use std::arch::{asm, is_aarch64_feature_detected};

use super::kernel::{Block, Kernel};
use super::matrix::{LANES, QuantWidth};
use super::rows::{Group, TILE};
use super::tiled::{QUADS, Rows, lines, quad, tiled};
use crate::Isa;
use crate::matmul::Row;
use crate::packed::PANEL;

/// The fastest kernel for `isa`, which this machine must have.
pub(super) fn kernel(isa: Isa) -> Option<Kernel> {
    match isa {
        Isa::Neon if is_aarch64_feature_detected!("dotprod") => Some(by_dot_products),
        Isa::Neon => Some(by_neon),
        Isa::Portable | Isa::Avx2 | Isa::Avx512 => None,
    }
}

/// Every kernel that this machine can run.
#[cfg(test)]
pub(super) fn kernels() -> Vec<Kernel> {
    let all: [(bool, Kernel); 2] = [(is_aarch64_feature_detected!("dotprod"), by_dot_products), (true, by_neon)];
    all.into_iter().filter_map(|(found, kernel)| found.then_some(kernel)).collect()
}

tiled!(by_dot_products, with_dot_products, 8: 1 2 3 4 5 6 7 8);
tiled!(by_neon, plain, 8: 1 2 3 4 5 6 7 8);

/// Vectors of a quad.
const VECTORS: usize = PANEL / 4;

/// Vectors of a line.
const OF_LINE: usize = LANES / 4;

/// Defines a kernel for vectors of 4 outputs, whose groups `$dots` sums.
macro_rules! vectors {
    ($name:ident, $features:literal, $dots:ident) => {
        /// SAFETY: needs the instructions; `block` and `sums` must have the tile's rows, `R` from the first of `rows` on.
        #[target_feature(enable = $features)]
        unsafe fn $name<const R: usize, const INT4: bool>(block: Block, rows: Rows, sums: &mut [Row]) {
            let upper = vdupq_n_u32(0xffff_0000);
            for group in 0..rows.groups {
                // SAFETY: there are the tile's rows of each group.
                let x = unsafe { &*block.x.as_ptr().add(group * rows.all + rows.first).cast::<[Group; R]>() };
                for (panel, lines_of) in block.panels.iter().enumerate() {
                    // SAFETY: there are `lines` lines for each group of a panel.
                    let w = unsafe { lines_of.as_ptr().add(group * lines(INT4)) };
                    for v in 0..VECTORS {
                        // SAFETY: a quad of the panel has `VECTORS` vectors, the line of scales, a group's last, `OF_LINE`.
                        let (dots, words) = unsafe {
                            let words = w.add(lines(INT4) - 1).cast::<u32>().add(4 * (v % OF_LINE));
                            ($dots::<R, INT4>(w.cast::<u8>().add(16 * v), x), vld1q_u32(words))
                        };
                        let words = if v < OF_LINE { vshlq_n_u32::<16>(words) } else { vandq_u32(words, upper) };
                        for r in 0..R {
                            let scale = vmulq_f32(vreinterpretq_f32_u32(words), vdupq_n_f32(x[r].scale));
                            // SAFETY: each panel has a sum for each row of the tile, with room for `VECTORS` vectors.
                            unsafe {
                                let sum = sums.as_mut_ptr().add(panel * block.stride + rows.first + r);
                                let sum = sum.cast::<f32>().add(4 * v);
                                vst1q_f32(sum, vfmaq_f32(vld1q_f32(sum), vcvtq_f32_s32(dots[r]), scale));
                            }
                        }
                    }
                }
            }
        }
    };
}

vectors!(with_dot_products, "neon,dotprod", dots_by_products);
vectors!(plain, "neon", dots);

/// The weights of 4 outputs in a quad, signed, of 4 bits still with their offset.
///
/// SAFETY: `w` must have the vectors of a group, [`VECTORS`] apart, and `index` be below [`QUADS`].
#[inline]
#[target_feature(enable = "neon")]
unsafe fn weights<const INT4: bool>(w: *const u8, index: usize) -> int8x16_t {
    let stored = if INT4 { index % (QUADS / 2) } else { index };
    // SAFETY: by this function's contract.
    let stored = unsafe { vld1q_u8(w.add(16 * VECTORS * stored)) };
    vreinterpretq_s8_u8(if !INT4 {
        veorq_u8(stored, vdupq_n_u8(0x80))
    } else if index < QUADS / 2 {
        vandq_u8(stored, vdupq_n_u8(0xf))
    } else {
        vshrq_n_u8::<4>(stored)
    })
}

/// What the sums of a group start from.
#[inline]
#[target_feature(enable = "neon")]
fn start<const INT4: bool>(x: &Group) -> int32x4_t {
    vdupq_n_s32(if INT4 { x.start } else { 0 })
}

/// The products of a group of 4 outputs with `R` rows.
///
/// SAFETY: `w` must have the vectors of a group, [`VECTORS`] apart.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn dots<const R: usize, const INT4: bool>(w: *const u8, x: &[Group; R]) -> [int32x4_t; R] {
    // Quads whose products fit into 16 bits.
    let quads = if INT4 { QUADS } else { 2 };
    // Of two outputs each, in two parts that are yet to be added.
    let mut sums = [[vdupq_n_s32(0); 2]; R];
    for first in (0..QUADS).step_by(quads) {
        let mut w_of = [vdupq_n_s8(0); QUADS];
        for index in 0..quads {
            // SAFETY: the index is that of a quad.
            w_of[index] = unsafe { weights::<INT4>(w, first + index) };
        }
        for r in 0..R {
            let mut short = [vdupq_n_s16(0); 2];
            for index in 0..quads {
                // SAFETY: as above.
                let x = vreinterpret_s8_s32(vdup_n_s32(unsafe { quad(&x[r], first + index) }));
                short[0] = vmlal_s8(short[0], vget_low_s8(w_of[index]), x);
                short[1] = vmlal_s8(short[1], vget_high_s8(w_of[index]), x);
            }
            sums[r] = [vpadalq_s16(sums[r][0], short[0]), vpadalq_s16(sums[r][1], short[1])];
        }
    }
    let mut result = [vdupq_n_s32(0); R];
    for r in 0..R {
        result[r] = vaddq_s32(start::<INT4>(&x[r]), vpaddq_s32(sums[r][0], sums[r][1]));
    }
    result
}

/// As [`dots`].
///
/// SAFETY: needs the dot product instructions; otherwise as [`dots`].
#[inline]
#[target_feature(enable = "neon,dotprod")]
unsafe fn dots_by_products<const R: usize, const INT4: bool>(w: *const u8, x: &[Group; R]) -> [int32x4_t; R] {
    let mut sums = [vdupq_n_s32(0); R];
    for r in 0..R {
        sums[r] = start::<INT4>(&x[r]);
    }
    for first in [0, QUADS / 2] {
        // SAFETY: the indices are those of quads.
        let w = unsafe {
            let weights = |index| weights::<INT4>(w, first + index);
            [weights(0), weights(1), weights(2), weights(3)]
        };
        for r in 0..R {
            // SAFETY: both halves of the quants are a vector.
            let x = unsafe { vld1q_s8(x[r].quants.as_ptr().add(4 * first)) };
            sums[r] = dot::<0>(sums[r], w[0], x);
            sums[r] = dot::<1>(sums[r], w[1], x);
            sums[r] = dot::<2>(sums[r], w[2], x);
            sums[r] = dot::<3>(sums[r], w[3], x);
        }
    }
    sums
}

/// Adds to each lane the products of its four weights with the four activations of quad `QUAD`. Stable Rust has no function for it.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn dot<const QUAD: u8>(mut sums: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
    // SAFETY: it reads and writes these registers, and no flag.
    unsafe {
        asm!(
            "sdot {sums:v}.4s, {w:v}.16b, {x:v}.4b[{quad}]",
            sums = inout(vreg) sums, w = in(vreg) w, x = in(vreg) x, quad = const QUAD,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sums
}
