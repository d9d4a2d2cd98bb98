//! The engine: one thread that owns the model, the KV cache and every running sequence, and computes step after step.
//!
//! Requests wait in a bounded queue until their first step, and events go out over one channel each. A sequence whose client is gone leaves before
//! the next step. It computes on its own thread and its pool, never on the I/O runtime; waiting for experts is its only await.

use std::collections::HashMap;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use sirocco_model::{
    BlockTable, Detokenizer, Experts, ExpertsError, KvCache, Model, Sampler, SequenceChunk, StepOutput, StopMatcher,
    Tokenizer,
};
use sirocco_proto::inference::{Event, Finished, Token, Trace};
use sirocco_types::{FinishReason, Routing, SamplingParams, Timings, Usage};
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use crate::deadline::Overdue;
use crate::scheduler::{Chunk, Limits, Scheduler, SequenceId, TooLarge};

/// What the engine is made of.
pub(crate) struct Parts<E> {
    pub(crate) model: Model,
    pub(crate) tokenizer: Arc<Tokenizer>,
    pub(crate) experts: E,
    pub(crate) limits: EngineLimits,
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
    /// Blocks of the KV cache.
    pub(crate) kv_blocks: usize,
}

/// A checked request on its way to the engine.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) id: String,
    /// At least one token, each in the vocabulary, fewer than the model's context.
    pub(crate) prompt: Vec<u32>,
    /// With `max_tokens` such that prompt and completion fit the model's context.
    pub(crate) sampling: SamplingParams,
    pub(crate) trace: Trace,
    pub(crate) arrived: Instant,
    pub(crate) events: mpsc::Sender<Result<Event, GenerateError>>,
}

