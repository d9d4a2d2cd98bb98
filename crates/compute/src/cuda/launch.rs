//! What a kernel is called with, as data: a stream has a GPU do it, tests have it done lane by lane on the CPU.

use super::layout::Matrix;

/// An argument of a kernel: an address, a number or a structure of numbers, from its first byte on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C, align(8))]
pub(super) struct Argument([u32; 8]);

impl Argument {
    /// A structure of so many u32.
    pub(super) fn words<const N: usize>(words: [u32; N]) -> Self {
        let mut all = [0; 8];
        all[..N].copy_from_slice(&words);
        Self(all)
    }

    /// As bytes, little-endian.
    #[cfg(test)]
    pub(super) fn bytes(self) -> impl Iterator<Item = u8> {
        self.0.into_iter().flat_map(u32::to_le_bytes)
    }
}

impl From<u64> for Argument {
    fn from(value: u64) -> Self {
        Self::words([value as u32, (value >> 32) as u32])
    }
}

impl From<u32> for Argument {
    fn from(value: u32) -> Self {
        Self::words([value])
    }
}

impl From<f32> for Argument {
    fn from(value: f32) -> Self {
        Self::words([value.to_bits()])
    }
}

impl From<Matrix> for Argument {
    fn from(Matrix { blocks, tiles, outputs }: Matrix) -> Self {
        Self::words([blocks, tiles, outputs])
    }
}

/// A kernel, by blocks of as many threads as it is made for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Launch {
    pub(super) kernel: &'static str,
    /// Blocks of threads.
    pub(super) grid: (usize, usize),
    /// Shared memory that it asks for, bytes.
    pub(super) shared: usize,
    pub(super) arguments: Vec<Argument>,
}

/// Where the items of a multiplication lie on the device.
pub(super) struct Operands {
    pub(super) items: u64,
    /// What the items' weights are counted from.
    pub(super) base: u64,
    /// Rows that are multiplied.
    pub(super) from: u64,
    /// Which row each slot has; 0 when it has its own.
    pub(super) row_of: u64,
    /// Results, a row for each slot.
    pub(super) to: u64,
    pub(super) matrix: Matrix,
    /// Of a row of `to`.
    pub(super) width: u32,
}

impl Operands {
    /// As the kernels of `ffn.cu` take them.
    pub(super) fn arguments(&self) -> [Argument; 7] {
        [
            self.items.into(),
            self.base.into(),
            self.from.into(),
            self.row_of.into(),
            self.to.into(),
            self.matrix.into(),
            self.width.into(),
        ]
    }
}
