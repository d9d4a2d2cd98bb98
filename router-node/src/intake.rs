//! The one way in to the engine, for every API: checks, tokenises, submits. Never answers clients itself.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use sirocco_model::{Constraint, GrammarError, Grammars, Marker, Tokenizer, TokenizerError};
use sirocco_process::http::Health;
use sirocco_proto::Invalid;
use sirocco_proto::inference::{Event, Prompt, Trace};
use sirocco_types::{Grammar, ModelIdentity, SamplingParams};
use tokio::sync::{Semaphore, mpsc};

use crate::engine::{self, Engine, GenerateError, SubmitError};
use crate::scheduler::Flow;

/// Grammars that are compiled at once.
const COMPILERS: usize = 2;
/// Longest wait for a compiled grammar, others before it included.
const COMPILE_TIMEOUT: Duration = Duration::from_secs(10);

/// What constrains completions of the model, or why nothing can.
pub(crate) type Grammatical = Result<Grammars, TokenizerError>;

/// What the APIs of a router node share.
#[derive(Debug)]
pub(crate) struct Intake {
    pub(crate) model: Arc<ModelIdentity>,
    pub(crate) tokenizer: Arc<Tokenizer>,
    grammars: Arc<Grammatical>,
    compilers: Arc<Semaphore>,
    engine: Engine,
    health: Health,
    /// Differs between processes, so that request ids do.
    incarnation: u64,
    requests: AtomicU64,
}

/// What is known of the model.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) model: Arc<ModelIdentity>,
    pub(crate) tokenizer: Arc<Tokenizer>,
    pub(crate) grammars: Grammatical,
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
    /// From [`Intake::constrain`].
    pub(crate) constraint: Option<Constraint>,
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
    /// The grammar cannot be used.
    #[error("{0}")]
    Grammar(#[from] GrammarError),
    #[error("the router is not ready: {0}")]
    NotReady(String),
    #[error(transparent)]
    Submit(#[from] SubmitError),
    #[error("{0}")]
    Internal(String),
}

impl Intake {
    pub(crate) fn new(parts: Parts, engine: Engine, health: Health) -> Self {
        let Parts { model, tokenizer, grammars } = parts;
        Self {
            model,
            tokenizer,
            grammars: Arc::new(grammars),
            compilers: Arc::new(Semaphore::new(COMPILERS)),
            engine,
            health,
            incarnation: sirocco_process::incarnation(),
            requests: AtomicU64::new(0),
        }
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

    /// How calls of tools are marked in completions.
    pub(crate) fn marker(&self) -> Marker {
        Marker::of(&self.tokenizer)
    }

    /// What keeps a completion within `grammar` that begins with the tokens `generated`. Compiling takes a while, so it is not done
    /// on the I/O runtime, and few are compiled at once.
    pub(crate) async fn constrain(
        self: &Arc<Self>,
        grammar: Grammar,
        generated: Vec<u32>,
    ) -> Result<Constraint, Refusal> {
        let (grammars, compilers) = (Arc::clone(&self.grammars), Arc::clone(&self.compilers));
        let refused = |reason: String| Refusal::Grammar(GrammarError { tool: None, reason });
        let compiled = async {
            let permit = compilers.acquire_owned().await.map_err(|error| Refusal::Internal(error.to_string()))?;
            let compile = move || {
                let _permit = permit;
                let grammars = grammars.as_ref().as_ref().map_err(|error| refused(error.to_string()))?;
                let mut constraint = grammars.compile(&grammar)?;
                let taken = constraint.take_in(&generated);
                taken.map_err(|error| Invalid::new("generated_token_ids", error.to_string()))?;
                Ok(constraint)
            };
            tokio::task::spawn_blocking(compile).await.map_err(|error| Refusal::Internal(error.to_string()))?
        };
        let late = |_| refused(format!("it could not be compiled within {} s", COMPILE_TIMEOUT.as_secs()));
        tokio::time::timeout(COMPILE_TIMEOUT, compiled).await.map_err(late)?
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
        for Job { id, flow, prompt, generated, mut sampling, constraint, trace } in jobs {
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
            requests.push(engine::Request {
                id,
                flow,
                prompt,
                generated,
                sampling,
                constraint,
                trace,
                arrived,
                events,
            });
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
