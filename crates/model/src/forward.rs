//! The forward pass of a router node: everything but the experts.
//!
//! A step computes chunks of several sequences at once, prompts and single tokens mixed. Each row of every matrix is one
//! token and is computed alone, so a sequence's results do not depend on its batch mates or on how it was cut into chunks.
//!
//! A step may come in several batches: while one waits for its experts, another computes its attention.

use std::cell::RefCell;
use std::time::{Duration, Instant};

use sirocco_compute::{PackedMatrix, Pool, Queries, Rotary, attend, matmul, rms_norm};
use sirocco_types::{LayerId, ModelSpec, Routing};

use crate::checkpoint::{layer_tensor, load_each};
use crate::gate::route;
use crate::turns::by_turns;
use crate::{Checkpoint, CheckpointError, Experts, ExpertsError, KvCache};

/// A model without its experts.
#[derive(Debug)]
pub struct Model {
    spec: ModelSpec,
    embedding: PackedMatrix,
    layers: Vec<Layer>,
    norm: Vec<f32>,
    /// None when the embedding serves as the output projection too.
    lm_head: Option<PackedMatrix>,
    rotary: Rotary,
    pool: Pool,
}

/// A layer without its experts.
#[derive(Debug)]
struct Layer {
    attention_norm: Vec<f32>,
    q: PackedMatrix,
    k: PackedMatrix,
    v: PackedMatrix,
    o: PackedMatrix,
    experts_norm: Vec<f32>,
    gate: PackedMatrix,
}

/// A sequence's part of a step.
#[derive(Debug)]
pub struct SequenceChunk<'a> {
    /// The blocks of the KV cache that hold its keys and values, by position; enough for all up to the chunk's end.
    pub blocks: &'a [u32],
    /// Position of the chunk's first token; everything before has been computed.
    pub start: usize,
    /// The chunk's tokens, each below `vocab_size`.
    pub tokens: &'a [u32],
    /// After which of its tokens to compute logits.
    pub logits: Logits,
    /// When its sequence's time is over; none: never. A batch waits as long as its most patient chunk.
    pub until: Option<Instant>,
}

/// After which tokens of a chunk logits are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Logits {
    /// After none.
    None,
    /// After the last one.
    Last,
    /// After each.
    All,
}

/// What a step gives.
#[derive(Clone, Debug)]
pub struct StepOutput {
    /// `[vocab_size]` for each token whose logits are wanted, in order.
    pub logits: Vec<Vec<f32>>,
    /// For each layer, the experts of every token of the step, chunk after chunk.
    pub routing: Vec<Routing>,
    /// For each chunk the layer in which it came to values that are not finite, if it did; its logits say nothing then.
    pub overflows: Vec<Option<LayerId>>,
    /// Where its time went.
    pub times: StepTimes,
}

/// What a router computed of a step; the rest was waiting for experts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepTimes {
    /// Embedding, attention and gates of all layers.
    pub attention: Duration,
    /// The output projection.
    pub logits: Duration,
}

/// What became of one batch.
struct BatchOutput {
    /// `[tokens, hidden]`
    hidden: Vec<f32>,
    /// By layer.
    routing: Vec<Routing>,
    /// By chunk.
    overflows: Vec<Option<LayerId>>,
    attention: Duration,
}

/// What a batch's layers write, one after the other; kept from layer to layer.
struct Buffers {
    /// `[tokens, hidden]`
    normed: Vec<f32>,
    /// `[tokens, heads, head_dim]`
    q: Vec<f32>,
    /// `[tokens, kv_heads, head_dim]`
    k: Vec<f32>,
    /// `[tokens, kv_heads, head_dim]`
    v: Vec<f32>,
    /// `[tokens, heads, head_dim]`
    attended: Vec<f32>,
    /// `[tokens, hidden]`
    projected: Vec<f32>,
}

impl Buffers {
    fn new(spec: &ModelSpec, tokens: usize) -> Self {
        let zeros = |width: usize| vec![0.0; tokens * width];
        let (q_width, kv_width) = (spec.num_attention_heads * spec.head_dim, spec.num_key_value_heads * spec.head_dim);
        Self {
            normed: zeros(spec.hidden_size),
            q: zeros(q_width),
            k: zeros(kv_width),
            v: zeros(kv_width),
            attended: zeros(q_width),
            projected: zeros(spec.hidden_size),
        }
    }
}

