//! Weight matrices of 8-bit or 4-bit integers, in the layout the kernels read.
//!
//! A panel is 32 outputs. For each group of 32 inputs it holds quads: four consecutive inputs of each output in one 32-bit lane,
//! 32 lanes to a quad, as instructions that multiply and add four bytes at a time want them. Weights are stored unsigned, with
//! [`QuantWidth::offset`] added. A byte of 8 bits is one weight; with 4 bits the lower half belongs to quad `q` of the group and
//! the upper half to quad `q + 4`. Its scales follow, so that a panel is one stream. The last panel and the last group are padded
//! with scales of zero.
//!
//! Scales are bf16, rounded away from zero so that no quant exceeds its range: they have the range of the weights, and cost half
//! of f32's bytes. Word `i` of a group's scales has output `i` in its lower half and output `i + 16` in its upper half.

use super::GROUP;
use crate::packed::PANEL;
use crate::pages::Pages;
use crate::wide::wide;

/// 32-bit lanes of a [`Line`].
pub(super) const LANES: usize = PANEL / 2;

/// A cache line: half of a quad, or the scales of a group.
pub(super) type Line = [u32; LANES];

// A panel of one matrix makes whole groups for the next.
const _: () = assert!(PANEL == GROUP);

/// Bits of a quantised weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum QuantWidth {
    /// 8 bits: -127 to 127.
    Int8,
    /// 4 bits: -8 to 7.
    Int4,
}

impl QuantWidth {
    /// What is added to a weight where it is stored.
    pub(super) fn offset(self) -> i32 {
        match self {
            Self::Int8 => 128,
            Self::Int4 => 8,
        }
    }

    /// Lines that the quants of a group of a panel take; one of scales follows them.
    pub(super) const fn quant_lines(self) -> usize {
        match self {
            Self::Int8 => 16,
            Self::Int4 => 8,
        }
    }

    /// Lines that a group of a panel takes.
    pub(super) const fn lines(self) -> usize {
        self.quant_lines() + 1
    }
}

/// Panels of integers with a scale per output and group of inputs.
#[derive(Debug)]
pub(super) struct QuantPanels {
    pub(super) width: QuantWidth,
    pub(super) inputs: usize,
    /// `[panels, groups, width.lines()]`: the quants of a group, then its scales.
    lines: Pages,
}

impl QuantPanels {
    /// `count` panels of zeros.
    pub(super) fn zeroed(width: QuantWidth, count: usize, inputs: usize) -> Self {
        let lines = count * inputs.div_ceil(GROUP) * width.lines();
        Self { width, inputs, lines: Pages::zeroed(lines * LANES) }
    }

    /// Memory the weights and their scales take, padding included.
    pub(super) fn bytes(&self) -> usize {
        size_of_val(&*self.lines)
    }

    pub(super) fn count(&self) -> usize {
        self.lines.len() / (self.groups() * self.width.lines() * LANES)
    }

    pub(super) fn groups(&self) -> usize {
        self.inputs.div_ceil(GROUP)
    }

    /// One panel, `[groups, width.lines()]`.
    pub(super) fn panel(&self, index: usize) -> &[Line] {
        let len = self.groups() * self.width.lines();
        &self.lines.as_chunks().0[index * len..][..len]
    }

    /// Fills panel `index` with up to [`PANEL`] rows of little-endian bf16. What it pads has scales of zero.
    pub(super) fn fill(&mut self, index: usize, rows: &[u8]) {
        let len = self.groups() * self.width.lines();
        let panel = &mut self.lines.as_chunks_mut::<LANES>().0[index * len..][..len];
        for (group, lines) in panel.chunks_exact_mut(self.width.lines()).enumerate() {
            let (quants, scales) = lines.split_at_mut(self.width.quant_lines());
            let scales = &mut scales[0];
            for (lane, row) in rows.chunks_exact(self.inputs * 2).enumerate() {
                let values = &row[group * GROUP * 2..];
                let (scale, weights) = quantise(self.width, &values[..values.len().min(GROUP * 2)]);
                let (half, lane) = (lane / LANES, lane % LANES);
                scales[lane] |= u32::from(scale) << (16 * half);
                for (quad, &weights) in weights.as_chunks::<4>().0.iter().enumerate() {
                    let word = u32::from_le_bytes(weights);
                    match self.width {
                        QuantWidth::Int8 => quants[2 * quad + half][lane] = word,
                        QuantWidth::Int4 => quants[2 * (quad % 4) + half][lane] |= word << (4 * (quad / 4)),
                    }
                }
            }
        }
    }
}

