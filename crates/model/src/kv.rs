//! The paged KV cache: keys and values of every layer in blocks of a fixed number of tokens, handed out to sequences.

use sirocco_compute::{AttentionShape, BLOCK_TOKENS, KvBlocks, store_kv};
use sirocco_types::{LayerId, ModelSpec};

/// The cache of one model. Its memory is reserved at once and touched as it is used.
#[derive(Debug)]
pub struct KvCache {
    shape: AttentionShape,
    layers: Vec<LayerCache>,
    /// Blocks nobody uses.
    free: Vec<u32>,
    blocks: usize,
}

#[derive(Debug)]
struct LayerCache {
    keys: Vec<f32>,
    values: Vec<f32>,
}

/// The blocks of one sequence, by position. Goes back with [`KvCache::release`].
#[derive(Debug)]
pub struct BlockTable {
    pub(crate) blocks: Vec<u32>,
}

/// The cache has too few free blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{needed} blocks of KV cache are needed, {free} are free")]
pub struct KvExhausted {
    needed: usize,
    free: usize,
}

impl KvCache {
    /// Tokens in one block.
    pub const BLOCK_TOKENS: usize = BLOCK_TOKENS;

    /// A cache of `blocks` blocks.
    pub fn new(spec: &ModelSpec, blocks: usize) -> Self {
        let shape = attention_shape(spec);
        let layer = || {
            let zeros = || vec![0.0; blocks * shape.block_len()];
            LayerCache { keys: zeros(), values: zeros() }
        };
        Self {
            shape,
            layers: (0..spec.num_hidden_layers).map(|_| layer()).collect(),
            free: (0..blocks as u32).rev().collect(),
            blocks,
        }
    }

    /// Memory one block takes, over all layers.
    pub fn block_bytes(spec: &ModelSpec) -> usize {
        2 * spec.num_hidden_layers * attention_shape(spec).block_len() * size_of::<f32>()
    }

    /// Blocks in all.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Takes blocks for a sequence of up to `tokens`.
    pub fn allocate(&mut self, tokens: usize) -> Result<BlockTable, KvExhausted> {
        let needed = tokens.div_ceil(BLOCK_TOKENS);
        let Some(start) = self.free.len().checked_sub(needed) else {
            return Err(KvExhausted { needed, free: self.free.len() });
        };
        Ok(BlockTable { blocks: self.free.split_off(start) })
    }

    /// Takes a sequence's blocks back.
    pub fn release(&mut self, table: BlockTable) {
        self.free.extend(table.blocks);
    }

    pub(crate) fn shape(&self) -> &AttentionShape {
        &self.shape
    }

    /// Stores the key and value of one position, `[kv_heads, head_dim]` each.
    pub(crate) fn store(&mut self, layer: LayerId, table: &BlockTable, position: usize, key: &[f32], value: &[f32]) {
        let len = self.shape.block_len();
        let start = table.blocks[position / BLOCK_TOKENS] as usize * len;
        let LayerCache { keys, values } = &mut self.layers[layer.index()];
        let block = (&mut keys[start..][..len], &mut values[start..][..len]);
        store_kv(&self.shape, block, position % BLOCK_TOKENS, (key, value));
    }

    pub(crate) fn layer(&self, layer: LayerId) -> KvBlocks<'_> {
        let LayerCache { keys, values } = &self.layers[layer.index()];
        KvBlocks { keys, values }
    }
}

fn attention_shape(spec: &ModelSpec) -> AttentionShape {
    AttentionShape {
        heads: spec.num_attention_heads,
        kv_heads: spec.num_key_value_heads,
        head_dim: spec.head_dim,
        window: spec.sliding_window,
    }
}
