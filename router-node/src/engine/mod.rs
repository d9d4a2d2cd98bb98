//! The engine: one thread that owns the model with its KV cache and every running sequence, and computes step after step.
//!
//! Requests wait in a bounded queue until their first step, and events go out over one channel each. A sequence whose client is
//! gone leaves before the next step. It computes on its own thread and its pool, never on the I/O runtime. It waits, for
//! requests as for experts, by driving a runtime of its own, on which the connections to expert nodes live. When the model's device
//! fails, the requests of that step fail; when it is lost, the node is told.

mod overlap;
mod sequence;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use sirocco_compute::{BLOCK_TOKENS, DeviceError};
use sirocco_model::{
    Constraint, ConstraintError, Experts, ExpertsError, Logits, Model, SequenceChunk, StepError, StepOutput, Tokenizer,
};
use sirocco_proto::inference::{Event, Trace};
use sirocco_types::{LayerId, SamplingParams};
use tokio::runtime::Runtime;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::deadline::{Deadline, Overdue};
use crate::metrics::Metrics;
use crate::scheduler::{Chunk, Counts, Flow, Limits, Scheduler, SequenceId, Step, Submission, TooLarge};
use sequence::{Next, Sequence, Wanted};

/// What the engine is made of.
pub(crate) struct Parts<E> {
    pub(crate) model: Model,
    pub(crate) tokenizer: Arc<Tokenizer>,
    pub(crate) experts: E,
    pub(crate) limits: EngineLimits,
    pub(crate) metrics: Arc<Metrics>,
    /// Cancelled by the engine when the model's device is lost.
    pub(crate) lost: CancellationToken,
}

/// What the engine may take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct EngineLimits {
    /// Sequences that run at once.
    pub(crate) sequences: usize,
    /// Requests that wait for their first step; one more is refused.
    pub(crate) queue: usize,
    /// Tokens computed in one step.
    pub(crate) step_tokens: usize,
    /// Rows that each expert has on average at least in each half of a step that is computed in two; 0 cuts none.
    pub(crate) overlap_rows: usize,
}

/// A checked request on its way to the engine.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) id: String,
    /// Whose it is, and how urgent.
    pub(crate) flow: Flow,
    /// At least one token, each in the vocabulary, fewer than the model's context.
    pub(crate) prompt: Vec<u32>,
    /// The completion's first tokens, when another router generated them; fewer than `max_tokens`.
    pub(crate) generated: Vec<u32>,
    /// With `max_tokens` such that prompt and completion fit the model's context.
    pub(crate) sampling: SamplingParams,
    /// What the completion must be; it has taken in `generated`.
    pub(crate) constraint: Option<Constraint>,
    pub(crate) trace: Trace,
    pub(crate) arrived: Instant,
    /// When nobody waits for it any more.
    pub(crate) deadline: Deadline,
    pub(crate) events: mpsc::Sender<Result<Event, GenerateError>>,
}

