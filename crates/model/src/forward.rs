//! The forward pass of a router node: everything but the experts, on whatever device computes it.
//!
//! A step computes chunks of several sequences at once, prompts and single tokens mixed. A sequence's results do not depend on its
//! batch mates or on how it was cut into chunks.
//!
//! A step may come in two batches: while one waits for its experts, the other computes its attention.

use std::cell::RefCell;
use std::time::{Duration, Instant};

use sirocco_compute::{
    CpuRouter, CpuWeights, DeviceError, Draw, Drawn, LANES, Queries, RouterBackend, RouterDevice, RouterMatrix,
    RouterVector,
};
use sirocco_types::{LayerId, ModelSpec, Routing};

use crate::checkpoint::load_each;
use crate::turns::by_turns;
use crate::{Checkpoint, CheckpointError, Experts, ExpertsError};

/// A model without its experts, and its KV cache.
#[derive(Debug)]
pub struct Model {
    spec: ModelSpec,
    router: Box<dyn RouterBackend>,
}

/// A sequence's part of a step.
#[derive(Debug)]
pub struct SequenceChunk<'a> {
    /// The blocks of the KV cache that hold its keys and values, by position; enough for all up to the chunk's end.
    pub blocks: &'a [u32],
    /// Position of the chunk's first token; everything before has been computed.
    pub start: usize,
    /// The chunk's tokens, at least one, each below `vocab_size`.
    pub tokens: &'a [u32],
    /// After which of its tokens to compute logits, and what becomes of them.
    pub logits: Logits<'a>,
    /// When its sequence's time is over; none: never. A step waits as long as its most patient chunk, whose batch may be another.
    pub until: Option<Instant>,
}

/// After which tokens of a chunk logits are computed, and what becomes of them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Logits<'a> {
    /// After none.
    None,
    /// After the last one. Only what is drawn from them leaves the device.
    Drawn(&'a Draw),
    /// After the last one, and they are told besides what is drawn from them.
    DrawnAndTold(&'a Draw),
    /// After the last one, and they are told.
    Last,
    /// After each, and they are told.
    All,
}

impl<'a> Logits<'a> {
    fn draw(self) -> Option<&'a Draw> {
        match self {
            Self::Drawn(draw) | Self::DrawnAndTold(draw) => Some(draw),
            Self::None | Self::Last | Self::All => None,
        }
    }
}

/// What a step gives.
#[derive(Clone, Debug)]
pub struct StepOutput {
    /// `[vocab_size]` for each token whose logits are told, in order.
    pub logits: Vec<Vec<f32>>,
    /// For each chunk that is drawn for, in order, what [`sample`](sirocco_compute::sample) draws.
    pub drawn: Vec<Option<Drawn>>,
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
    /// The output projection, and drawing from what it gives.
    pub logits: Duration,
}

