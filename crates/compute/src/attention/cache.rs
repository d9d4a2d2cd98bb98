//! The keys and values of a layer, in blocks of [`BLOCK_TOKENS`] tokens.
//!
//! Within a block keys lie transposed, so that the lanes of a vector are different keys, and values in panels of
//! [`VALUE_PANEL`] elements, so that both are read from front to back. A block holds all heads: a query reads memory in one
//! stream when its sequence's blocks follow each other.

use std::ops::Range;

use super::{AttentionShape, BLOCK_TOKENS};
use crate::pages::{LINE, prefer_huge};

/// Elements of a value that lie together, before those of the next token.
pub(super) const VALUE_PANEL: usize = 32;

/// One layer's keys and values, in numbered blocks. Its memory is reserved at once and touched as it is used.
#[derive(Debug)]
pub struct KvLayer {
    shape: AttentionShape,
    /// `[blocks, kv_heads][padded_dim, BLOCK_TOKENS]`
    keys: Reserved,
    /// `[blocks, kv_heads, padded_dim / VALUE_PANEL][BLOCK_TOKENS, VALUE_PANEL]`, the last panel narrower where it has fewer.
    values: Reserved,
}

impl KvLayer {
    /// Memory for `blocks` blocks, all zeros.
    pub fn new(shape: AttentionShape, blocks: usize) -> Self {
        let zeros = || Reserved::new(blocks * shape.block_len());
        Self { shape, keys: zeros(), values: zeros() }
    }

    /// Bytes that a block takes.
    pub fn block_bytes(shape: &AttentionShape) -> usize {
        2 * shape.block_len() * size_of::<f32>()
    }

    /// The heads it was made for.
    pub fn shape(&self) -> &AttentionShape {
        &self.shape
    }

    /// Stores the key and the value, `[kv_heads, head_dim]` each, of the token at `slot` of a block.
    pub fn store(&mut self, block: u32, slot: usize, key: &[f32], value: &[f32]) {
        let (dim, padded) = (self.shape.head_dim, self.shape.padded_dim());
        for (head, (key, value)) in key.chunks_exact(dim).zip(value.chunks_exact(dim)).enumerate() {
            let place = self.place(block, head);
            for (k, keys) in key.iter().zip(self.keys.slice_mut(place.clone()).chunks_exact_mut(BLOCK_TOKENS)) {
                keys[slot] = *k;
            }
            let values = self.values.slice_mut(place);
            for (panel, value) in value.chunks(VALUE_PANEL).enumerate() {
                let first = panel * VALUE_PANEL;
                let width = VALUE_PANEL.min(padded - first);
                values[first * BLOCK_TOKENS + slot * width..][..value.len()].copy_from_slice(value);
            }
        }
    }

    /// Copies all that block `from` holds to block `to`.
    pub fn copy(&mut self, from: u32, to: u32) {
        let len = self.shape.block_len();
        let (from, to) = (from as usize * len, to as usize * len);
        for memory in [&mut self.keys, &mut self.values] {
            memory.slice_mut(0..from.max(to) + len).copy_within(from..from + len, to);
        }
    }

    /// The keys of a head in a block, `[padded_dim, BLOCK_TOKENS]`.
    pub(super) fn keys(&self, block: u32, head: usize) -> &[f32] {
        self.keys.slice(self.place(block, head))
    }

    /// The values of a head in a block, in panels of `[BLOCK_TOKENS, VALUE_PANEL]`.
    pub(super) fn values(&self, block: u32, head: usize) -> &[f32] {
        self.values.slice(self.place(block, head))
    }

    fn place(&self, block: u32, head: usize) -> Range<usize> {
        let len = self.shape.padded_dim() * BLOCK_TOKENS;
        let start = block as usize * self.shape.block_len() + head * len;
        start..start + len
    }
}

/// Zeros at a multiple of [`LINE`], in huge pages where the system has them; they take memory once written to.
#[derive(Debug)]
struct Reserved {
    memory: Vec<f32>,
    /// Elements before the first aligned one.
    skip: usize,
}

impl Reserved {
    fn new(len: usize) -> Self {
        let mut memory = vec![0.0; len + LINE / size_of::<f32>()];
        let start = memory.as_mut_ptr();
        // SAFETY: what was just allocated.
        unsafe { prefer_huge(start.cast(), len * size_of::<f32>()) };
        Self { skip: start.align_offset(LINE), memory }
    }

    fn slice(&self, range: Range<usize>) -> &[f32] {
        &self.memory[self.skip..][range]
    }

    fn slice_mut(&mut self, range: Range<usize>) -> &mut [f32] {
        &mut self.memory[self.skip..][range]
    }
}