/// Why a request that was taken in failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum GenerateError {
    /// It can never run here.
    #[error("{0}")]
    TooLarge(#[from] TooLarge),
    /// It cannot be kept within its grammar.
    #[error("{0}")]
    Grammar(#[from] ConstraintError),
    /// Its time is over.
    #[error("{0}")]
    Overdue(#[from] Overdue),
    /// Experts did not answer, or the device has no memory or is lost: another router may serve it.
    #[error("{0}")]
    Unavailable(String),
    /// The computation went wrong.
    #[error("{0}")]
    Internal(String),
}

impl From<StepError> for GenerateError {
    fn from(error: StepError) -> Self {
        match error {
            StepError::Experts(ExpertsError::Unavailable(problem)) => Self::Unavailable(problem),
            StepError::Experts(ExpertsError::Internal(problem)) => Self::Internal(problem),
            StepError::Device(error @ (DeviceError::OutOfMemory { .. } | DeviceError::Lost { .. })) => {
                Self::Unavailable(error.to_string())
            }
            StepError::Device(error) => Self::Internal(error.to_string()),
        }
    }
}

/// Why a request was not taken in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SubmitError {
    #[error("the queue of {0} requests is full; try again later")]
    Full(usize),
    #[error("{given} sequences at once, the router's queue takes {most}")]
    TooMany { given: usize, most: usize },
    #[error("the router is stopping")]
    Stopped,
}

/// A cheap handle to the engine's thread, which ends when the last one is dropped and all its requests are done.
#[derive(Clone, Debug)]
pub(crate) struct Engine {
    requests: mpsc::Sender<Waiting>,
    /// The queue's free places.
    places: Arc<Semaphore>,
    queue: usize,
    counts: watch::Receiver<Counts>,
}

/// A request and its place in the queue, which it gives up at its first step.
#[derive(Debug)]
struct Waiting {
    request: Request,
    place: Option<OwnedSemaphorePermit>,
}

impl Engine {
    /// Starts the thread, which drives `runtime`. It ends after `connections`, the tasks that live there.
    pub(crate) fn start<E: Experts + 'static>(
        parts: Parts<E>,
        runtime: Runtime,
        connections: TaskTracker,
    ) -> std::io::Result<(Self, JoinHandle<()>)> {
        let queue = parts.limits.queue;
        let (requests, incoming) = mpsc::channel(queue);
        let engine = EngineThread::new(parts, runtime);
        let counts = engine.counts.subscribe();
        let thread = std::thread::Builder::new().name("engine".into());
        let thread = thread.spawn(move || {
            let runtime = engine.run(incoming);
            connections.close();
            runtime.block_on(connections.wait());
        })?;
        Ok((Self { requests, places: Arc::new(Semaphore::new(queue)), queue, counts }, thread))
    }

    /// What the engine holds as of its last step.
    pub(crate) fn counts(&self) -> Counts {
        *self.counts.borrow()
    }

    /// Sequences that wait for their first step now.
    pub(crate) fn queued(&self) -> usize {
        self.queue - self.places.available_permits()
    }

    /// Hands over requests, at once and all of them or none.
    pub(crate) fn submit(&self, requests: Vec<Request>) -> Result<(), SubmitError> {
        let given = requests.len();
        if given > self.queue {
            return Err(SubmitError::TooMany { given, most: self.queue });
        }
        let places = Arc::clone(&self.places).try_acquire_many_owned(given as u32);
        let mut places = places.map_err(|_| SubmitError::Full(self.queue))?;
        for request in requests {
            let waiting = Waiting { request, place: places.split(1) };
            self.requests.try_send(waiting).map_err(|error| match error {
                mpsc::error::TrySendError::Full(_) => SubmitError::Full(self.queue),
                mpsc::error::TrySendError::Closed(_) => SubmitError::Stopped,
            })?;
        }
        Ok(())
    }
}

struct EngineThread<E> {
    model: Model,
    tokenizer: Arc<Tokenizer>,
    experts: E,
    runtime: Runtime,
    scheduler: Scheduler,
    counts: watch::Sender<Counts>,
    metrics: Arc<Metrics>,
    overlap_rows: usize,
    lost: CancellationToken,
    sequences: HashMap<SequenceId, Sequence>,
    next_id: u64,
}

impl<E: Experts> EngineThread<E> {
    fn new(parts: Parts<E>, runtime: Runtime) -> Self {
        let Parts { model, tokenizer, experts, limits, metrics, lost } = parts;
        let scheduler = Scheduler::new(Limits {
            sequences: limits.sequences,
            step_tokens: limits.step_tokens,
            kv_blocks: model.router().kv_blocks(),
            block_tokens: BLOCK_TOKENS,
        });
        let overlap_rows = limits.overlap_rows;
        let counts = watch::Sender::new(scheduler.counts());
        Self {
            model,
            tokenizer,
            experts,
            runtime,
            scheduler,
            counts,
            metrics,
            overlap_rows,
            lost,
            sequences: HashMap::new(),
            next_id: 0,
        }
    }

