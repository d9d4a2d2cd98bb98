//! Weight matrices in the layout the kernels read: bf16, in panels of 16 outputs.
//!
//! A panel holds, for each input, the 16 outputs' weights as eight 32-bit words: word `i` has output `i` in its lower half
//! and output `i + 8` in its upper half. One 32-byte load thus gives two vectors of f32: a shift yields the lower outputs, a
//! mask the upper ones. The last panel is padded with zeros.

/// Outputs per panel.
pub(crate) const PANEL: usize = 16;

/// 32-bit words per input of a panel.
pub(crate) const WORDS: usize = PANEL / 2;

/// A matrix `[outputs, inputs]` of bf16, packed.
#[derive(Debug)]
pub struct PackedMatrix {
    outputs: usize,
    inputs: usize,
    /// `[panels, inputs, WORDS]`
    words: Vec<u32>,
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
        self.inputs
    }

    /// Memory the weights take, padding included.
    pub fn bytes(&self) -> usize {
        self.words.capacity() * size_of::<u32>()
    }

    pub(crate) fn panels(&self) -> usize {
        self.outputs.div_ceil(PANEL)
    }

    /// `[inputs, WORDS]`
    pub(crate) fn panel(&self, index: usize) -> &[u32] {
        let len = self.inputs * WORDS;
        &self.words[index * len..][..len]
    }

    /// One row of the matrix, as f32.
    pub fn row(&self, output: usize) -> impl Iterator<Item = f32> + '_ {
        let (panel, lane) = (self.panel(output / PANEL), output % PANEL);
        panel.chunks_exact(WORDS).map(move |words| weight(words, lane))
    }
}

/// The weight of one output among the words of one input.
pub(crate) fn weight(words: &[u32], lane: usize) -> f32 {
    let word = words[lane % WORDS];
    f32::from_bits(if lane < WORDS { word << 16 } else { word & 0xffff_0000 })
}

/// Builds a [`PackedMatrix`] from rows as they are read, so that no second copy of the matrix is needed.
#[derive(Debug)]
pub struct Packer {
    matrix: PackedMatrix,
    rows: usize,
}

impl Packer {
    /// A packer for `[outputs, inputs]`.
    pub fn new(outputs: usize, inputs: usize) -> Self {
        let words = vec![0; outputs.div_ceil(PANEL) * inputs * WORDS];
        Self { matrix: PackedMatrix { outputs, inputs, words }, rows: 0 }
    }

    /// Adds whole rows of little-endian bf16. Panics when there are too many or the last is not whole.
    pub fn push_rows(&mut self, bytes: &[u8]) {
        let matrix = &mut self.matrix;
        let rows = bytes.chunks_exact(matrix.inputs * 2);
        assert!(rows.remainder().is_empty(), "rows are pushed whole");
        for row in rows {
            assert!(self.rows < matrix.outputs, "no more rows than the matrix has");
            let (panel, lane) = (self.rows / PANEL, self.rows % PANEL);
            let words = &mut matrix.words[panel * matrix.inputs * WORDS..][..matrix.inputs * WORDS];
            let shift = if lane < WORDS { 0 } else { 16 };
            for (words, value) in words.chunks_exact_mut(WORDS).zip(row.chunks_exact(2)) {
                words[lane % WORDS] |= u32::from(u16::from_le_bytes([value[0], value[1]])) << shift;
            }
            self.rows += 1;
        }
    }

    /// The matrix. Panics when rows are missing.
    pub fn finish(self) -> PackedMatrix {
        assert_eq!(self.rows, self.matrix.outputs, "every row was pushed");
        self.matrix
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    #[test]
    fn every_weight_is_found_where_it_was_put() {
        let (outputs, inputs) = (21, 5);
        let values: Vec<bf16> = (0..outputs * inputs).map(|i| bf16::from_f32(i as f32 - 50.0)).collect();
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let matrix = PackedMatrix::from_bf16(&bytes, outputs, inputs).unwrap();
        for output in 0..outputs {
            let row: Vec<f32> = values[output * inputs..][..inputs].iter().map(|v| v.to_f32()).collect();
            assert_eq!(matrix.row(output).collect::<Vec<_>>(), row);
        }
        assert!(PackedMatrix::from_bf16(&bytes[1..], outputs, inputs).is_err());
    }

    #[test]
    fn packing_takes_no_more_memory_than_the_weights_and_their_padding() {
        let matrix = PackedMatrix::from_bf16(&vec![0; 320 * 256 * 2], 320, 256).unwrap();
        assert_eq!(matrix.bytes(), 320 * 256 * 2);
    }
}
