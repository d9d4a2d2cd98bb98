//! The paged KV cache: keys and values of every layer in blocks of a fixed number of tokens. Who holds which block is decided
//! elsewhere.

use sirocco_compute::{AttentionShape, BLOCK_TOKENS, KvBlocks, store_kv};
use sirocco_types::{LayerId, ModelSpec};

/// The cache of one model. Its memory is reserved at once and touched as it is used.
#[derive(Debug)]
pub struct KvCache {
    shape: AttentionShape,
    layers: Vec<LayerCache>,
}

#[derive(Debug)]
struct LayerCache {
    keys: Vec<f32>,
    values: Vec<f32>,
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
        Self { shape, layers: (0..spec.num_hidden_layers).map(|_| layer()).collect() }
    }

    /// Memory one block takes, over all layers.
    pub fn block_bytes(spec: &ModelSpec) -> usize {
        2 * spec.num_hidden_layers * attention_shape(spec).block_len() * size_of::<f32>()
    }

    /// Copies all that block `from` holds to block `to`.
    pub fn copy(&mut self, from: u32, to: u32) {
        let len = self.shape.block_len();
        let (from, to) = (from as usize * len, to as usize * len);
        for LayerCache { keys, values } in &mut self.layers {
            keys.copy_within(from..from + len, to);
            values.copy_within(from..from + len, to);
        }
    }

    pub(crate) fn shape(&self) -> &AttentionShape {
        &self.shape
    }

    /// Stores the key and value of one position, `[kv_heads, head_dim]` each, of a sequence whose blocks are `table`.
    pub(crate) fn store(&mut self, layer: LayerId, table: &[u32], position: usize, key: &[f32], value: &[f32]) {
        let len = self.shape.block_len();
        let start = table[position / BLOCK_TOKENS] as usize * len;
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
