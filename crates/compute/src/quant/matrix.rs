//! Weight matrices of 8-bit or 4-bit integers, in the layout the kernels read.
//!
//! A panel is 32 outputs. For each group of 32 inputs it holds quads: four consecutive inputs of each output in one 32-bit lane,
//! 32 lanes to a quad, as instructions that multiply and add four bytes at a time want them. Weights are stored unsigned, with
//! [`QuantWidth::offset`] added. A byte of 8 bits is one weight; with 4 bits the lower half belongs to quad `q` of the group and
//! the upper half to quad `q + 4`. The last panel and the last group are padded with weights of zero.
//!
//! Scales are bf16, rounded away from zero so that no quant exceeds its range: they have the range of the weights, and cost half
//! of f32's bytes. Word `i` of a group's scales has output `i` in its lower half and output `i + 16` in its upper half.

use super::GROUP;
use crate::wide::wide;

/// Outputs per panel. As many as inputs in a group, so that the panel of one matrix makes whole groups for the next.
pub(super) const PANEL: usize = GROUP;

/// 64 bytes that start where a cache line does.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(super) struct Line(pub(super) [u32; LANES]);

/// 32-bit lanes of a [`Line`].
pub(super) const LANES: usize = 16;

/// Bits of a quantised weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QuantWidth {
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

    /// Lines that a group of a panel takes.
    pub(super) fn lines(self) -> usize {
        match self {
            Self::Int8 => 16,
            Self::Int4 => 8,
        }
    }
}

/// A matrix `[outputs, inputs]` of integers with a scale per output and group of inputs.
#[derive(Debug)]
pub struct QuantMatrix {
    pub(super) width: QuantWidth,
    outputs: usize,
    inputs: usize,
    /// `[panels, groups, width.lines()]`
    quants: Vec<Line>,
    /// `[panels, groups]`
    scales: Vec<Line>,
}

impl QuantMatrix {
    /// Rows of the matrix: elements of the result of a multiplication.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Columns of the matrix: elements of what it is multiplied with.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Memory the weights and their scales take, padding included.
    pub fn bytes(&self) -> usize {
        (self.quants.capacity() + self.scales.capacity()) * size_of::<Line>()
    }

    pub(super) fn panels(&self) -> usize {
        self.outputs.div_ceil(PANEL)
    }

    pub(super) fn groups(&self) -> usize {
        self.inputs.div_ceil(GROUP)
    }

    /// The quants and the scales of one panel: `[groups, width.lines()]` and `[groups]`.
    pub(super) fn panel(&self, index: usize) -> (&[Line], &[Line]) {
        let (groups, lines) = (self.groups(), self.width.lines());
        (&self.quants[index * groups * lines..][..groups * lines], &self.scales[index * groups..][..groups])
    }

    /// One row of the matrix, as the numbers its integers stand for.
    pub fn row(&self, output: usize) -> impl Iterator<Item = f32> + '_ {
        self.quants_and_scales(output).map(|(quant, scale)| quant as f32 * scale)
    }

    /// One row of the matrix: each weight's integer and its scale.
    pub(super) fn quants_and_scales(&self, output: usize) -> impl Iterator<Item = (i32, f32)> + '_ {
        let (quants, scales) = self.panel(output / PANEL);
        let lane = output % PANEL;
        (0..self.inputs).map(move |input| {
            let group = input / GROUP;
            let lines = &quants[group * self.width.lines()..][..self.width.lines()];
            (weight(self.width, lines, lane, input % GROUP), scale(&scales[group], lane))
        })
    }
}

/// The scale of one output of a panel.
pub(super) fn scale(scales: &Line, lane: usize) -> f32 {
    let word = scales.0[lane % LANES];
    f32::from_bits(if lane < LANES { word << 16 } else { word & 0xffff_0000 })
}

/// The weight of one output and one input of a group, the offset taken off again.
pub(super) fn weight(width: QuantWidth, lines: &[Line], lane: usize, input: usize) -> i32 {
    let quad = input / 4;
    let word = |quad: usize| lines[2 * quad + lane / LANES].0[lane % LANES];
    let byte = |word: u32| word >> (8 * (input % 4)) & 0xff;
    let stored = match width {
        QuantWidth::Int8 => byte(word(quad)),
        QuantWidth::Int4 => byte(word(quad % 4)) >> (4 * (quad / 4)) & 0xf,
    };
    stored.cast_signed() - width.offset()
}

/// Builds a [`QuantMatrix`] from rows as they are read, so that no second copy of the matrix is needed.
#[derive(Debug)]
pub struct QuantPacker {
    matrix: QuantMatrix,
    rows: usize,
}

