//! Weights as the kernels of `ffn.cu` read them: those of experts, and a router's matrices.
//!
//! A matrix is tiles of 16 outputs, one after the other; of the gate and of the other half in turn, so that both halves of an
//! output are computed by the same thread. A tile is blocks of 64 inputs, in which each lane of a warp finds its part of four tensor
//! core steps in 16 bytes for bf16 and int8, and in 8 for int4, beside those of the other lanes: a warp reads whole lines, and
//! nothing is rearranged on the way to a tensor core. Lane `4 * i + j` has outputs `i` and `i + 8` and, of each 32 inputs, those from
//! `8 * j` on, so that its part of a row of activations is 16 bytes too. What pads a matrix is zero.
//!
//! Quantised weights are the CPU's, bit for bit: stored unsigned, groups of 32 inputs, a bf16 scale for each. A tile's scales
//! follow all of its weights.

use sirocco_types::ExpertDtype;

use crate::ffn::ExpertMatrix;
use crate::quant::{QuantWidth, quantise};

/// Outputs of a tile.
pub(super) const TILE: usize = 16;

/// Inputs of a block, and what the widths of activations are padded to.
pub(super) const BLOCK: usize = 64;

/// bf16 that an activation is the sum of. A row is, for each block, the first of them and then the second.
const PARTS: usize = 2;

/// Bytes of a row of so many activations.
pub(super) fn row_bytes(width: usize) -> usize {
    width.next_multiple_of(BLOCK) * PARTS * 2
}

/// Writes a row of activations as kernels read them: `out` is [`row_bytes`] long, and what pads it stays as it is.
pub(super) fn write_row(values: &[f32], out: &mut [u8]) {
    for (values, out) in values.chunks(BLOCK).zip(out.chunks_exact_mut(BLOCK * PARTS * 2)) {
        let (first, second) = out.split_at_mut(BLOCK * 2);
        let parts = first.as_chunks_mut::<2>().0.iter_mut().zip(second.as_chunks_mut::<2>().0);
        for (&value, (first, second)) in values.iter().zip(parts) {
            let nearest = bf16(value);
            *first = nearest.to_le_bytes();
            *second = bf16(value - f32::from_bits(u32::from(nearest) << 16)).to_le_bytes();
        }
    }
}

/// The bits of the bf16 nearest to `value`, ties to even.
fn bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    if value.is_nan() { 0x7fc0 } else { (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16 }
}

/// Inputs of a group, which has a scale.
const GROUP: usize = 32;

/// A matrix's shape in tiles, as kernels are told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub(super) struct Matrix {
    /// Of [`BLOCK`] inputs.
    pub(super) blocks: u32,
    /// Of [`TILE`] outputs, those of both halves together.
    pub(super) tiles: u32,
    /// Outputs that are written: for the halves with padding, as the next matrix wants its inputs.
    pub(super) outputs: u32,
}

impl Matrix {
    /// `[outputs, inputs]`.
    pub(super) fn new(outputs: usize, inputs: usize) -> Self {
        Self { blocks: inputs.div_ceil(BLOCK) as u32, tiles: outputs.div_ceil(TILE) as u32, outputs: outputs as u32 }
    }

    /// Bytes of a tile of bf16.
    pub(super) fn bf16_tile_bytes(self) -> usize {
        self.blocks as usize * tile_block_bytes(ExpertDtype::Bf16)
    }

    /// Bytes of all its tiles, of bf16.
    pub(super) fn bf16_bytes(self) -> usize {
        self.tiles as usize * self.bf16_tile_bytes()
    }
}

/// Where the weights of an expert lie in its memory: gate and up, then down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) dtype: ExpertDtype,
    pub(super) hidden: usize,
    pub(super) inter: usize,
}

impl Layout {
    /// The gate and the other half: `[2 * inter, hidden]`, both halves padded.
    pub(super) fn gate_up(self) -> Matrix {
        let outputs = self.inter.next_multiple_of(BLOCK);
        Matrix {
            blocks: self.hidden.div_ceil(BLOCK) as u32,
            tiles: (2 * outputs / TILE) as u32,
            outputs: outputs as u32,
        }
    }