/// The scale of one output and a group's lines.
pub(super) fn scale(width: QuantWidth, lines: &[Line], lane: usize) -> f32 {
    let word = lines[width.quant_lines()][lane % LANES];
    f32::from_bits(if lane < LANES { word << 16 } else { word & 0xffff_0000 })
}

/// The weight of one output and one input of a group, the offset taken off again.
pub(super) fn weight(width: QuantWidth, lines: &[Line], lane: usize, input: usize) -> i32 {
    let quad = input / 4;
    let word = |quad: usize| lines[2 * quad + lane / LANES][lane % LANES];
    let byte = |word: u32| word >> (8 * (input % 4)) & 0xff;
    let stored = match width {
        QuantWidth::Int8 => byte(word(quad)),
        QuantWidth::Int4 => byte(word(quad % 4)) >> (4 * (quad / 4)) & 0xf,
    };
    stored.cast_signed() - width.offset()
}

wide! {
    /// Quantises up to [`GROUP`] little-endian bf16 values, padded with zeros: the bits of their bf16 scale, and the weights as
    /// they are stored.
    pub(crate) fn quantise(width: QuantWidth, values: &[u8]) -> (u16, [u8; GROUP]) = group
}

/// Added to a number within ±2^22 it leaves its nearest integer, ties to even, in the lowest bits.
const SHIFT: f32 = 12_582_912.0;

/// With 8 bits the value of the largest magnitude becomes ±127; with 4 bits it becomes -8, whatever its sign, as in llama.cpp's
/// Q4_0: the scale may be negative. A group with a NaN or an infinity has a NaN for its scale, so that its outputs show it.
#[expect(clippy::inline_always, reason = "compiled once per instruction set, inside the caller that enables it")]
#[inline(always)]
fn group(width: QuantWidth, values: &[u8]) -> (u16, [u8; GROUP]) {
    let mut padded = [0.0; GROUP];
    for (padded, &value) in padded.iter_mut().zip(values.as_chunks::<2>().0) {
        *padded = f32::from_bits(u32::from(u16::from_le_bytes(value)) << 16);
    }
    let zero = width.offset() as u8;
    // As integers, rotated so that the sign comes last, magnitudes are in order, and infinities and NaNs are the largest.
    let largest = padded.iter().fold(0, |most: u32, value| most.max(value.to_bits().rotate_left(1)));
    let largest = f32::from_bits(largest.rotate_right(1));
    if !largest.is_finite() {
        return (0x7fc0, [zero; GROUP]);
    }
    let (wanted, lowest, highest) = match width {
        QuantWidth::Int8 => (largest.abs() / 127.0, -127.0, 127.0),
        QuantWidth::Int4 => (largest / -8.0, -8.0, 7.0),
    };
    let scale = ((wanted.to_bits() + 0xffff) >> 16) as u16;
    let step = f32::from_bits(u32::from(scale) << 16);
    let step = if step == 0.0 { 1.0 } else { step };
    let mut weights = [zero; GROUP];
    for (weight, value) in weights.iter_mut().zip(padded) {
        let quant = (value / step).clamp(lowest, highest);
        *weight = ((quant + SHIFT).to_bits() as u8).wrapping_add(zero);
    }
    (scale, weights)
}

#[cfg(test)]
impl QuantPanels {
    /// One output of a panel: each weight's integer and its scale.
    pub(super) fn quants_and_scales(&self, panel: usize, lane: usize) -> impl Iterator<Item = (i32, f32)> + '_ {
        let panel = self.panel(panel);
        (0..self.inputs).map(move |input| {
            let lines = &panel[input / GROUP * self.width.lines()..][..self.width.lines()];
            (weight(self.width, lines, lane, input % GROUP), scale(self.width, lines, lane))
        })
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    fn bytes(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect()
    }

