//! The paged KV cache: keys and values of every layer in blocks of a fixed number of tokens. Who holds which block is decided
//! elsewhere.

use sirocco_compute::{AttentionShape, BLOCK_TOKENS, KvLayer};
use sirocco_types::{LayerId, ModelSpec};

/// The cache of one model. Its memory is reserved at once and touched as it is used.
#[derive(Debug)]
pub struct KvCache {
    layers: Vec<KvLayer>,
}

impl KvCache {
    /// Tokens in one block.
    pub const BLOCK_TOKENS: usize = BLOCK_TOKENS;

    /// A cache of `blocks` blocks.
    pub fn new(spec: &ModelSpec, blocks: usize) -> Self {
        Self { layers: spec.layers().map(|_| KvLayer::new(attention_shape(spec), blocks)).collect() }
    }

    /// Memory one block takes, over all layers.
    pub fn block_bytes(spec: &ModelSpec) -> usize {
        spec.num_hidden_layers * KvLayer::block_bytes(&attention_shape(spec))
    }

    /// Copies all that block `from` holds to block `to`.
    pub fn copy(&mut self, from: u32, to: u32) {
        for layer in &mut self.layers {
            layer.copy(from, to);
        }
    }

    pub(crate) fn layer(&self, layer: LayerId) -> &KvLayer {
        &self.layers[layer.index()]
    }

    /// Stores the key and value of one position, `[kv_heads, head_dim]` each, of a sequence whose blocks are `table`.
    pub(crate) fn store(&mut self, layer: LayerId, table: &[u32], position: usize, key: &[f32], value: &[f32]) {
        self.layers[layer.index()].store(table[position / BLOCK_TOKENS], position % BLOCK_TOKENS, key, value);
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