    /// Serves until no handle is left, and gives back what it waited with.
    fn run(mut self, mut incoming: mpsc::Receiver<Waiting>) -> Runtime {
        loop {
            if self.scheduler.is_idle() {
                self.counts.send_replace(self.scheduler.counts());
                match self.runtime.block_on(incoming.recv()) {
                    Some(waiting) => self.accept(waiting),
                    None => return self.runtime,
                }
            }
            while let Ok(waiting) = incoming.try_recv() {
                self.accept(waiting);
            }
            self.drop_abandoned();
            let step = self.scheduler.schedule();
            self.counts.send_replace(self.scheduler.counts());
            if !step.chunks.is_empty() {
                self.step(&step);
            }
        }
    }

    fn accept(&mut self, waiting: Waiting) {
        let Waiting { request, place } = waiting;
        let id = SequenceId(self.next_id);
        self.next_id += 1;
        let mut sequence = Sequence::new(request, place, self.model.spec().vocab_size);
        if !sequence.resume(&self.tokenizer, &self.model.spec().eos_token_ids) {
            return;
        }
        let submission = Submission {
            id,
            flow: sequence.request.flow,
            tokens: [sequence.request.prompt.as_slice(), &sequence.request.generated].concat(),
            max_new: sequence.request.sampling.max_tokens as usize - sequence.request.generated.len(),
            // What is taken from the cache is not routed again.
            reuse: !sequence.request.trace.routing || sequence.request.trace.computed_only,
        };
        match self.scheduler.submit(submission) {
            Ok(()) => drop(self.sequences.insert(id, sequence)),
            Err(error) => send(&sequence.request.events, Err(error.into())),
        }
    }

    /// Forgets sequences whose clients are gone.
    fn drop_abandoned(&mut self) {
        let gone: Vec<SequenceId> =
            self.sequences.iter().filter(|(_, s)| s.request.events.is_closed()).map(|(id, _)| *id).collect();
        for id in gone {
            if let Some(sequence) = self.remove(id) {
                tracing::debug!(request = sequence.request.id, "its client has left");
            }
        }
    }

    fn remove(&mut self, id: SequenceId) -> Option<Sequence> {
        self.scheduler.remove(id);
        self.sequences.remove(&id)
    }

    fn fail(&mut self, id: SequenceId, error: GenerateError) {
        if let Some(sequence) = self.remove(id) {
            if matches!(error, GenerateError::Overdue(_)) {
                tracing::debug!(request = sequence.request.id, "its time is over");
            } else {
                tracing::warn!(request = sequence.request.id, %error, "a request failed");
            }
            send(&sequence.request.events, Err(error));
        }
    }

    fn step(&mut self, step: &Step) {
        let now = Instant::now();
        for chunk in &step.chunks {
            let sequence = self.sequences.get_mut(&chunk.id).expect("the scheduler runs only what was submitted");
            sequence.begin(now, self.scheduler.found(chunk.id), &self.metrics);
        }
        // By chunk, of those that come to a token.
        let wanted = step.chunks.iter().map(|chunk| {
            let sequence = self.sequences.get_mut(&chunk.id).filter(|_| chunk.samples)?;
            Some(sequence.wants())
        });
        let wanted: Vec<Option<Result<Wanted, GenerateError>>> = wanted.collect();
        let prepared = now.elapsed();
        match self.compute(step, &wanted) {
            Ok(output) => {
                for (chunk, layer) in step.chunks.iter().zip(&output.overflows) {
                    if let Some(layer) = layer {
                        // Before its blocks could be used by others.
                        self.fail(chunk.id, GenerateError::Internal(overflow(*layer)));
                    }
                }
                self.scheduler.finish(step);
                let (times, sampling) = (output.times, Instant::now());
                self.commit(step.chunks.iter().zip(wanted), output);
                let tokens = step.chunks.iter().map(|chunk| chunk.len).sum();
                self.metrics.step(tokens, now.elapsed(), times, prepared + sampling.elapsed());
            }
            Err(error) => self.give_up(step, error),
        }
    }

