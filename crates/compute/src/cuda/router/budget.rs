//! Where a router's weights, KV cache and workspace lie in one piece of a GPU's memory, and how much of it they take. Plain code; never
//! touches a device.

use sirocco_types::{LayerId, ModelSpec};

use super::attention::{self, Heads};
use super::draws::{self, DRAWN};
use crate::cuda::error::DeviceError;
use crate::cuda::layout::{Matrix, TILE, row_bytes};
use crate::cuda::plan::{FEW_ROWS, ITEM, MANY_ROWS};
use crate::router::{KvBlocks, LANES, RouterLimits, RouterMatrix, RouterVector, attention_shape};
use crate::{AttentionShape, BLOCK_TOKENS};

/// What every part begins at a multiple of, bytes.
const ALIGNED: usize = 256;

/// Records that a lane has room for, bytes, when those of one tile do not take more.
const RECORD_BYTES: usize = 64 << 20;

/// Most rows whose logits are computed at once.
const LOGIT_ROWS: usize = MANY_ROWS;

/// Most blocks of threads side by side in a grid's second direction.
const GRID_Y: usize = 65_535;

/// A model's shapes as kernels see them.
#[derive(Clone, Debug)]
pub(super) struct Shapes {
    pub(super) hidden: usize,
    pub(super) heads: Heads,
    /// Of a layer: queries, keys and values in one.
    pub(super) qkv: Matrix,
    pub(super) o: Matrix,
    pub(super) gate: Matrix,
    /// The embedding and the output projection.
    pub(super) vocab: Matrix,
    pub(super) top_k: usize,
    pub(super) layers: usize,
    pub(super) tied: bool,
}

impl Shapes {
    pub(super) fn new(spec: &ModelSpec) -> Self {
        let shape = attention_shape(spec);
        let AttentionShape { heads, kv_heads, head_dim, .. } = shape;
        // Each of the three begins with a tile of its own.
        let padded = |heads: usize| (heads * head_dim).next_multiple_of(TILE);
        let (k_at, v_at) = (padded(heads), padded(heads) + padded(kv_heads));
        let width = v_at + padded(kv_heads);
        let hidden = spec.hidden_size;
        Self {
            hidden,
            heads: Heads { shape, k_at, v_at, width },
            qkv: Matrix::new(width, hidden),
            o: Matrix::new(hidden, heads * head_dim),
            gate: Matrix::new(spec.num_local_experts, hidden),
            vocab: Matrix::new(spec.vocab_size, hidden),
            top_k: spec.num_experts_per_tok,
            layers: spec.num_hidden_layers,
            tied: spec.tie_word_embeddings,
        }
    }

    /// Bytes of a layer's part of a block of the KV cache.
    pub(super) fn layer_block_bytes(&self) -> usize {
        self.heads.shape.kv_heads * 2 * BLOCK_TOKENS * self.heads.quads() * 16
    }

    /// Bytes of a block of the KV cache over all layers.
    pub(super) fn block_bytes(&self) -> usize {
        self.layers * self.layer_block_bytes()
    }
}

/// Refuses shapes that the kernels do not know.
pub(super) fn check(device: &str, spec: &ModelSpec) -> Result<(), DeviceError> {
    let limits = [("head_dim", spec.head_dim, 256), ("vocab_size", spec.vocab_size, GRID_Y * TILE)];
    match limits.into_iter().find(|(_, value, limit)| value > limit) {
        Some((field, value, limit)) => Err(DeviceError::Shape { device: device.to_owned(), field, value, limit }),
        None => Ok(()),
    }
}

/// Takes parts of a piece of memory one after the other.
#[derive(Clone, Copy, Debug, Default)]
struct Taken(usize);

impl Taken {
    fn take(&mut self, bytes: usize) -> usize {
        let at = self.0;
        self.0 = (at + bytes).next_multiple_of(ALIGNED);
        at
    }
}

/// Where weights lie, in bytes from the start.
#[derive(Clone, Debug)]
pub(super) struct Weights {
    pub(super) embedding: usize,
    pub(super) lm_head: usize,
    pub(super) norm: usize,
    /// Of the first layer: both norms, then the matrices. The others follow, `layer_bytes` apart.
    attention_norm: usize,
    qkv: usize,
    o: usize,
    experts_norm: usize,
    gate: usize,
    layer_bytes: usize,
    /// Where K and V begin in `qkv`.
    k: usize,
    v: usize,
    pub(super) bytes: usize,
}

