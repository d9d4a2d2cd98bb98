//! A router on the CPU.
//!
//! Each row of every matrix is one token and is computed alone, so a sequence's results do not depend on its batch mates or on how it
//! was cut into batches. A lane keeps what its layers write from batch to batch.

use std::sync::OnceLock;

use sirocco_types::{LayerId, ModelSpec, Routing};

use super::{GpuGauge, LANES, RouterBackend, attention_shape, route};
use crate::cuda::DeviceError;
use crate::{
    BLOCK_TOKENS, Draw, Drawn, KvLayer, PackedMatrix, Pool, Queries, Rotary, attend, cpu_description, matmul, rms_norm,
    sample,
};

/// What looking at a logit once takes, in multiply-adds.
const DRAW_WORK: usize = 8;

/// All but the experts of a model, on the CPU.
#[derive(Debug)]
pub struct CpuRouter {
    spec: ModelSpec,
    embedding: PackedMatrix,
    /// None when the embedding serves as the output projection too.
    lm_head: Option<PackedMatrix>,
    layers: Vec<Layer>,
    norm: Vec<f32>,
    /// By layer.
    kv: Vec<KvLayer>,
    kv_blocks: usize,
    rotary: Rotary,
    lanes: [Lane; LANES],
    pool: Pool,
}

/// What a [`CpuRouter`] is made of.
#[derive(Debug)]
pub struct CpuWeights {
    /// Those of [`RouterMatrix::all`](super::RouterMatrix::all), in its order.
    pub matrices: Vec<PackedMatrix>,
    /// Those of [`RouterVector::all`](super::RouterVector::all), in its order.
    pub vectors: Vec<Vec<f32>>,
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

/// A batch, and what its layers write one after the other.
#[derive(Debug, Default)]
struct Lane {
    parts: Vec<Part>,
    /// Of each token.
    angles: Vec<Vec<(f32, f32)>>,
    /// By part, where it came to values that are not finite.
    overflows: Vec<Option<LayerId>>,
    /// The residual stream, `[tokens, hidden]`
    hidden: Vec<f32>,
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

/// A sequence's part of a batch: its [`Queries`], kept.
#[derive(Debug)]
struct Part {
    blocks: Vec<u32>,
    start: usize,
    len: usize,
}

impl CpuRouter {
    /// A router of a model like `spec`, whose weights `weights` are, with a KV cache of `kv_blocks` blocks. The cache's memory is
    /// reserved at once and touched as it is used. Panics when the weights are fewer than the model has.
    pub fn new(spec: &ModelSpec, weights: CpuWeights, kv_blocks: usize, pool: Pool) -> Self {
        let (mut matrices, mut vectors) = (weights.matrices.into_iter(), weights.vectors.into_iter());
        let mut matrix = || matrices.next().expect("all matrices of the model");
        let mut vector = || vectors.next().expect("all vectors of the model");
        Self {
            embedding: matrix(),
            lm_head: (!spec.tie_word_embeddings).then(&mut matrix),
            layers: spec
                .layers()
                .map(|_| Layer {
                    attention_norm: vector(),
                    q: matrix(),
                    k: matrix(),
                    v: matrix(),
                    o: matrix(),
                    experts_norm: vector(),
                    gate: matrix(),
                })
                .collect(),
            norm: vector(),
            kv: spec.layers().map(|_| KvLayer::new(attention_shape(spec), kv_blocks)).collect(),
            kv_blocks,
            rotary: Rotary::new(spec.head_dim, spec.rope_theta),
            lanes: Default::default(),
            pool,
            spec: spec.clone(),
        }
    }
}

impl RouterBackend for CpuRouter {
    fn kind(&self) -> &'static str {
        "cpu"
    }

    fn name(&self) -> String {
        cpu_description(self.pool.threads())
    }

    fn gauge(&self) -> Option<GpuGauge> {
        None
    }

    fn weight_bytes(&self) -> usize {
        let layers = self.layers.iter().flat_map(|l| [&l.q, &l.k, &l.v, &l.o, &l.gate]);
        layers.chain([&self.embedding]).chain(&self.lm_head).map(PackedMatrix::bytes).sum()
    }

    fn kv_blocks(&self) -> usize {
        self.kv_blocks
    }

    fn copy_block(&mut self, from: u32, to: u32) -> Result<(), DeviceError> {
        self.kv.iter_mut().for_each(|layer| layer.copy(from, to));
        Ok(())
    }

    fn begin(&mut self, lane: usize, tokens: &[u32], queries: &[Queries]) -> Result<(), DeviceError> {
        let Lane { parts, angles, overflows, hidden, q, k, v, attended, projected } = &mut self.lanes[lane];
        hidden.clear();
        for token in tokens {
            hidden.extend(self.embedding.row(*token as usize));
        }
        *parts = queries.iter().map(Part::of).collect();
        *angles = positions(parts).map(|(_, position)| self.rotary.angles(position)).collect();
        *overflows = vec![None; parts.len()];
        let head_dim = self.spec.head_dim;
        let (heads, kv_heads) = (self.spec.num_attention_heads, self.spec.num_key_value_heads);
        for (buffer, width) in [
            (q, heads * head_dim),
            (k, kv_heads * head_dim),
            (v, kv_heads * head_dim),
            (attended, heads * head_dim),
            (projected, self.spec.hidden_size),
        ] {
            buffer.resize(tokens.len() * width, 0.0);
        }
        Ok(())
    }