    /// `[hidden, inter]`.
    pub(super) fn down(self) -> Matrix {
        Matrix::new(self.hidden, self.inter)
    }

    /// Bytes of a tile.
    pub(super) fn tile_bytes(self, matrix: Matrix) -> usize {
        matrix.blocks as usize * tile_block_bytes(self.dtype)
    }

    /// Where the down matrix begins.
    pub(super) fn down_offset(self) -> usize {
        self.gate_up().tiles as usize * self.tile_bytes(self.gate_up())
    }

    /// Memory of the whole expert.
    pub(super) fn bytes(self) -> usize {
        self.down_offset() + self.down().tiles as usize * self.tile_bytes(self.down())
    }

    /// Where tile `index` of a matrix lies.
    pub(super) fn tile_offset(self, matrix: ExpertMatrix, index: usize) -> usize {
        match matrix {
            ExpertMatrix::Gate => 2 * index * self.tile_bytes(self.gate_up()),
            ExpertMatrix::Up => (2 * index + 1) * self.tile_bytes(self.gate_up()),
            ExpertMatrix::Down => self.down_offset() + index * self.tile_bytes(self.down()),
        }
    }

    /// Bytes of a tile of this one of the three matrices.
    pub(super) fn tile_bytes_of(self, matrix: ExpertMatrix) -> usize {
        self.tile_bytes(if matrix == ExpertMatrix::Down { self.down() } else { self.gate_up() })
    }

    /// Bytes of the largest tile.
    pub(super) fn largest_tile(self) -> usize {
        self.tile_bytes(self.gate_up()).max(self.tile_bytes(self.down()))
    }

    /// Packs up to [`TILE`] rows of little-endian bf16, each as wide as `matrix` has inputs, into `out`, a tile.
    pub(super) fn pack(self, matrix: ExpertMatrix, rows: &[u8], out: &mut [u8]) {
        let inputs = if matrix == ExpertMatrix::Down { self.inter } else { self.hidden };
        debug_assert_eq!(out.len(), self.tile_bytes_of(matrix));
        out.fill(0);
        for (output, row) in rows.chunks_exact(2 * inputs).enumerate() {
            match self.dtype {
                ExpertDtype::Bf16 => pack_bf16(output, row, out),
                ExpertDtype::Int8 => pack_quantised(QuantWidth::Int8, output, row, out),
                ExpertDtype::Int4 => pack_quantised(QuantWidth::Int4, output, row, out),
            }
        }
    }
}

/// Bytes of a tile's block, scales included.
pub(super) fn tile_block_bytes(dtype: ExpertDtype) -> usize {
    let (weights, scales) = block_bytes(dtype);
    weights + scales
}

/// Bytes of a tile's block: its weights, and their scales.
fn block_bytes(dtype: ExpertDtype) -> (usize, usize) {
    match dtype {
        ExpertDtype::Bf16 => (TILE * BLOCK * 2, 0),
        ExpertDtype::Int8 => (TILE * BLOCK, TILE * BLOCK / GROUP * 2),
        ExpertDtype::Int4 => (TILE * BLOCK / 2, TILE * BLOCK / GROUP * 2),
    }
}

/// The lane that has four inputs of an output, from `4 * quad` of its group on; the step of the two of the group that takes them;
/// and which of the step's four words has the first two of them. The other two are two words further.
fn place(output: usize, quad: usize) -> (usize, usize, usize) {
    (output % 8 * 4 + quad / 2, quad % 2, output / 8)
}

/// Packs up to [`TILE`] rows of little-endian bf16, `inputs` wide, into `out`, a tile of bf16.
pub(super) fn pack_bf16_tile(inputs: usize, rows: &[u8], out: &mut [u8]) {
    out.fill(0);
    rows.chunks_exact(2 * inputs).enumerate().for_each(|(output, row)| pack_bf16(output, row, out));
}

