//! Weight matrices in the layout the kernels read: bf16, in panels of 32 outputs.
//!
//! A panel holds, for each input, the 32 outputs' weights as one cache line of 16 words: word `i` has output `i` in its lower
//! half and output `i + 16` in its upper half. One load thus gives two vectors of f32: a shift yields the lower outputs, a mask
//! the upper ones. Panels lie one after the other, so reading a matrix is one stream. The last panel is padded with zeros.

use crate::pages::Pages;

/// Outputs per panel.
pub(crate) const PANEL: usize = 32;

/// 32-bit words per input of a panel.
pub(crate) const WORDS: usize = PANEL / 2;

/// Panels of weights, `[count, inputs, WORDS]`.
#[derive(Debug)]
pub(crate) struct Panels {
    inputs: usize,
    words: Pages,
}

impl Panels {
    /// `count` panels of zeros.
    pub(crate) fn zeroed(count: usize, inputs: usize) -> Self {
        Self { inputs, words: Pages::zeroed(count * inputs * WORDS) }
    }

    pub(crate) fn count(&self) -> usize {
        self.words.len() / (self.inputs * WORDS)
    }

    pub(crate) fn inputs(&self) -> usize {
        self.inputs
    }

    pub(crate) fn bytes(&self) -> usize {
        self.words.len() * size_of::<u32>()
    }

    /// `count` panels from `first` on, `[count, inputs, WORDS]`.
    pub(crate) fn range(&self, first: usize, count: usize) -> &[u32] {
        let len = self.inputs * WORDS;
        &self.words[first * len..][..count * len]
    }

    /// Fills panel `index` with up to [`PANEL`] rows of little-endian bf16.
    pub(crate) fn fill(&mut self, index: usize, rows: &[u8]) {
        /// Inputs at a time: their part of a row is a cache line, and their words fit the nearest cache.
        const TILE: usize = 32;
        let len = self.inputs * WORDS;
        let panel = &mut self.words[index * len..][..len];
        let row = |output: usize| rows.chunks_exact(self.inputs * 2).nth(output).unwrap_or_default().as_chunks::<2>().0;
        let pairs: [_; WORDS] = std::array::from_fn(|word| (row(word), row(word + WORDS)));
        for (tile, words) in panel.chunks_mut(TILE * WORDS).enumerate() {
            let part = |row: &'_ [[u8; 2]]| {
                row.chunks(TILE).nth(tile).map_or([[0; 2]; TILE], |part| {
                    let mut values = [[0; 2]; TILE];
                    values[..part.len()].copy_from_slice(part);
                    values
                })
            };
            for (word, (low, high)) in pairs.iter().enumerate() {
                let (low, high) = (part(low), part(high));
                for ((words, low), high) in words.as_chunks_mut::<WORDS>().0.iter_mut().zip(low).zip(high) {
                    words[word] = u32::from(u16::from_le_bytes(low)) | u32::from(u16::from_le_bytes(high)) << 16;
                }
            }
        }
    }
}

/// A matrix `[outputs, inputs]` of bf16, packed.
#[derive(Debug)]
pub struct PackedMatrix {
    outputs: usize,
    panels: Panels,
}

/// Data of another length than its shape takes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{actual} bytes for a bf16 matrix of {outputs} by {inputs}, which takes {expected}")]
pub struct ShapeMismatch {
    outputs: usize,
    inputs: usize,
    expected: usize,
    actual: usize,
}

impl PackedMatrix {
    /// Packs `bytes`, `[outputs, inputs]` little-endian bf16. Errors when their number does not fit.
    pub fn from_bf16(bytes: &[u8], outputs: usize, inputs: usize) -> Result<Self, ShapeMismatch> {
        let expected = outputs * inputs * 2;
        if bytes.len() != expected {
            return Err(ShapeMismatch { outputs, inputs, expected, actual: bytes.len() });
        }
        let mut packer = Packer::new(outputs, inputs);
        packer.push_rows(bytes);
        Ok(packer.finish())
    }

    /// Rows of the matrix: elements of the result of a multiplication.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Columns of the matrix: elements of what it is multiplied with.
    pub fn inputs(&self) -> usize {
        self.panels.inputs()
    }