/// Why a request that was taken in failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum GenerateError {
    /// It can never run here.
    #[error("{0}")]
    TooLarge(#[from] TooLarge),
    /// Its time is over.
    #[error("{0}")]
    Overdue(#[from] Overdue),
    /// Experts did not answer.
    #[error("{0}")]
    Unavailable(String),
    /// The computation went wrong.
    #[error("{0}")]
    Internal(String),
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
}

/// A request and its place in the queue, which it gives up at its first step.
#[derive(Debug)]
struct Waiting {
    request: Request,
    place: Option<OwnedSemaphorePermit>,
}

impl Engine {
    /// Starts the thread; experts are waited for on `runtime`.
    pub(crate) fn start<E: Experts + 'static>(
        parts: Parts<E>,
        runtime: Handle,
    ) -> std::io::Result<(Self, JoinHandle<()>)> {
        let queue = parts.limits.queue;
        let (requests, incoming) = mpsc::channel(queue);
        let thread = std::thread::Builder::new()
            .name("engine".into())
            .spawn(move || EngineThread::new(parts, runtime).run(incoming))?;
        Ok((Self { requests, places: Arc::new(Semaphore::new(queue)), queue }, thread))
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
    runtime: Handle,
    kv: KvCache,
    scheduler: Scheduler,
    sequences: HashMap<SequenceId, Sequence>,
    next_id: u64,
}

/// A request in the engine.
struct Sequence {
    request: Request,
    /// Its place in the queue, until its first step.
    place: Option<OwnedSemaphorePermit>,
    /// The prompt and what was generated.
    tokens: Vec<u32>,
    /// Its part of the KV cache, from its first step on.
    blocks: Option<BlockTable>,
    sampler: Sampler,
    detokenizer: Detokenizer,
    stops: StopMatcher,
    /// Routing since the last token, by layer, when traced.
    routing: Vec<Routing>,
    started: Option<Instant>,
    first_token: Option<Instant>,
}

impl<E: Experts> EngineThread<E> {
    fn new(parts: Parts<E>, runtime: Handle) -> Self {
        let Parts { model, tokenizer, experts, limits } = parts;
        let kv = KvCache::new(model.spec(), limits.kv_blocks);
        let scheduler = Scheduler::new(Limits {
            sequences: limits.sequences,
            step_tokens: limits.step_tokens,
            kv_blocks: limits.kv_blocks,
            block_tokens: KvCache::BLOCK_TOKENS,
        });
        Self { model, tokenizer, experts, runtime, kv, scheduler, sequences: HashMap::new(), next_id: 0 }
    }

    fn run(mut self, mut incoming: mpsc::Receiver<Waiting>) {
        loop {
            if self.scheduler.is_idle() {
                match incoming.blocking_recv() {
                    Some(waiting) => self.accept(waiting),
                    None => return,
                }
            }
            while let Ok(waiting) = incoming.try_recv() {
                self.accept(waiting);
            }
            self.drop_abandoned();
            let chunks = self.scheduler.schedule();
            if !chunks.is_empty() {
                self.step(&chunks);
            }
        }
    }

    fn accept(&mut self, waiting: Waiting) {
        let Waiting { request, place } = waiting;
        let id = SequenceId(self.next_id);
        self.next_id += 1;
        let submitted = self.scheduler.submit(id, request.prompt.len(), request.sampling.max_tokens as usize);
        if let Err(error) = submitted {
            send(&request.events, Err(error.into()));
            return;
        }
        let sequence = Sequence {
            tokens: request.prompt.clone(),
            blocks: None,
            sampler: Sampler::new(request.sampling.clone(), self.model.spec().vocab_size, &request.prompt),
            detokenizer: Detokenizer::default(),
            stops: StopMatcher::new(request.sampling.stop.clone()),
            routing: Vec::new(),
            started: None,
            first_token: None,
            place,
            request,
        };
        self.sequences.insert(id, sequence);
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
        let mut sequence = self.sequences.remove(&id)?;
        if let Some(blocks) = sequence.blocks.take() {
            self.kv.release(blocks);
        }
        Some(sequence)
    }

    fn fail(&mut self, id: SequenceId, error: GenerateError) {
        if let Some(sequence) = self.remove(id) {
            tracing::warn!(request = sequence.request.id, %error, "a request failed");
            send(&sequence.request.events, Err(error));
        }
    }

    fn step(&mut self, chunks: &[Chunk]) {
        let now = Instant::now();
        for chunk in chunks {
            let sequence = self.sequences.get_mut(&chunk.id).expect("the scheduler runs only what was submitted");
            sequence.started.get_or_insert(now);
            sequence.place = None;
            if sequence.blocks.is_none() {
                let most = sequence.tokens.len() + sequence.request.sampling.max_tokens as usize;
                let blocks = self.kv.allocate(most);
                sequence.blocks = Some(blocks.expect("the scheduler admits only what the cache has room for"));
            }
        }
        let batch: Vec<SequenceChunk> = chunks
            .iter()
            .map(|chunk| {
                let sequence = &self.sequences[&chunk.id];
                SequenceChunk {
                    blocks: sequence.blocks.as_ref().expect("it was just allocated"),
                    start: chunk.start,
                    tokens: &sequence.tokens[chunk.start..chunk.start + chunk.len],
                    wants_logits: chunk.samples,
                }
            })
            .collect();
        let forward = self.model.forward(&batch, &mut self.kv, &self.experts);
        match self.runtime.block_on(forward) {
            Ok(output) => self.commit(chunks, output),
            Err(error) => {
                let error = match error {
                    ExpertsError::Unavailable(problem) => GenerateError::Unavailable(problem),
                    ExpertsError::Internal(problem) => GenerateError::Internal(problem),
                };
                for chunk in chunks {
                    self.fail(chunk.id, error.clone());
                }
            }
        }
    }

    /// Takes a step's results into its sequences.
    fn commit(&mut self, chunks: &[Chunk], output: StepOutput) {
        let mut logits = output.logits.into_iter();
        let mut row = 0;
        for chunk in chunks {
            let sequence = self.sequences.get_mut(&chunk.id).expect("nothing was removed during the step");
            if sequence.request.trace.routing {
                sequence.note_routing(&output.routing, row, chunk.len);
            }
            row += chunk.len;
            if !chunk.samples {
                continue;
            }
            let logits = logits.next().expect("one for each chunk that samples");
            match sequence.advance(logits, &self.tokenizer, &self.model.spec().eos_token_ids) {
                Ok(true) => self.scheduler.grew(chunk.id),
                Ok(false) => drop(self.remove(chunk.id)),
                Err(error) => self.fail(chunk.id, error),
            }
        }
    }
}

impl Sequence {
    /// Samples the next token and tells the client. Returns whether the sequence goes on.
    fn advance(&mut self, logits: Vec<f32>, tokenizer: &Tokenizer, eos: &[u32]) -> Result<bool, GenerateError> {
        let index = (self.tokens.len() - self.request.prompt.len()) as u32;
        let sampled =
            self.sampler.sample(index, &logits).map_err(|error| GenerateError::Internal(error.to_string()))?;
        self.first_token.get_or_insert_with(Instant::now);
        self.tokens.push(sampled.id);

        let ended = !self.request.sampling.ignore_eos && eos.contains(&sampled.id);
        let piece = if ended { String::new() } else { self.detokenizer.push(sampled.id, tokenizer) };
        let (text, stopped) = self.stops.push(&piece);
        let top = sampled.top_logprobs.into_iter();
        let routing = std::mem::take(&mut self.routing);
        self.send(Event::Token(Token {
            index,
            id: sampled.id,
            text,
            logprob: sampled.logprob,
            top_logprobs: top.map(|(id, logprob)| (id, logprob, tokenizer.token_text(id))).collect(),
            logits: if self.request.trace.logits { logits } else { Vec::new() },
            routing,
        }));
        let reason = if ended || stopped {
            FinishReason::Stop
        } else if index + 1 == self.request.sampling.max_tokens {
            FinishReason::Length
        } else {
            return Ok(true);
        };
        self.finish(reason, stopped, tokenizer);
        Ok(false)
    }

    /// Tells the client that and why the sequence has ended.
    fn finish(&mut self, reason: FinishReason, stopped: bool, tokenizer: &Tokenizer) {
        let mut text = String::new();
        if !stopped {
            let rest = std::mem::take(&mut self.detokenizer).finish(tokenizer);
            let (shown, cut) = self.stops.push(&rest);
            text = shown;
            if !cut {
                text += &std::mem::take(&mut self.stops).finish();
            }
        }
        let since = |instant: Option<Instant>| {
            let elapsed = instant.unwrap_or_else(Instant::now).duration_since(self.request.arrived);
            elapsed.as_secs_f64() * 1e3
        };
        self.send(Event::Finished(Finished {
            reason,
            usage: Usage {
                prompt_tokens: self.request.prompt.len() as u32,
                completion_tokens: (self.tokens.len() - self.request.prompt.len()) as u32,
            },
            timings: Timings {
                queue_ms: since(self.started),
                first_token_ms: since(self.first_token),
                total_ms: since(None),
            },
            text,
        }));
    }

    /// Keeps the experts of `len` rows of a step from `row` on.
    fn note_routing(&mut self, step: &[Routing], row: usize, len: usize) {
        if self.routing.is_empty() {
            self.routing = step.iter().map(|layer| Routing::new(layer.top_k)).collect();
        }
        for (kept, layer) in self.routing.iter_mut().zip(step) {
            let range = row * layer.top_k..(row + len) * layer.top_k;
            kept.experts.extend_from_slice(&layer.experts[range.clone()]);
            kept.weights.extend_from_slice(&layer.weights[range]);
        }
    }

    fn send(&self, event: Event) {
        send(&self.request.events, Ok(event));
    }
}

/// Sends without waiting: the channel has room for all a request can ever send, and a client that has gone is noticed
/// before the next step.
fn send(events: &mpsc::Sender<Result<Event, GenerateError>>, event: Result<Event, GenerateError>) {
    let _ = events.try_send(event);
}