/// Why a step gives nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StepError {
    /// A layer's experts gave no answer.
    #[error(transparent)]
    Experts(#[from] ExpertsError),
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

impl Model {
    /// Loads everything but the experts for `device`, on as many threads as its pool has.
    pub fn load(checkpoint: &Checkpoint, device: RouterDevice) -> Result<Self, CheckpointError> {
        let spec = checkpoint.spec().clone();
        let matrices: Vec<RouterMatrix> = RouterMatrix::all(&spec).collect();
        let vectors = RouterVector::all(&spec).map(|vector| checkpoint.router_vector(vector));
        let vectors: Vec<Vec<f32>> = vectors.collect::<Result<_, _>>()?;
        let router: Box<dyn RouterBackend> = match device {
            RouterDevice::Cpu { pool, kv_blocks } => {
                let load = |matrix: &RouterMatrix| checkpoint.router_matrix(*matrix);
                let matrices = load_each(&matrices, pool.threads(), load)?;
                Box::new(CpuRouter::new(&spec, CpuWeights { matrices, vectors }, kv_blocks, pool))
            }
            RouterDevice::Cuda { mut router, pool } => {
                // The host never has more of them than its threads read at once.
                for few in matrices.chunks(pool.threads()) {
                    let load = |matrix: &RouterMatrix| checkpoint.router_matrix_rows(*matrix);
                    for (matrix, rows) in few.iter().zip(load_each(few, pool.threads(), load)?) {
                        router.load_matrix(*matrix, &rows)?;
                    }
                }
                for (vector, values) in RouterVector::all(&spec).zip(vectors) {
                    router.load_vector(vector, &values)?;
                }
                router
            }
        };
        Ok(Self { spec, router })
    }

    /// The same model, computed by what `change` makes of what computes it.
    #[must_use]
    pub fn with_router(self, change: impl FnOnce(Box<dyn RouterBackend>) -> Box<dyn RouterBackend>) -> Self {
        Self { router: change(self.router), ..self }
    }

    /// The model's shape.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// What computes it.
    pub fn router(&self) -> &dyn RouterBackend {
        &*self.router
    }

    /// Copies all that block `from` of the KV cache holds to block `to`.
    pub fn copy_block(&mut self, from: u32, to: u32) -> Result<(), DeviceError> {
        self.router.copy_block(from, to)
    }

    /// Computes one step, which comes in one batch or two without a sequence in common, and stores its keys and values.
    pub async fn forward(
        &mut self,
        batches: &[&[SequenceChunk<'_>]],
        experts: &impl Experts,
    ) -> Result<StepOutput, StepError> {
        let batches: Vec<&[SequenceChunk]> = batches.iter().copied().filter(|chunks| !chunks.is_empty()).collect();
        assert!(batches.len() <= LANES, "a lane for each of {} batches", batches.len());
        let (spec, router): (&ModelSpec, &mut dyn RouterBackend) = (&self.spec, &mut *self.router);
        let untils = batches.iter().flat_map(|chunks| *chunks).map(|chunk| chunk.until);
        let until = untils.max_by_key(|until| (until.is_none(), *until)).flatten();
        // Each batch borrows it only while it computes, never while it waits.
        let shared: RefCell<&mut dyn RouterBackend> = RefCell::new(&mut *router);
        let outputs = batches.iter().enumerate().map(|(lane, chunks)| {
            let batch = Batch { spec, router: &shared, lane, chunks, until };
            batch.layers(experts)
        });
        let outputs = by_turns(outputs).await?;
        let began = Instant::now();
        let mut step = StepOutput {
            logits: Vec::new(),
            drawn: Vec::new(),
            routing: Vec::new(),
            overflows: Vec::new(),
            times: StepTimes::default(),
        };
        for (lane, (chunks, output)) in batches.iter().zip(outputs).enumerate() {
            step.overflows.extend(router.overflows(lane)?);
            after(spec, router, (lane, chunks), &mut step)?;
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
}

/// A batch on its way through the layers.
struct Batch<'a, 'r> {
    spec: &'a ModelSpec,
    router: &'a RefCell<&'r mut dyn RouterBackend>,
    lane: usize,
    chunks: &'a [SequenceChunk<'a>],
    /// How long it may wait for its experts.
    until: Option<Instant>,
}

/// What became of one batch.
struct BatchOutput {
    /// By layer.
    routing: Vec<Routing>,
    attention: Duration,
}

impl Batch<'_, '_> {
    /// Takes the batch through all layers.
    async fn layers(self, experts: &impl Experts) -> Result<BatchOutput, StepError> {
        let Self { spec, router, lane, chunks, until } = self;
        let mut began = Instant::now();
        let mut attention = Duration::ZERO;
        let tokens: Vec<u32> = chunks.iter().flat_map(|chunk| chunk.tokens).copied().collect();
        let queries: Vec<Queries> = chunks
            .iter()
            .map(|chunk| Queries { blocks: chunk.blocks, start: chunk.start, len: chunk.tokens.len() })
            .collect();
        router.borrow_mut().begin(lane, &tokens, &queries)?;

        let mut normed = Vec::new(); // [tokens, hidden]
        let mut routing = Vec::with_capacity(spec.num_hidden_layers);
        for layer in spec.layers() {
            let chosen = router.borrow_mut().attend(lane, layer, &mut normed)?;
            attention += began.elapsed();
            let combined = experts.forward(layer, &normed, &chosen, until).await?;
            began = Instant::now();
            router.borrow_mut().add_experts(lane, layer, &combined)?;
            routing.push(chosen);
        }
        Ok(BatchOutput { routing, attention })
    }
}

/// Adds to `step` what comes after the tokens of the batch in `lane`.
fn after(
    spec: &ModelSpec,
    router: &mut dyn RouterBackend,
    (lane, chunks): (usize, &[SequenceChunk<'_>]),
    step: &mut StepOutput,
) -> Result<(), DeviceError> {
    let (mut rows, mut draws, mut told) = (Vec::new(), Vec::new(), Vec::new());
    let mut end = 0;
    for chunk in chunks {
        let start = end;
        end += chunk.tokens.len() as u32;
        if let Some(draw) = chunk.logits.draw() {
            rows.push(end - 1);
            draws.push(draw);
        }
        told.extend(match chunk.logits {
            Logits::None | Logits::Drawn(_) => end..end,
            Logits::DrawnAndTold(_) | Logits::Last => end - 1..end,
            Logits::All => start..end,
        });
    }
    if !rows.is_empty() {
        step.drawn.extend(router.sample(lane, &rows, &draws)?);
    }
    if !told.is_empty() {
        let logits = router.logits(lane, &told)?;
        step.logits.extend(logits.chunks_exact(spec.vocab_size).map(<[f32]>::to_vec));
    }
    Ok(())
}
