//! The one way in to the engine, for every API: checks, tokenises, submits. Never answers clients itself.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use sirocco_model::{Tokenizer, TokenizerError};
use sirocco_process::http::Health;
use sirocco_proto::Invalid;
use sirocco_proto::inference::{Event, Prompt, Trace};
use sirocco_types::{ModelIdentity, SamplingParams};
use tokio::sync::mpsc;

use crate::engine::{self, Engine, GenerateError, SubmitError};
use crate::scheduler::Flow;

/// What the APIs of a router node share.
#[derive(Debug)]
pub(crate) struct Intake {
    pub(crate) model: Arc<ModelIdentity>,
    pub(crate) tokenizer: Arc<Tokenizer>,
    engine: Engine,
    health: Health,
    /// Differs between processes, so that request ids do.
    incarnation: u64,
    requests: AtomicU64,
}

/// A sequence to compute.
#[derive(Debug)]
pub(crate) struct Job {
    /// Names it in logs.
    pub(crate) id: String,
    /// Whose it is, and how urgent.
    pub(crate) flow: Flow,
    /// From [`Intake::tokens`].
    pub(crate) prompt: Vec<u32>,
    /// The completion's first tokens, which the client has.
    pub(crate) generated: Vec<u32>,
    /// Valid by itself; `max_tokens` may be more than the context has room for.
    pub(crate) sampling: SamplingParams,
    pub(crate) trace: Trace,
}

/// What a sequence's client is told.
pub(crate) type Events = mpsc::Receiver<Result<Event, GenerateError>>;

/// Why a request was not taken in.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("model: {given:?} is not served here, {served:?} is")]
    UnknownModel { given: String, served: String },
    #[error(transparent)]
    Invalid(#[from] Invalid),
    #[error("the router is not ready: {0}")]
    NotReady(String),
    #[error(transparent)]
    Submit(#[from] SubmitError),
    #[error("{0}")]
    Internal(String),
}

impl Intake {
    pub(crate) fn new(model: Arc<ModelIdentity>, tokenizer: Arc<Tokenizer>, engine: Engine, health: Health) -> Self {
        let incarnation = sirocco_process::incarnation();
        Self { model, tokenizer, engine, health, incarnation, requests: AtomicU64::new(0) }
    }

    /// Refuses a model that is not the one served; the empty name means that one.
    pub(crate) fn check_model(&self, name: &str) -> Result<(), Refusal> {
        if name.is_empty() || name == self.model.name {
            return Ok(());
        }
        Err(Refusal::UnknownModel { given: name.to_owned(), served: self.model.name.clone() })
    }

    /// The token ids of `prompt`: at least one, within the vocabulary, fewer than the model's context. Errors name the field
    /// `text`, `token_ids` or `prompt`.
    pub(crate) async fn tokens(self: &Arc<Self>, prompt: Prompt) -> Result<Vec<u32>, Refusal> {
        let ids = match prompt {
            Prompt::Text(text) => self.encode(text, true).await?,
            Prompt::Ids(ids) => {
                self.tokenizer.check(&ids).map_err(|error| invalid("token_ids", &error))?;
                ids
            }
        };
        let context = self.model.spec.max_position_embeddings;
        if ids.is_empty() {
            return Err(Invalid::new("prompt", "it has no tokens, it must have at least 1").into());
        }
        if ids.len() >= context {
            let problem = format!(
                "it is {} tokens long, the model's context is {context} with at least 1 left to generate",
                ids.len()
            );
            return Err(Invalid::new("prompt", problem).into());
        }
        Ok(ids)
    }

    /// The ids of `text`, with or without the model's special tokens. A long text takes a while, so it is not done on the
    /// I/O runtime.
    pub(crate) async fn encode(self: &Arc<Self>, text: String, special_tokens: bool) -> Result<Vec<u32>, Refusal> {
        let tokenizer = Arc::clone(&self.tokenizer);
        let encoded = tokio::task::spawn_blocking(move || tokenizer.encode(&text, special_tokens)).await;
        let encoded = encoded.map_err(|error| Refusal::Internal(error.to_string()))?;
        Ok(encoded.map_err(|error| invalid("text", &error))?)
    }

    /// Refuses a bias of ids outside the vocabulary.
    fn check_bias(&self, sampling: &SamplingParams) -> Result<(), Refusal> {
        let ids: Vec<u32> = sampling.logit_bias.keys().copied().collect();
        Ok(self.tokenizer.check(&ids).map_err(|error| invalid("logit_bias", &error))?)
    }

    /// Hands `jobs`, which arrived at `arrived`, to the engine: all of them or none.
    pub(crate) fn submit(&self, jobs: Vec<Job>, arrived: Instant) -> Result<Vec<Events>, Refusal> {
        if let Some(obstacle) = self.health.obstacle() {
            return Err(Refusal::NotReady(obstacle));
        }
        let mut streams = Vec::with_capacity(jobs.len());
        let mut requests = Vec::with_capacity(jobs.len());
        for Job { id, flow, prompt, generated, mut sampling, trace } in jobs {
            self.check_bias(&sampling)?;
            self.tokenizer.check(&generated).map_err(|error| invalid("generated_token_ids", &error))?;
            let room = self.model.spec.max_position_embeddings - prompt.len();
            if generated.len() > room {
                let problem = format!("{} tokens, after the prompt there is room for {room}", generated.len());
                return Err(Invalid::new("generated_token_ids", problem).into());
            }
            sampling.max_tokens = sampling.max_tokens.min(room as u32);
            // Room for every token and the end, so that the engine never waits for a slow client.
            let (events, stream) = mpsc::channel(sampling.max_tokens as usize + 2);
            requests.push(engine::Request { id, flow, prompt, generated, sampling, trace, arrived, events });
            streams.push(stream);
        }
        let accepted: Vec<_> = requests.iter().map(|r| (r.id.clone(), r.prompt.len(), r.sampling.max_tokens)).collect();
        self.engine.submit(requests)?;
        for (request, prompt_tokens, max_tokens) in accepted {
            tracing::debug!(request, prompt_tokens, max_tokens, "accepted");
        }
        Ok(streams)
    }

    /// A name for the next request.
    pub(crate) fn request_id(&self) -> String {
        format!("{:x}-{}", self.incarnation, self.requests.fetch_add(1, Ordering::Relaxed))
    }
}

fn invalid(field: &str, error: &TokenizerError) -> Invalid {
    Invalid::new(field, error.to_string())
}