impl Model {
    /// Loads everything but the experts, on as many threads as `pool` has; it is what the model computes with.
    pub fn load(checkpoint: &Checkpoint, pool: Pool) -> Result<Self, CheckpointError> {
        const OF_A_LAYER: [&str; 5] =
            ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "block_sparse_moe.gate"];
        let spec = checkpoint.spec().clone();
        let mut names = vec!["model.embed_tokens.weight".to_owned()];
        names.extend((!spec.tie_word_embeddings).then(|| "lm_head.weight".to_owned()));
        names.extend(spec.layers().flat_map(|layer| OF_A_LAYER.map(|name| layer_tensor(layer, name))));
        let mut matrices = load_each(&names, pool.threads(), |name| checkpoint.matrix(name))?.into_iter();
        let mut next = || matrices.next().expect("a matrix for each name");
        let embedding = next();
        let lm_head = (!spec.tie_word_embeddings).then(&mut next);
        let mut load_layer = |layer| {
            Ok(Layer {
                attention_norm: checkpoint.vector(&layer_tensor(layer, "input_layernorm"))?,
                q: next(),
                k: next(),
                v: next(),
                o: next(),
                experts_norm: checkpoint.vector(&layer_tensor(layer, "post_attention_layernorm"))?,
                gate: next(),
            })
        };
        Ok(Self {
            embedding,
            layers: spec.layers().map(&mut load_layer).collect::<Result<_, CheckpointError>>()?,
            norm: checkpoint.vector("model.norm.weight")?,
            lm_head,
            rotary: Rotary::new(spec.head_dim, spec.rope_theta),
            pool,
            spec,
        })
    }

    /// The model's shape.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// Memory its weights take.
    pub fn bytes(&self) -> usize {
        let layers = self.layers.iter().flat_map(|l| [&l.q, &l.k, &l.v, &l.o, &l.gate]);
        layers.chain([&self.embedding]).chain(&self.lm_head).map(PackedMatrix::bytes).sum()
    }

    /// Computes one step, which comes in one or more batches without a sequence in common, and stores its keys and values in
    /// `kv`.
    pub async fn forward(
        &self,
        batches: &[&[SequenceChunk<'_>]],
        kv: &mut KvCache,
        experts: &impl Experts,
    ) -> Result<StepOutput, ExpertsError> {
        // Each batch borrows it only while it computes, never while it waits.
        let kv = RefCell::new(kv);
        let outputs = by_turns(batches.iter().map(|chunks| self.layers(chunks, &kv, experts))).await?;
        let began = Instant::now();
        let mut step =
            StepOutput { logits: Vec::new(), routing: Vec::new(), overflows: Vec::new(), times: StepTimes::default() };
        for (chunks, output) in batches.iter().zip(outputs) {
            step.overflows.extend(&output.overflows);
            step.logits.extend(self.logits(chunks, &output.hidden));
            step.times.attention += output.attention;
            if step.routing.is_empty() {
                step.routing = output.routing;
                continue;
            }
            for (all, own) in step.routing.iter_mut().zip(output.routing) {
                all.experts.extend(own.experts);
                all.weights.extend(own.weights);
            }
        }
        step.times.logits = began.elapsed();
        Ok(step)
    }

    /// Takes one batch through all layers.
    async fn layers(
        &self,
        chunks: &[SequenceChunk<'_>],
        kv: &RefCell<&mut KvCache>,
        experts: &impl Experts,
    ) -> Result<BatchOutput, ExpertsError> {
        let mut began = Instant::now();
        let mut attention = Duration::ZERO;
        let eps = self.spec.rms_norm_eps;
        let mut hidden = Vec::new(); // [tokens, hidden]
        for token in chunks.iter().flat_map(|chunk| chunk.tokens) {
            hidden.extend(self.embedding.row(*token as usize));
        }
        let angles: Vec<_> = positions(chunks).map(|(_, position)| self.rotary.angles(position)).collect();
        let mut buffers = Buffers::new(&self.spec, angles.len());

        let until = chunks.iter().map(|chunk| chunk.until).max_by_key(|until| (until.is_none(), *until)).flatten();
        let mut overflows = vec![None; chunks.len()];

        let mut routing = Vec::with_capacity(self.layers.len());
        for (layer, id) in self.layers.iter().zip((0..).map(LayerId)) {
            rms_norm(&hidden, &layer.attention_norm, eps, &mut buffers.normed, &self.pool);
            self.attention(layer, id, chunks, &angles, &mut buffers, &mut kv.borrow_mut());
            if !add(&mut hidden, &buffers.projected) {
                contain(&mut hidden, chunks, id, &mut overflows);
            }

            rms_norm(&hidden, &layer.experts_norm, eps, &mut buffers.normed, &self.pool);
            let gate = self.multiply(&buffers.normed, &layer.gate); // [tokens, experts]
            let chosen = route(gate, self.spec.num_local_experts, self.spec.num_experts_per_tok);
            attention += began.elapsed();
            let combined = experts.forward(id, &buffers.normed, &chosen, until).await?;
            began = Instant::now();
            if !add(&mut hidden, &combined) {
                contain(&mut hidden, chunks, id, &mut overflows);
            }
            routing.push(chosen);
        }
        Ok(BatchOutput { hidden, routing, overflows, attention })
    }

    /// Stores the keys and values of `buffers.normed` and attends; leaves what comes of it in `buffers.projected`.
    fn attention(
        &self,
        layer: &Layer,
        id: LayerId,
        chunks: &[SequenceChunk<'_>],
        angles: &[Vec<(f32, f32)>],
        buffers: &mut Buffers,
        kv: &mut KvCache,
    ) {
        let Buffers { normed, q, k, v, attended, projected } = buffers;
        for (w, out) in [(&layer.q, &mut *q), (&layer.k, &mut *k), (&layer.v, &mut *v)] {
            matmul(normed, w, out, &self.pool);
        }
        Rotary::rotate(q, angles, &self.pool);
        Rotary::rotate(k, angles, &self.pool);
        let width = layer.k.outputs();
        for ((table, position), (k, v)) in positions(chunks).zip(k.chunks_exact(width).zip(v.chunks_exact(width))) {
            kv.store(id, table, position, k, v);
        }
        let queries: Vec<Queries> = chunks
            .iter()
            .map(|chunk| Queries { blocks: chunk.blocks, start: chunk.start, len: chunk.tokens.len() })
            .collect();
        attend(kv.layer(id), q, &queries, attended, &self.pool);
        matmul(attended, &layer.o, projected, &self.pool);
    }

    fn logits(&self, chunks: &[SequenceChunk<'_>], hidden: &[f32]) -> Vec<Vec<f32>> {
        let width = self.spec.hidden_size;
        let mut wanted = Vec::new(); // [wanted, hidden]
        let mut end = 0;
        for chunk in chunks {
            let start = end;
            end += chunk.tokens.len();
            let from = match chunk.logits {
                Logits::None => end,
                Logits::Last => end - 1,
                Logits::All => start,
            };
            wanted.extend_from_slice(&hidden[from * width..end * width]);
        }
        let mut normed = vec![0.0; wanted.len()];
        rms_norm(&wanted, &self.norm, self.spec.rms_norm_eps, &mut normed, &self.pool);
        let logits = self.multiply(&normed, self.lm_head.as_ref().unwrap_or(&self.embedding));
        logits.chunks_exact(self.spec.vocab_size).map(<[f32]>::to_vec).collect()
    }

    fn multiply(&self, x: &[f32], w: &PackedMatrix) -> Vec<f32> {
        let mut out = vec![0.0; x.len() / w.inputs() * w.outputs()];
        matmul(x, w, &mut out, &self.pool);
        out
    }
}

/// The blocks and the position of every token.
fn positions<'a>(chunks: &'a [SequenceChunk<'_>]) -> impl Iterator<Item = (&'a [u32], usize)> {
    chunks.iter().flat_map(|chunk| (chunk.start..).take(chunk.tokens.len()).map(|position| (chunk.blocks, position)))
}

/// Adds `residual` to `hidden`, `[tokens, hidden]`. Returns whether every sum is finite.
fn add(hidden: &mut [f32], residual: &[f32]) -> bool {
    let mut largest = 0;
    for (hidden, residual) in hidden.iter_mut().zip(residual) {
        *hidden += residual;
        largest = largest.max(hidden.abs().to_bits());
    }
    largest < f32::INFINITY.to_bits()
}

/// Notes in `overflows` the chunks of `hidden`, `[tokens, hidden]`, that are not finite since `layer`, and puts zeros in their
/// place, which are safe to go on with. Rows do not depend on each other, so that no other chunk has seen them.
fn contain(hidden: &mut [f32], chunks: &[SequenceChunk<'_>], layer: LayerId, overflows: &mut [Option<LayerId>]) {
    let tokens: usize = chunks.iter().map(|chunk| chunk.tokens.len()).sum();
    let width = hidden.len() / tokens.max(1);
    let mut rest = hidden;
    for (chunk, overflow) in chunks.iter().zip(overflows) {
        let (own, others) = rest.split_at_mut(chunk.tokens.len() * width);
        if !own.iter().all(|value| value.is_finite()) {
            overflow.get_or_insert(layer);
            own.fill(0.0);
        }
        rest = others;
    }
}