    fn matrix(width: QuantWidth, bytes: &[u8], outputs: usize, inputs: usize) -> QuantPanels {
        let mut matrix = QuantPanels::zeroed(width, outputs.div_ceil(PANEL), inputs);
        for (panel, rows) in bytes.chunks(PANEL * inputs * 2).enumerate() {
            matrix.fill(panel, rows);
        }
        matrix
    }

    fn row(matrix: &QuantPanels, output: usize) -> Vec<f32> {
        matrix.quants_and_scales(output / PANEL, output % PANEL).map(|(quant, scale)| quant as f32 * scale).collect()
    }

    #[test]
    fn every_weight_is_found_where_it_was_put_within_half_a_step() {
        let (outputs, inputs) = (69, 75);
        let values: Vec<f32> = (0..outputs * inputs).map(|i| (i as f32 * 0.731).sin()).collect();
        for (width, half_steps) in [(QuantWidth::Int8, 127.0), (QuantWidth::Int4, 8.0)] {
            let matrix = matrix(width, &bytes(&values), outputs, inputs);
            for output in 0..outputs {
                let wanted = &values[output * inputs..][..inputs];
                let got = row(&matrix, output);
                for (wanted, got) in wanted.chunks(GROUP).zip(got.chunks(GROUP)) {
                    let largest = wanted.iter().fold(0.0_f32, |most, value| most.max(value.abs()));
                    // The largest of the other sign is cut at 7 steps of 8.
                    let allowed = largest / half_steps * if width == QuantWidth::Int4 { 1.1 } else { 0.52 };
                    assert!(wanted.iter().zip(got).all(|(wanted, got)| (wanted - got).abs() <= allowed + 0.005));
                }
            }
        }
    }

    #[test]
    fn integers_times_a_power_of_two_are_kept_exactly() {
        let values: Vec<f32> = (0..64).map(|i| (i % 16 - 8) as f32 / 4.0).collect();
        for width in [QuantWidth::Int8, QuantWidth::Int4] {
            let scaled: Vec<f32> = match width {
                QuantWidth::Int8 => values.iter().map(|v| if *v < -1.9 { -127.0 } else { *v * 4.0 }).collect(),
                QuantWidth::Int4 => values.clone(),
            };
            let matrix = matrix(width, &bytes(&scaled), 2, 32);
            for output in 0..2 {
                assert_eq!(row(&matrix, output), scaled[output * 32..][..32]);
            }
        }
    }

    #[test]
    fn a_group_that_is_not_finite_shows_it_and_its_neighbours_do_not() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut values = vec![1.0; 96];
            values[40] = bad;
            for width in [QuantWidth::Int8, QuantWidth::Int4] {
                let matrix = matrix(width, &bytes(&values), 1, 96);
                let row = row(&matrix, 0);
                assert!(row[32..64].iter().all(|value| value.is_nan()));
                assert!(row[..32].iter().chain(&row[64..]).all(|value| (value - 1.0).abs() < 0.01));
            }
        }
    }

    #[test]
    fn the_largest_and_the_least_bf16_keep_their_sign_and_size() {
        for value in [bf16::MAX.to_f32(), bf16::MIN.to_f32(), f32::from_bits(1 << 16), f32::MIN_POSITIVE, 0.0] {
            for width in [QuantWidth::Int8, QuantWidth::Int4] {
                let matrix = matrix(width, &bytes(&[value; 32]), 1, 32);
                let worst = row(&matrix, 0).iter().map(|got| (got / 2.0 - value / 2.0).abs()).fold(0.0, f32::max);
                assert!(worst <= value.abs() * 0.005 + f32::from_bits(1 << 16) * 64.0, "{value:e} is off by {worst:e}");
            }
        }
    }

    #[test]
    fn a_weight_takes_one_byte_or_half_of_one_and_a_sixteenth_for_its_scale() {
        let bytes = |width| matrix(width, &vec![0; 320 * 256 * 2], 320, 256).bytes();
        assert_eq!(bytes(QuantWidth::Int8), 320 * 256 * 17 / 16);
        assert_eq!(bytes(QuantWidth::Int4), 320 * 256 * 9 / 16);
    }
}