impl QuantPacker {
    /// A packer for `[outputs, inputs]`.
    pub fn new(width: QuantWidth, outputs: usize, inputs: usize) -> Self {
        let (panels, groups) = (outputs.div_ceil(PANEL), inputs.div_ceil(GROUP));
        let zero = Line(
            [u32::from_le_bytes(
                [match width {
                    QuantWidth::Int8 => 0x80,
                    QuantWidth::Int4 => 0x88,
                }; 4],
            ); LANES],
        );
        let quants = vec![zero; panels * groups * width.lines()];
        let scales = vec![Line([0; LANES]); panels * groups];
        Self { matrix: QuantMatrix { width, outputs, inputs, quants, scales }, rows: 0 }
    }

    /// Adds whole rows of little-endian bf16. Panics when there are too many or the last is not whole.
    pub fn push_rows(&mut self, bytes: &[u8]) {
        let rows = bytes.chunks_exact(self.matrix.inputs * 2);
        assert!(rows.remainder().is_empty(), "rows are pushed whole");
        for row in rows {
            assert!(self.rows < self.matrix.outputs, "no more rows than the matrix has");
            self.push_row(row);
        }
    }

    fn push_row(&mut self, row: &[u8]) {
        let (panel, lane) = (self.rows / PANEL, self.rows % PANEL);
        let matrix = &mut self.matrix;
        let (width, groups, lines) = (matrix.width, matrix.groups(), matrix.width.lines());
        let quants = matrix.quants[panel * groups * lines..].chunks_exact_mut(lines);
        let scales = &mut matrix.scales[panel * groups..];
        for ((values, lines), scales) in row.chunks(GROUP * 2).zip(quants).zip(scales) {
            let (scale, weights) = quantise(width, values);
            let upper = 16 * (lane / LANES);
            scales.0[lane % LANES] |= u32::from(scale) << upper;
            let quads = weights.as_chunks::<4>().0.iter().map(|&quad| u32::from_le_bytes(quad));
            for (quad, word) in quads.enumerate() {
                match width {
                    QuantWidth::Int8 => lines[2 * quad + lane / LANES].0[lane % LANES] = word,
                    QuantWidth::Int4 => {
                        let (line, half) = (2 * (quad % 4) + lane / LANES, 4 * (quad / 4));
                        let stored = &mut lines[line].0[lane % LANES];
                        *stored = *stored & !(0x0f0f_0f0f << half) | word << half;
                    }
                }
            }
        }
        self.rows += 1;
    }

    /// The matrix. Panics when rows are missing.
    pub fn finish(self) -> QuantMatrix {
        assert_eq!(self.rows, self.matrix.outputs, "every row was pushed");
        self.matrix
    }
}

wide! {
    /// Quantises up to [`GROUP`] little-endian bf16 values, padded with zeros: the bits of their bf16 scale, and the weights as
    /// they are stored.
    fn quantise(width: QuantWidth, values: &[u8]) -> (u16, [u8; GROUP]) = group
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
mod tests {
    use half::bf16;

    use super::*;

    fn bytes(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect()
    }

    fn matrix(width: QuantWidth, bytes: &[u8], outputs: usize, inputs: usize) -> QuantMatrix {
        let mut packer = QuantPacker::new(width, outputs, inputs);
        packer.push_rows(bytes);
        packer.finish()
    }

    #[test]
    fn every_weight_is_found_where_it_was_put_within_half_a_step() {
        let (outputs, inputs) = (69, 75);
        let values: Vec<f32> = (0..outputs * inputs).map(|i| (i as f32 * 0.731).sin()).collect();
        for (width, half_steps) in [(QuantWidth::Int8, 127.0), (QuantWidth::Int4, 8.0)] {
            let matrix = matrix(width, &bytes(&values), outputs, inputs);
            for output in 0..outputs {
                let wanted = &values[output * inputs..][..inputs];
                let got: Vec<f32> = matrix.row(output).collect();
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
                QuantWidth::Int8 => values.iter().map(|v| if *v == -2.0 { -127.0 } else { *v * 4.0 }).collect(),
                QuantWidth::Int4 => values.clone(),
            };
            let matrix = matrix(width, &bytes(&scaled), 2, 32);
            for output in 0..2 {
                assert_eq!(matrix.row(output).collect::<Vec<_>>(), scaled[output * 32..][..32]);
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
                let row: Vec<f32> = matrix.row(0).collect();
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
                let worst = matrix.row(0).map(|got| (got / 2.0 - value / 2.0).abs()).fold(0.0, f32::max);
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