impl Weights {
    pub(super) fn new(shapes: &Shapes) -> Self {
        let mut taken = Taken::default();
        let embedding = taken.take(shapes.vocab.bf16_bytes());
        let lm_head = if shapes.tied { embedding } else { taken.take(shapes.vocab.bf16_bytes()) };
        let norm = taken.take(shapes.hidden * 4);
        let first = taken.0;
        let attention_norm = taken.take(shapes.hidden * 4);
        let qkv = taken.take(shapes.qkv.bf16_bytes());
        let o = taken.take(shapes.o.bf16_bytes());
        let experts_norm = taken.take(shapes.hidden * 4);
        let gate = taken.take(shapes.gate.bf16_bytes());
        let layer_bytes = taken.0 - first;
        let tile = |at: usize| at / TILE * shapes.qkv.bf16_tile_bytes();
        let (k, v) = (tile(shapes.heads.k_at), tile(shapes.heads.v_at));
        let bytes = first + shapes.layers * layer_bytes;
        Self { embedding, lm_head, norm, attention_norm, qkv, o, experts_norm, gate, layer_bytes, k, v, bytes }
    }

    fn of(&self, at: usize, layer: LayerId) -> usize {
        at + layer.index() * self.layer_bytes
    }

    /// Where the queries', keys' and values' matrix of a layer lies.
    pub(super) fn qkv(&self, layer: LayerId) -> usize {
        self.of(self.qkv, layer)
    }

    /// Where a matrix lies.
    pub(super) fn matrix(&self, matrix: RouterMatrix) -> usize {
        match matrix {
            RouterMatrix::Embedding => self.embedding,
            RouterMatrix::LmHead => self.lm_head,
            RouterMatrix::Q(layer) => self.qkv(layer),
            RouterMatrix::K(layer) => self.qkv(layer) + self.k,
            RouterMatrix::V(layer) => self.qkv(layer) + self.v,
            RouterMatrix::O(layer) => self.of(self.o, layer),
            RouterMatrix::Gate(layer) => self.of(self.gate, layer),
        }
    }

    /// Where a vector lies.
    pub(super) fn vector(&self, vector: RouterVector) -> usize {
        match vector {
            RouterVector::AttentionNorm(layer) => self.of(self.attention_norm, layer),
            RouterVector::ExpertsNorm(layer) => self.of(self.experts_norm, layer),
            RouterVector::Norm => self.norm,
        }
    }
}

/// Where a lane's buffers lie, in bytes from the start of its workspace.
#[derive(Clone, Copy, Debug)]
pub(super) struct Workspace {
    /// Most of a batch.
    pub(super) tokens: usize,
    /// The residual stream, `[tokens, hidden]` f32.
    pub(super) hidden: usize,
    /// What the next matrix multiplies, `[tokens, row_bytes(hidden)]`.
    pub(super) x: usize,
    /// `[tokens, heads.width]` f32.
    pub(super) qkv: usize,
    /// `[tokens, row_bytes(heads * head_dim)]`
    pub(super) attended: usize,
    /// What is added to the residual stream, `[tokens, hidden]` f32.
    pub(super) addend: usize,
    /// `[tokens, experts]` f32.
    pub(super) gate: usize,
    /// What goes out: `[tokens, hidden]` f32, then `[tokens, top_k]` u32, then `[tokens, top_k]` f32.
    pub(super) out: usize,
    /// `[logit_rows, vocab]` f32.
    pub(super) logits: usize,
    /// Rows whose logits are computed at once.
    pub(super) logit_rows: usize,
    /// What was drawn, `[tokens]`, each of [`DRAWN`] bytes.
    pub(super) drawn: usize,
    /// Of attention's chunks; when all is attended, `[logit_rows, vocab]` f32.
    pub(super) records: usize,
    /// How many.
    pub(super) record_room: usize,
    /// What comes in with a batch.
    pub(super) step: usize,
    pub(super) step_bytes: usize,
    /// What comes in with a wish for logits or draws.
    pub(super) ask: usize,
    pub(super) ask_bytes: usize,
    pub(super) bytes: usize,
    /// Most that is copied to the device at once, and from it.
    pub(super) in_bytes: usize,
    pub(super) out_bytes: usize,
}