    /// Has the model compute a step, and draw what is wanted after each chunk.
    fn compute(
        &mut self,
        step: &Step,
        wanted: &[Option<Result<Wanted, GenerateError>>],
    ) -> Result<StepOutput, StepError> {
        for &(from, to) in &step.copies {
            self.model.copy_block(from, to)?;
        }
        let batch: Vec<SequenceChunk> = step
            .chunks
            .iter()
            .zip(wanted)
            .map(|(chunk, wanted)| {
                let sequence = self.sequences.get(&chunk.id);
                SequenceChunk {
                    blocks: self.scheduler.table(chunk.id),
                    start: chunk.start,
                    tokens: &self.scheduler.tokens(chunk.id)[chunk.start..chunk.start + chunk.len],
                    logits: match wanted {
                        Some(Ok(wanted)) => wanted.logits(),
                        Some(Err(_)) | None => Logits::None,
                    },
                    until: sequence.map(|sequence| sequence.request.deadline.at),
                }
            })
            .collect();
        let (first, second) = batch.split_at(overlap::cut(&step.chunks, self.model.spec(), self.overlap_rows));
        self.runtime.block_on(self.model.forward(&[first, second], &self.experts))
    }

    /// Fails the sequences of a step that could not be computed.
    fn give_up(&mut self, step: &Step, error: StepError) {
        if let StepError::Device(error) = &error {
            tracing::error!(%error, requests = step.chunks.len(), "a step failed");
            if matches!(error, DeviceError::Lost { .. }) {
                self.lost.cancel();
            }
        }
        let error = GenerateError::from(error);
        let now = Instant::now();
        for chunk in &step.chunks {
            let deadline = self.sequences.get(&chunk.id).map(|sequence| sequence.request.deadline);
            match deadline.filter(|deadline| deadline.at <= now) {
                // Its experts may have been given up for that reason alone.
                Some(deadline) => self.fail(chunk.id, deadline.overdue().into()),
                None => self.fail(chunk.id, error.clone()),
            }
        }
    }

    /// Takes a step's results into its sequences; `chunks` with what is wanted after each.
    fn commit<'a>(
        &mut self,
        chunks: impl Iterator<Item = (&'a Chunk, Option<Result<Wanted, GenerateError>>)>,
        output: StepOutput,
    ) {
        let (mut logits, mut drawn) = (output.logits.into_iter(), output.drawn.into_iter());
        let mut row = 0;
        for (chunk, wanted) in chunks {
            let start = row;
            row += chunk.len;
            let next = wanted.map(|wanted| {
                let wanted = wanted?;
                let logits = if wanted.told { logits.next().unwrap_or_default() } else { Vec::new() };
                Ok(Next { drawn: drawn.next().flatten(), logits })
            });
            // What overflowed has failed.
            let Some(sequence) = self.sequences.get_mut(&chunk.id) else { continue };
            if sequence.request.trace.routing {
                sequence.note_routing(&output.routing, start, chunk);
            }
            let Some(next) = next else { continue };
            let eos = &self.model.spec().eos_token_ids;
            match next.and_then(|next| sequence.advance(next, &self.tokenizer, eos, &self.metrics)) {
                Ok(Some(token)) => self.scheduler.grew(chunk.id, token),
                Ok(None) => drop(self.remove(chunk.id)),
                Err(error) => self.fail(chunk.id, error),
            }
        }
    }
}

/// Why a sequence failed that came to NaN or infinity in `layer`. An expert may have answered so: weights can overflow on any node,
/// so that its node is not to blame and no other is asked.
fn overflow(layer: LayerId) -> String {
    format!("the activations of layer {layer} are not finite")
}

/// Sends without waiting: the channel has room for all a request can ever send, and a client that has gone is noticed
/// before the next step.
fn send(events: &mpsc::Sender<Result<Event, GenerateError>>, event: Result<Event, GenerateError>) {
    let _ = events.try_send(event);
}
