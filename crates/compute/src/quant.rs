//! Experts whose weights are integers of 8 or 4 bits, multiplied with activations of 8 bits.
//!
//! Weights ([`matrix::QuantPanels`]) and activations ([`rows::QuantRows`]) are integers times a scale that 32 consecutive inputs, a
//! group, share. A product is then
//!
//! `sum = fma(dot as f32, weight_scale * activation_scale, sum)` over ascending groups, from zero,
//!
//! where `dot` is the exact integer product of the group (below 2^24, so its f32 is exact too). Integers add up to the same in
//! any order, and lanes are different outputs, so every kernel, row count, tiling and thread count gives the same bits.

mod expert;
mod kernel;
mod matrix;
#[cfg(target_arch = "aarch64")]
mod neon;
mod rows;
#[cfg(test)]
mod tests;
#[cfg(any(target_arch = "aarch64", target_arch = "x86_64"))]
mod tiled;
#[cfg(target_arch = "x86_64")]
mod x86;

pub(crate) use expert::QuantExpert;
pub(crate) use matrix::{QuantWidth, quantise};

/// Consecutive inputs that share a scale.
pub(crate) const GROUP: usize = 32;