impl Workspace {
    /// For batches of `tokens` in up to `sequences` sequences of up to `longest` tokens.
    pub(super) fn new(shapes: &Shapes, tokens: usize, sequences: usize, longest: usize) -> Self {
        let Shapes { hidden, heads, top_k, .. } = shapes;
        let AttentionShape { heads: q_heads, head_dim, .. } = heads.shape;
        let logit_rows = LOGIT_ROWS.min(tokens);
        let logits = logit_rows * shapes.vocab.outputs as usize * 4;
        let out_bytes = tokens * (hidden * 4 + top_k * 8);
        let record_bytes = RECORD_BYTES.max(heads.tile_record_bytes(longest)).max(logits);
        let step_bytes = step_bytes(shapes, tokens, sequences, longest);
        let ask_bytes = draws::ask_bytes(logit_rows, shapes.vocab.outputs as usize);
        let mut taken = Taken::default();
        let mut workspace = Self {
            tokens,
            hidden: taken.take(tokens * hidden * 4),
            x: taken.take(tokens * row_bytes(*hidden)),
            qkv: taken.take(tokens * heads.width * 4),
            attended: taken.take(tokens * row_bytes(q_heads * head_dim)),
            addend: taken.take(tokens * hidden * 4),
            gate: taken.take(tokens * shapes.gate.outputs as usize * 4),
            out: taken.take(out_bytes),
            logits: taken.take(logits),
            logit_rows,
            drawn: taken.take(tokens * DRAWN),
            records: taken.take(record_bytes),
            record_room: record_bytes / heads.record_bytes(),
            step: taken.take(step_bytes),
            step_bytes,
            ask: taken.take(ask_bytes),
            ask_bytes,
            bytes: 0,
            // Weights come by the tile, too.
            in_bytes: step_bytes
                .max(ask_bytes)
                .max(tokens * hidden * 4)
                .max(shapes.qkv.bf16_tile_bytes())
                .max(shapes.o.bf16_tile_bytes()),
            out_bytes: out_bytes.max(logits).max(tokens * DRAWN).max(sequences * 4),
        };
        workspace.bytes = taken.0;
        workspace
    }
}

/// What parts of a step begin at a multiple of, bytes.
pub(super) const STEP_ALIGNED: usize = 16;

/// Most bytes that come in with a batch: see `step.rs`.
fn step_bytes(shapes: &Shapes, tokens: usize, sequences: usize, longest: usize) -> usize {
    let half = shapes.heads.shape.head_dim / 2;
    let (tiles, tasks, rows) = attention::most(&shapes.heads, tokens, sequences, longest);
    let parts = [
        tokens * 4,
        tokens * 4,
        tokens * 4,
        sequences * 4,
        tokens * half * 8,
        sequences * longest.div_ceil(BLOCK_TOKENS) * 4,
        tiles * 32,
        tasks * 8,
        rows * 4,
        tokens.div_ceil(MANY_ROWS) * ITEM,
        tokens.div_ceil(FEW_ROWS) * ITEM,
    ];
    parts.into_iter().map(|part| part.next_multiple_of(STEP_ALIGNED)).sum()
}

/// Where everything lies.
#[derive(Clone, Debug)]
pub(super) struct Budget {
    pub(super) weights: Weights,
    /// Where the KV cache begins: `[layers, blocks, layer_block_bytes]`
    pub(super) cache: usize,
    pub(super) kv_blocks: usize,
    /// Where the lanes' workspaces begin.
    pub(super) lanes: [usize; LANES],
    pub(super) workspace: Workspace,
    /// Of all.
    pub(super) bytes: usize,
}

impl Budget {
    /// What a router takes that has room for `limits`, of `free` bytes of a device.
    ///
    /// Errors when it does not fit: the numbers of a [`DeviceError::NoRoom`].
    pub(super) fn new(shapes: &Shapes, spec: &ModelSpec, limits: RouterLimits, free: usize) -> Result<Self, NoRoom> {
        let weights = Weights::new(shapes);
        let block = shapes.block_bytes();
        let most = match limits.kv_blocks {
            KvBlocks::Exactly(blocks) => blocks,
            KvBlocks::AsFit { most } => most.min(free / block).max(1),
        };
        let longest = spec.max_position_embeddings.min(most * BLOCK_TOKENS);
        let tokens = limits.step_tokens.max(1);
        let sequences = limits.step_sequences.clamp(1, tokens);
        let workspace = Workspace::new(shapes, tokens, sequences, longest);
        let fixed = weights.bytes + LANES * workspace.bytes + ALIGNED;
        let kv_blocks = match limits.kv_blocks {
            KvBlocks::Exactly(blocks) => blocks,
            KvBlocks::AsFit { .. } => most.min(free.saturating_sub(fixed) / block).max(1),
        };
        let mut taken = Taken(weights.bytes);
        let cache = taken.take(kv_blocks * block);
        let lanes = std::array::from_fn(|_| taken.take(workspace.bytes));
        if taken.0 > free {
            return Err(NoRoom {
                weights: weights.bytes,
                cache: kv_blocks * block,
                workspace: LANES * workspace.bytes,
            });
        }
        Ok(Self { weights, cache, kv_blocks, lanes, workspace, bytes: taken.0 })
    }
}