    fn attend(&mut self, lane: usize, layer: LayerId, normed: &mut Vec<f32>) -> Result<Routing, DeviceError> {
        let (lane, kv) = (&mut self.lanes[lane], &mut self.kv[layer.index()]);
        let (id, layer) = (layer, &self.layers[layer.index()]);
        let eps = self.spec.rms_norm_eps;
        normed.resize(lane.hidden.len(), 0.0);
        rms_norm(&lane.hidden, &layer.attention_norm, eps, normed, &self.pool);
        lane.attention(layer, normed, kv, &self.pool);
        lane.add_projected(id);
        rms_norm(&lane.hidden, &layer.experts_norm, eps, normed, &self.pool);
        let gate = multiply(normed, &layer.gate, &self.pool); // [tokens, experts]
        Ok(route(gate, self.spec.num_local_experts, self.spec.num_experts_per_tok))
    }

    fn add_experts(&mut self, lane: usize, layer: LayerId, combined: &[f32]) -> Result<(), DeviceError> {
        let Lane { parts, hidden, overflows, .. } = &mut self.lanes[lane];
        add(hidden, combined, parts, layer, overflows);
        Ok(())
    }

    fn overflows(&mut self, lane: usize) -> Result<Vec<Option<LayerId>>, DeviceError> {
        Ok(self.lanes[lane].overflows.clone())
    }

    fn logits(&mut self, lane: usize, rows: &[u32]) -> Result<Vec<f32>, DeviceError> {
        let width = self.spec.hidden_size;
        let hidden = &self.lanes[lane].hidden;
        let mut wanted = Vec::with_capacity(rows.len() * width); // [rows, hidden]
        for row in rows {
            wanted.extend_from_slice(&hidden[*row as usize * width..][..width]);
        }
        let mut normed = vec![0.0; wanted.len()];
        rms_norm(&wanted, &self.norm, self.spec.rms_norm_eps, &mut normed, &self.pool);
        Ok(multiply(&normed, self.lm_head.as_ref().unwrap_or(&self.embedding), &self.pool))
    }

    fn sample(&mut self, lane: usize, rows: &[u32], draws: &[&Draw]) -> Result<Vec<Option<Drawn>>, DeviceError> {
        assert_eq!(rows.len(), draws.len(), "a draw for each row");
        let mut logits = self.logits(lane, rows)?; // [rows, vocab]
        let drawn: Vec<OnceLock<Option<Drawn>>> = rows.iter().map(|_| OnceLock::new()).collect();
        let work = logits.len() * DRAW_WORK;
        self.pool.for_each_row(&mut logits, self.spec.vocab_size, work, |row, logits| {
            drawn[row].get_or_init(|| sample(logits, draws[row]));
        });
        Ok(drawn.into_iter().map(|drawn| drawn.into_inner().flatten()).collect())
    }
}

impl Lane {
    /// Stores the keys and values of `normed`, `[tokens, hidden]`, and attends; leaves what comes of it in `projected`.
    fn attention(&mut self, layer: &Layer, normed: &[f32], kv: &mut KvLayer, pool: &Pool) {
        let Self { parts, angles, q, k, v, attended, projected, .. } = self;
        for (w, out) in [(&layer.q, &mut *q), (&layer.k, &mut *k), (&layer.v, &mut *v)] {
            matmul(normed, w, out, pool);
        }
        Rotary::rotate(q, angles, pool);
        Rotary::rotate(k, angles, pool);
        let width = layer.k.outputs();
        for ((blocks, position), (k, v)) in positions(parts).zip(k.chunks_exact(width).zip(v.chunks_exact(width))) {
            kv.store(blocks[position / BLOCK_TOKENS], position % BLOCK_TOKENS, k, v);
        }
        let queries: Vec<Queries> = parts.iter().map(Part::queries).collect();
        attend(kv, q, &queries, attended, pool);
        matmul(attended, &layer.o, projected, pool);
    }

    fn add_projected(&mut self, layer: LayerId) {
        add(&mut self.hidden, &self.projected, &self.parts, layer, &mut self.overflows);
    }
}

impl Part {
    fn of(queries: &Queries) -> Self {
        Self { blocks: queries.blocks.to_vec(), start: queries.start, len: queries.len }
    }

    fn queries(&self) -> Queries<'_> {
        Queries { blocks: &self.blocks, start: self.start, len: self.len }
    }
}

/// The blocks and the position of every token.
fn positions(parts: &[Part]) -> impl Iterator<Item = (&[u32], usize)> {
    parts.iter().flat_map(|part| (part.start..).take(part.len).map(|position| (&*part.blocks, position)))
}

fn multiply(x: &[f32], w: &PackedMatrix, pool: &Pool) -> Vec<f32> {
    let mut out = vec![0.0; x.len() / w.inputs() * w.outputs()];
    matmul(x, w, &mut out, pool);
    out
}

/// Adds `residual` to `hidden`, both `[tokens, hidden]`. Notes in `overflows` the parts that are not finite since `layer`, and puts zeros
/// in their place, which are safe to go on with. Rows do not depend on each other, so that no other part has seen them.
fn add(hidden: &mut [f32], residual: &[f32], parts: &[Part], layer: LayerId, overflows: &mut [Option<LayerId>]) {
    let mut largest = 0;
    for (hidden, residual) in hidden.iter_mut().zip(residual) {
        *hidden += residual;
        largest = largest.max(hidden.abs().to_bits());
    }
    if largest < f32::INFINITY.to_bits() {
        return;
    }
    let tokens: usize = parts.iter().map(|part| part.len).sum();
    let width = hidden.len() / tokens.max(1);
    let mut rest = hidden;
    for (part, overflow) in parts.iter().zip(overflows) {
        let (own, others) = rest.split_at_mut(part.len * width);
        if !own.iter().all(|value| value.is_finite()) {
            overflow.get_or_insert(layer);
            own.fill(0.0);
        }
        rest = others;
    }
}