fn pack_bf16(output: usize, row: &[u8], out: &mut [u8]) {
    for (group, values) in row.chunks(2 * GROUP).enumerate() {
        for (quad, values) in values.chunks(8).enumerate() {
            let (lane, step, word) = place(output, quad);
            // [groups, 2 steps, 32 lanes, 4 words, 2 values]
            let at = ((group * 2 + step) * 32 + lane) * 16 + word * 4;
            let (first, second) = values.split_at(values.len().min(4));
            out[at..][..first.len()].copy_from_slice(first);
            out[at + 8..][..second.len()].copy_from_slice(second);
        }
    }
}

fn pack_quantised(width: QuantWidth, output: usize, row: &[u8], out: &mut [u8]) {
    let (block, scales) = block_bytes(if width == QuantWidth::Int8 { ExpertDtype::Int8 } else { ExpertDtype::Int4 });
    let blocks = out.len() / (block + scales);
    let (quants, scales) = out.split_at_mut(blocks * block);
    for (group, values) in row.chunks(2 * GROUP).enumerate() {
        let (scale, weights) = quantise(width, values);
        for (quad, weights) in weights.as_chunks::<4>().0.iter().enumerate() {
            let (lane, step, word) = place(output, quad);
            match width {
                // [groups, 32 lanes, 2 steps, 4 words, 2 weights]
                QuantWidth::Int8 => {
                    let at = (group * 32 + lane) * 16 + step * 8 + word * 2;
                    quants[at..at + 2].copy_from_slice(&weights[..2]);
                    quants[at + 4..at + 6].copy_from_slice(&weights[2..]);
                }
                // [blocks, 32 lanes, 2 groups, 2 steps, 8 nibbles]: nibble `i` is the first weight of word `i`, `i + 4` the second.
                QuantWidth::Int4 => {
                    let at = (group / 2 * 32 + lane) * 16 + group % 2 * 8 + step * 4;
                    let nibbles = &mut quants[at..at + 4];
                    for (nibble, weight) in [word, word + 4, word + 2, word + 6].into_iter().zip(weights) {
                        nibbles[nibble / 2] |= weight << (nibble % 2 * 4);
                    }
                }
            }
        }
        // [groups, 8, 2]: outputs `i` and `i + 8` in one word.
        scales[group * 32 + output % 8 * 4 + output / 8 * 2..][..2].copy_from_slice(&scale.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_is_the_nearest_ties_to_even() {
        for value in [0.0, -0.0, 1.0, -1.0, 3.4e38, f32::MAX, f32::INFINITY, f32::NEG_INFINITY, 1e-40, 0.1, -7.77] {
            assert_eq!(bf16(value), half::bf16::from_f32(value).to_bits(), "{value}");
        }
        for bits in (0..=u32::MAX).step_by(65_521) {
            let value = f32::from_bits(bits);
            let (got, want) = (half::bf16::from_bits(bf16(value)), half::bf16::from_f32(value));
            assert!(got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(), "{bits:08x}");
        }
    }

    #[test]
    fn a_row_is_nearly_what_it_was() {
        let values: Vec<f32> = (0..100).map(|i| (i as f32 * 0.7).sin() * 3.0_f32.powi(i % 9)).collect();
        let mut row = vec![0; row_bytes(100)];
        write_row(&values, &mut row);
        let read = |part: usize, i: usize| {
            let at = (i / BLOCK * PARTS + part) * BLOCK * 2 + i % BLOCK * 2;
            half::bf16::from_le_bytes([row[at], row[at + 1]]).to_f32()
        };
        for (i, &value) in values.iter().enumerate() {
            let sum = read(0, i) + read(1, i);
            assert!((sum - value).abs() <= value.abs() * 2.0_f32.powi(-16), "{sum}, not {value}");
        }
        assert!((100..128).all(|i| read(0, i) == 0.0 && read(1, i) == 0.0));
    }
}