/// What does not fit, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NoRoom {
    pub(super) weights: usize,
    pub(super) cache: usize,
    pub(super) workspace: usize,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::router::tests::spec;
    use crate::kv_block_bytes;

    fn mixtral() -> ModelSpec {
        ModelSpec {
            hidden_size: 4096,
            intermediate_size: 14_336,
            num_hidden_layers: 32,
            num_attention_heads: 32,
            num_key_value_heads: 8,
            head_dim: 128,
            vocab_size: 32_000,
            max_position_embeddings: 32_768,
            ..spec()
        }
    }

    fn budget(spec: &ModelSpec, kv_blocks: KvBlocks, free: usize) -> Result<Budget, NoRoom> {
        let limits = RouterLimits { step_tokens: 512, step_sequences: 64, kv_blocks };
        Budget::new(&Shapes::new(spec), spec, limits, free)
    }

    #[test]
    fn mixtral_8x7b_takes_what_its_parts_take() {
        let spec = mixtral();
        let shapes = Shapes::new(&spec);
        // Of a gate's tile half is padding.
        let layer = 2 * (4096 * (6144 + 4096 + 16) + 2 * 2 * 4096);
        assert_eq!(Weights::new(&shapes).bytes, 2 * 2 * 32_000 * 4096 + 4 * 4096 + 32 * layer);
        assert_eq!(shapes.block_bytes(), 8 << 20);
        assert_eq!(shapes.block_bytes(), kv_block_bytes(&spec));
        let budget = budget(&spec, KvBlocks::Exactly(4096), 80 << 30).unwrap();
        // 64 MiB of records, 16 MiB of logits, and what 512 tokens take.
        assert!((120..140).contains(&(budget.workspace.bytes >> 20)), "{}", budget.workspace.bytes);
        assert_eq!(budget.bytes, budget.weights.bytes + (32 << 30) + 2 * budget.workspace.bytes);
    }

    #[test]
    fn a_cache_takes_what_is_left_and_no_more_than_can_be_used() {
        let spec = mixtral();
        let free = 20 << 30;
        let left = budget(&spec, KvBlocks::AsFit { most: 1 << 20 }, free).unwrap();
        assert!(left.bytes <= free && left.bytes + (9 << 20) > free, "{}", left.bytes);
        assert_eq!(budget(&spec, KvBlocks::AsFit { most: 77 }, free).unwrap().kv_blocks, 77);
        assert_eq!(budget(&spec, KvBlocks::Exactly(left.kv_blocks), free).unwrap().bytes, left.bytes);
        let refused = budget(&spec, KvBlocks::Exactly(left.kv_blocks + 2), free).unwrap_err();
        assert_eq!(refused.weights, left.weights.bytes);
        assert_eq!(refused.cache, (left.kv_blocks + 2) << 23);
        assert_eq!(refused.workspace, 2 * left.workspace.bytes);
        assert!(budget(&spec, KvBlocks::AsFit { most: 1 << 20 }, 3 << 30).is_err());
    }

    #[test]
    fn parts_do_not_overlap_and_begin_where_kernels_read_them() {
        let spec = ModelSpec { tie_word_embeddings: false, ..spec() };
        let shapes = Shapes::new(&spec);
        let budget = budget(&spec, KvBlocks::Exactly(7), 1 << 30).unwrap();
        let mut parts: Vec<(usize, usize)> = RouterMatrix::all(&spec)
            .map(|matrix| {
                let (outputs, inputs) = matrix.shape(&spec);
                (budget.weights.matrix(matrix), Matrix::new(outputs, inputs).bf16_bytes())
            })
            .collect();
        parts.extend(RouterVector::all(&spec).map(|vector| (budget.weights.vector(vector), spec.hidden_size * 4)));
        parts.push((budget.cache, 7 * shapes.block_bytes()));
        parts.extend(budget.lanes.map(|lane| (lane, budget.workspace.bytes)));
        parts.sort_unstable();
        for pair in parts.windows(2) {
            assert!(pair[0].0 + pair[0].1 <= pair[1].0 && pair[1].0 % 16 == 0, "{pair:?}");
        }
        let (last, bytes) = parts.last().unwrap();
        assert_eq!(last + bytes, budget.bytes);
    }

    #[test]
    fn shapes_that_no_kernel_knows_are_refused_by_name() {
        let error = check("cuda:0", &ModelSpec { head_dim: 512, ..spec() }).unwrap_err();
        assert_eq!(error.to_string(), "cuda:0: head_dim is 512, more than the 256 that kernels are made for");
        assert_eq!(check("cuda:0", &mixtral()), Ok(()));
    }
}
