//! A request in the engine: says how its tokens are drawn, turns them into text, ends it, and tells its client. Never computes a step.

use std::time::Instant;

use sirocco_compute::{Draw, Drawn};
use sirocco_model::{Detokenizer, Logits, SampleError, Sampler, StopMatcher, Tokenizer};
use sirocco_proto::inference::{Event, Finished, Token};
use sirocco_types::{FinishReason, Routing, Timings, Usage};
use tokio::sync::OwnedSemaphorePermit;

use super::{GenerateError, Request};
use crate::metrics::Metrics;
use crate::scheduler::Chunk;

pub(super) struct Sequence {
    pub(super) request: Request,
    /// Its place in the queue, until its first step.
    place: Option<OwnedSemaphorePermit>,
    /// Tokens of the completion so far.
    generated: u32,
    sampler: Sampler,
    detokenizer: Detokenizer,
    stops: StopMatcher,
    /// Routing since the last token, by layer, when traced.
    routing: Vec<Routing>,
    /// Positions whose routing was noted.
    routed: usize,
    /// Tokens that did not have to be computed.
    found: usize,
    started: Option<Instant>,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
}

impl Sequence {
    pub(super) fn new(mut request: Request, place: Option<OwnedSemaphorePermit>, vocab_size: usize) -> Self {
        let sampler = Sampler::new(request.sampling.clone(), vocab_size, &request.prompt);
        Self {
            sampler: sampler.within(request.constraint.take()),
            detokenizer: Detokenizer::default(),
            stops: StopMatcher::new(request.sampling.stop.clone()),
            generated: 0,
            routing: Vec::new(),
            routed: 0,
            found: 0,
            started: None,
            first_token: None,
            last_token: None,
            place,
            request,
        }
    }

    /// Goes over the tokens that were generated elsewhere, whose text the client has. Returns whether there is more to generate;
    /// if not, the client is told.
    pub(super) fn resume(&mut self, tokenizer: &Tokenizer, eos: &[u32]) -> bool {
        for id in std::mem::take(&mut self.request.generated) {
            self.sampler.note(id);
            self.request.generated.push(id);
            let (_, end) = self.take_in(id, tokenizer, eos);
            if let Some(end) = end {
                self.finish(end, tokenizer);
                return false;
            }
        }
        if self.sampler.is_finished() {
            self.finish(End::Token, tokenizer);
        }
        !self.sampler.is_finished()
    }

    /// A step at `now` has it, for which `found` tokens need not be computed.
    pub(super) fn begin(&mut self, now: Instant, found: usize, metrics: &Metrics) {
        if self.started.is_none() {
            self.started = Some(now);
            let prompt = self.request.prompt.len();
            self.found = found.min(prompt);
            metrics.began(now.duration_since(self.request.arrived), prompt, self.found);
        }
        self.place = None;
    }

    /// What it needs of a step to go on.
    pub(super) fn wants(&mut self) -> Result<Wanted, GenerateError> {
        let draw = self.sampler.prepare(self.generated).map_err(failure)?;
        Ok(Wanted { draw, told: self.request.trace.logits })
    }

    /// Takes the next token, which was drawn from `logits`, and tells the client. Returns the token if the sequence goes on.
    pub(super) fn advance(
        &mut self,
        Next { drawn, logits }: Next,
        tokenizer: &Tokenizer,
        eos: &[u32],
        metrics: &Metrics,
    ) -> Result<Option<u32>, GenerateError> {
        let index = self.generated;
        let sampled = self.sampler.take(index, drawn).map_err(failure)?;
        self.time_token(metrics);
        let (text, end) = self.take_in(sampled.id, tokenizer, eos);
        let end = match end {
            None | Some(End::Length) if self.sampler.is_finished() => Some(End::Token),
            end => end,
        };
        let top = sampled.top_logprobs.into_iter();
        let routing = std::mem::take(&mut self.routing);
        self.send(Event::Token(Token {
            index,
            id: sampled.id,
            text,
            logprob: sampled.logprob,
            top_logprobs: top.map(|(id, logprob)| (id, logprob, tokenizer.token_text(id))).collect(),
            logits,
            routing,
        }));
        match end {
            None => Ok(Some(sampled.id)),
            Some(end) => {
                self.finish(end, tokenizer);
                Ok(None)
            }
        }
    }

