//! Activations as 8-bit integers, quantised row by row, so that a row never depends on its batch mates.

use super::GROUP;
use crate::wide::wide;

/// Rows of a tile: as many as a kernel takes at once.
pub(super) const TILE: usize = 8;

/// Rows of activations: each value is a quant times the scale of its group.
#[derive(Debug)]
pub(super) struct QuantRows {
    pub(super) shape: Shape,
    /// `[tiles, groups, rows of the tile]`
    pub(super) data: Vec<Group>,
}

/// How many rows of how many groups, and where they lie: in tiles of [`TILE`] rows, the last as short as it is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) rows: usize,
    /// Groups of a row; the last is padded with zeros.
    pub(super) groups: usize,
}

impl Shape {
    /// Where a row's group lies.
    pub(super) fn index(self, row: usize, group: usize) -> usize {
        let first = row / TILE * TILE;
        first * self.groups + group * TILE.min(self.rows - first) + row % TILE
    }
}

/// One group of a row.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(super) struct Group {
    /// Within -127..=127.
    pub(super) quants: [i8; GROUP],
    pub(super) scale: f32,
    /// What a sum over stored, unsigned weights starts from, so that it ends as that of the signed ones: minus their offset
    /// times the sum of the quants.
    pub(super) start: i32,
}

impl QuantRows {
    /// Rows of zeros.
    pub(super) fn zeros(rows: usize, width: usize) -> Self {
        let groups = width.div_ceil(GROUP);
        let zero = Group { quants: [0; GROUP], scale: 0.0, start: 0 };
        Self { shape: Shape { rows, groups }, data: vec![zero; rows * groups] }
    }

    /// The tile whose first row is `first`: `[groups, rows of the tile]`.
    pub(super) fn tile(&self, first: usize) -> &[Group] {
        let Shape { rows, groups } = self.shape;
        &self.data[first * groups..][..TILE.min(rows - first) * groups]
    }
}

wide! {
    /// Quantises up to [`GROUP`] values, padded with zeros, for weights stored with `offset` added.
    pub(super) fn quantise(values: &[f32], offset: i32) -> Group = group
}

/// Least magnitude that is not taken for 0, so that 127 divided by it is finite: 2^-119.
const LEAST: f32 = f32::from_bits((127 - 119) << 23);

/// Added to a number within ±2^22 it leaves its nearest integer, ties to even, in the lowest bits.
const SHIFT: f32 = 12_582_912.0;

/// The scale is the largest magnitude divided by 127, and each quant `value * (127 / largest)`, rounded to the nearest, ties
/// to even. A group with nothing above 2^-119 is all zeros. One with a NaN or an infinity has a NaN for its scale.
#[expect(clippy::inline_always, reason = "compiled once per instruction set, inside the caller that enables it")]
#[inline(always)]
fn group(values: &[f32], offset: i32) -> Group {
    let mut padded = [0.0; GROUP];
    padded[..values.len()].copy_from_slice(values);
    // As integers, magnitudes are in order, and infinities and NaNs are the largest.
    let largest = padded.iter().fold(0, |most: u32, value| most.max(value.abs().to_bits()));
    let mut quants = [0; GROUP];
    let largest = f32::from_bits(largest);
    if !largest.is_finite() {
        return Group { quants, scale: f32::NAN, start: 0 };
    }
    if largest <= LEAST {
        return Group { quants, scale: 0.0, start: 0 };
    }
    let inverse = 127.0 / largest;
    for (quant, value) in quants.iter_mut().zip(padded) {
        *quant = (value * inverse + SHIFT).to_bits() as i8;
    }
    let sum: i32 = quants.iter().map(|&quant| i32::from(quant)).sum();
    Group { quants, scale: largest / 127.0, start: -offset * sum }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quants_are_the_nearest_and_the_largest_value_is_127() {
        let values: Vec<f32> = (0..32).map(|i| (i as f32 * 1.7).sin() * 3.0).collect();
        let Group { quants, scale, start } = quantise(&values, 128);
        let largest = values.iter().fold(0.0_f32, |most, value| most.max(value.abs()));
        assert_eq!(scale.to_bits(), (largest / 127.0).to_bits());
        assert_eq!(quants.iter().map(|quant| quant.unsigned_abs()).max(), Some(127));
        for (quant, value) in quants.iter().zip(&values) {
            assert!((f32::from(*quant) * scale - value).abs() <= scale * 0.501, "{value} became {quant}");
        }
        assert_eq!(start, -128 * quants.iter().map(|&quant| i32::from(quant)).sum::<i32>());
    }

    #[test]
    fn ties_go_to_the_even_integer() {
        let quants = quantise(&[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5], 8).quants;
        assert_eq!(quants[..7], [127, 0, 2, 2, 0, -2, -126]);
    }

    #[test]
    fn what_is_not_finite_makes_the_scale_a_nan_and_what_is_tiny_is_zero() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let group = quantise(&[1.0, bad, 2.0], 8);
            assert!(group.scale.is_nan() && group.quants == [0; GROUP] && group.start == 0);
        }
        for tiny in [0.0, -0.0, f32::MIN_POSITIVE, 1e-40, -LEAST] {
            let group = quantise(&[tiny, -tiny], 8);
            assert_eq!((group.scale.to_bits(), group.quants), (0, [0; GROUP]));
        }
        for extreme in [f32::MAX, LEAST * 1.01] {
            let group = quantise(&[extreme, -extreme], 8);
            assert!(group.scale.is_normal() && group.quants[..2] == [127, -127]);
        }
    }
}
