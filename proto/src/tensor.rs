//! Rows of f32 as they cross the wire: raw little-endian bytes with shape and checksum, taken from and handed to memory
//! without an encoding step.

use std::ops::Range;

use bytes::Bytes;
use crc_fast::crc32_iscsi;

use crate::wire::expert::{Dtype, Tensor};

/// A matrix `[rows, width]` of f32, cheap to clone.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rows {
    width: usize,
    /// `[rows, width]` little-endian f32.
    data: Bytes,
}

/// Lends a vector's memory to [`Bytes`].
struct Owner(Vec<f32>);

impl AsRef<[u8]> for Owner {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

/// A tensor that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RowsError {
    /// It is not what the receiver computes with.
    #[error("dtype {0}, must be DTYPE_F32")]
    Dtype(String),
    /// It is not a matrix.
    #[error("shape {0:?}, must be [rows, width]")]
    Shape(Vec<u32>),
    /// Shape and data disagree.
    #[error("{actual} bytes of data for shape {shape:?}, which takes {expected}")]
    Length {
        /// As sent.
        shape: Vec<u32>,
        /// What the shape takes.
        expected: u64,
        /// What came.
        actual: usize,
    },
    /// The data changed on the way.
    #[error("checksum {actual:08x} of the data, must be {expected:08x}")]
    Corrupt {
        /// As sent.
        expected: u32,
        /// Of what came.
        actual: u32,
    },
}

impl Rows {
    /// Takes over `data`, `[rows, width]`, without a copy.
    pub fn new(data: Vec<f32>, width: usize) -> Self {
        debug_assert!(width > 0 && data.len().is_multiple_of(width));
        Self { width, data: Bytes::from_owner(Owner(data)) }
    }

    /// Columns.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.data.len().checked_div(self.width * size_of::<f32>()).unwrap_or(0)
    }

    /// Whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.data.is_empty()
    }

    /// Copies row `row` to the end of `out`. Panics when there is no such row.
    pub fn append_row(&self, row: usize, out: &mut Vec<f32>) {
        self.append_rows(row..row + 1, out);
    }

    /// Copies row `row` to `out`, `[width]`. Panics when there is no such row.
    pub fn copy_row(&self, row: usize, out: &mut [f32]) {
        let row_bytes = self.width * size_of::<f32>();
        let (values, _) = self.data[row * row_bytes..][..row_bytes].as_chunks::<4>();
        for (out, value) in out.iter_mut().zip(values) {
            *out = f32::from_le_bytes(*value);
        }
    }

    /// Copies `rows` to the end of `out`. Panics when there are no such rows.
    pub fn append_rows(&self, rows: Range<usize>, out: &mut Vec<f32>) {
        let row_bytes = self.width * size_of::<f32>();
        let bytes = &self.data[rows.start * row_bytes..rows.end * row_bytes];
        let (values, _) = bytes.as_chunks::<4>();
        out.extend(values.iter().map(|&value| f32::from_le_bytes(value)));
    }

    /// As it crosses the wire. Computes the checksum.
    pub(crate) fn into_wire(self) -> Tensor {
        Tensor {
            dtype: Dtype::F32.into(),
            shape: vec![self.len() as u32, self.width as u32],
            crc32c: crc32_iscsi(&self.data),
            data: self.data,
        }
    }

    /// Checks dtype, shape, length and checksum. Shares the message's memory.
    pub(crate) fn from_wire(tensor: Tensor) -> Result<Self, RowsError> {
        if tensor.dtype() != Dtype::F32 {
            return Err(RowsError::Dtype(tensor.dtype().as_str_name().to_owned()));
        }
        let &[rows, width] = tensor.shape.as_slice() else {
            return Err(RowsError::Shape(tensor.shape));
        };
        let expected = u64::from(rows).checked_mul(u64::from(width) * size_of::<f32>() as u64);
        if expected != Some(tensor.data.len() as u64) || width == 0 {
            return Err(RowsError::Length {
                shape: tensor.shape,
                expected: expected.unwrap_or(u64::MAX),
                actual: tensor.data.len(),
            });
        }
        let actual = crc32_iscsi(&tensor.data);
        if actual != tensor.crc32c {
            return Err(RowsError::Corrupt { expected: tensor.crc32c, actual });
        }
        Ok(Self { width: width as usize, data: tensor.data })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_bit_pattern_survives_the_wire(bits in proptest::collection::vec(any::<u32>(), 1..40)) {
            let values: Vec<f32> = bits.iter().map(|&b| f32::from_bits(b)).collect();
            let rows = Rows::from_wire(Rows::new(values, 1).into_wire()).unwrap();
            let mut back = Vec::new();
            rows.append_rows(0..rows.len(), &mut back);
            prop_assert_eq!(back.iter().map(|v| v.to_bits()).collect::<Vec<_>>(), bits);
        }

        #[test]
        fn a_flipped_bit_is_noticed(byte in 0usize..32, bit in 0u8..8) {
            let mut tensor = Rows::new(vec![1.5; 8], 4).into_wire();
            let mut data = tensor.data.to_vec();
            data[byte] ^= 1 << bit;
            tensor.data = data.into();
            let noticed = matches!(Rows::from_wire(tensor), Err(RowsError::Corrupt { .. }));
            prop_assert!(noticed);
        }
    }

    #[test]
    fn a_tensor_that_is_no_matrix_of_f32_is_refused() {
        let good = || Rows::new(vec![0.0; 6], 3).into_wire();
        assert_eq!(Rows::from_wire(good()).unwrap().len(), 2);
        let bf16 = Tensor { dtype: Dtype::Bf16.into(), ..good() };
        assert!(matches!(Rows::from_wire(bf16), Err(RowsError::Dtype(_))));
        let flat = Tensor { shape: vec![6], ..good() };
        assert!(matches!(Rows::from_wire(flat), Err(RowsError::Shape(_))));
        for shape in [vec![3, 3], vec![u32::MAX, u32::MAX], vec![0, 0], vec![6, 0]] {
            let wrong = Tensor { shape, ..good() };
            assert!(matches!(Rows::from_wire(wrong), Err(RowsError::Length { .. })));
        }
    }
}