    fn time_token(&mut self, metrics: &Metrics) {
        let now = Instant::now();
        if let Some(last) = self.last_token.replace(now) {
            metrics.next_token(now.duration_since(last));
        } else {
            self.first_token = Some(now);
            metrics.first_token(now.duration_since(self.request.arrived));
        }
    }

    /// Takes the next token into the completion. Returns the text it adds, and how the completion ends with it, if it does.
    fn take_in(&mut self, id: u32, tokenizer: &Tokenizer, eos: &[u32]) -> (String, Option<End>) {
        self.generated += 1;
        let ended = !self.request.sampling.ignore_eos && eos.contains(&id);
        let piece = if ended { String::new() } else { self.detokenizer.push(id, tokenizer) };
        let (text, stopped) = self.stops.push(&piece);
        let end = if stopped {
            Some(End::StopString)
        } else if ended {
            Some(End::Token)
        } else if self.generated >= self.request.sampling.max_tokens {
            Some(End::Length)
        } else {
            None
        };
        (text, end)
    }

    /// Tells the client that and why the sequence has ended.
    fn finish(&mut self, end: End, tokenizer: &Tokenizer) {
        let mut text = String::new();
        if end != End::StopString {
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
            reason: if end == End::Length { FinishReason::Length } else { FinishReason::Stop },
            usage: Usage {
                prompt_tokens: self.request.prompt.len() as u32,
                cached_tokens: self.found as u32,
                completion_tokens: self.generated,
            },
            timings: Timings {
                queue_ms: since(self.started),
                first_token_ms: since(self.first_token),
                total_ms: since(None),
            },
            text,
        }));
    }

    /// Keeps the experts of `chunk`, whose rows of the step begin at `row`. What is computed again was noted before.
    pub(super) fn note_routing(&mut self, step: &[Routing], row: usize, chunk: &Chunk) {
        if self.routing.is_empty() {
            self.routing = step.iter().map(|layer| Routing::new(layer.top_k)).collect();
        }
        let again = self.routed.saturating_sub(chunk.start).min(chunk.len);
        self.routed = self.routed.max(chunk.start + chunk.len);
        for (kept, layer) in self.routing.iter_mut().zip(step) {
            let range = (row + again) * layer.top_k..(row + chunk.len) * layer.top_k;
            kept.experts.extend_from_slice(&layer.experts[range.clone()]);
            kept.weights.extend_from_slice(&layer.weights[range]);
        }
    }

    fn send(&self, event: Event) {
        super::send(&self.request.events, Ok(event));
    }
}

/// What a sequence needs of a step to go on.
pub(super) struct Wanted {
    draw: Draw,
    /// Whether the client asks for the logits.
    pub(super) told: bool,
}

impl Wanted {
    pub(super) fn logits(&self) -> Logits<'_> {
        if self.told { Logits::DrawnAndTold(&self.draw) } else { Logits::Drawn(&self.draw) }
    }
}

/// What a step gives a sequence that goes on.
pub(super) struct Next {
    /// None when the logits are not all finite.
    pub(super) drawn: Option<Drawn>,
    /// `[vocab_size]` when they are told, else none.
    pub(super) logits: Vec<f32>,
}

fn failure(error: SampleError) -> GenerateError {
    match error {
        SampleError::NotFinite(_) => GenerateError::Internal(error.to_string()),
        SampleError::Constraint(error) => error.into(),
    }
}

/// How a completion ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// With a token of the model's, or where its grammar ends.
    Token,
    /// Before a string of the client's.
    StopString,
    Length,
}