    /// Memory the weights take, padding included.
    pub fn bytes(&self) -> usize {
        self.panels.bytes()
    }

    pub(crate) fn panels(&self) -> &Panels {
        &self.panels
    }

    /// One row of the matrix, as f32.
    pub fn row(&self, output: usize) -> impl Iterator<Item = f32> + '_ {
        let (panel, lane) = (self.panels.range(output / PANEL, 1), output % PANEL);
        panel.chunks_exact(WORDS).map(move |words| {
            let word = words[lane % WORDS];
            f32::from_bits(if lane < WORDS { word << 16 } else { word & 0xffff_0000 })
        })
    }
}

/// Builds a [`PackedMatrix`] from rows as they are read, so that no second copy of the matrix is needed.
#[derive(Debug)]
pub struct Packer {
    matrix: PackedMatrix,
    rows: usize,
}

impl Packer {
    /// Rows are pushed in multiples of this many, but for the last push.
    pub const ROWS: usize = PANEL;

    /// A packer for `[outputs, inputs]`.
    pub fn new(outputs: usize, inputs: usize) -> Self {
        let panels = Panels::zeroed(outputs.div_ceil(PANEL), inputs);
        Self { matrix: PackedMatrix { outputs, panels }, rows: 0 }
    }

    /// Adds rows of little-endian bf16: a multiple of [`Packer::ROWS`], or all that are missing. Panics when it is neither.
    pub fn push_rows(&mut self, bytes: &[u8]) {
        let PackedMatrix { outputs, panels } = &mut self.matrix;
        self.rows = fill(bytes, panels.inputs(), self.rows, *outputs, |panel, rows| panels.fill(panel, rows));
    }

    /// The matrix. Panics when rows are missing.
    pub fn finish(self) -> PackedMatrix {
        assert_eq!(self.rows, self.matrix.outputs, "every row was pushed");
        self.matrix
    }
}

/// Cuts rows of a matrix, of which `done` of `outputs` came before, into panels and passes each with its index to `put`.
/// Returns how many rows are done then.
pub(crate) fn fill(
    bytes: &[u8],
    inputs: usize,
    done: usize,
    outputs: usize,
    mut put: impl FnMut(usize, &[u8]),
) -> usize {
    let row = inputs * 2;
    assert!(bytes.len().is_multiple_of(row), "rows are pushed whole");
    let after = done + bytes.len() / row;
    assert!(after == outputs || after < outputs && after.is_multiple_of(PANEL), "panels are pushed whole");
    for (panel, rows) in (done / PANEL..).zip(bytes.chunks(PANEL * row)) {
        put(panel, rows);
    }
    after
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    #[test]
    fn every_weight_is_found_where_it_was_put() {
        for (outputs, inputs) in [(1, 1), (21, 5), (32, 32), (77, 67), (130, 33)] {
            let values: Vec<bf16> = (0..outputs * inputs).map(|i| bf16::from_f32(i as f32 - 50.0)).collect();
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            let whole = PackedMatrix::from_bf16(&bytes, outputs, inputs).unwrap();
            let mut packer = Packer::new(outputs, inputs);
            bytes.chunks(2 * Packer::ROWS * inputs * 2).for_each(|rows| packer.push_rows(rows));
            let in_parts = packer.finish();
            for output in 0..outputs {
                let row: Vec<f32> = values[output * inputs..][..inputs].iter().map(|v| v.to_f32()).collect();
                assert_eq!(whole.row(output).collect::<Vec<_>>(), row);
                assert_eq!(in_parts.row(output).collect::<Vec<_>>(), row);
            }
            assert!(PackedMatrix::from_bf16(&bytes[1..], outputs, inputs).is_err());
        }
    }

    #[test]
    fn packing_takes_no_more_memory_than_the_weights_and_their_padding() {
        let matrix = PackedMatrix::from_bf16(&vec![0; 320 * 256 * 2], 320, 256).unwrap();
        assert_eq!(matrix.bytes(), 320 * 256 * 2);
    }
}
