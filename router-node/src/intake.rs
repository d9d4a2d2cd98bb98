//! The one way in to the engine, for every API: checks, tokenises, submits. Never answers clients itself.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use sirocco_model::{Constraint, GrammarError, Grammars, Marker, Tokenizer, TokenizerError};
use sirocco_process::http::Health;
use sirocco_proto::Invalid;
use sirocco_proto::inference::{Prompt, Trace};
use sirocco_types::{Grammar, ModelIdentity, Priority, SamplingParams};
use tokio::sync::{Semaphore, mpsc};

use crate::callers::{Admission, Callers, Limited, Unidentified};
use crate::deadline::{Deadline, Overdue};
use crate::engine::{self, Engine, SubmitError};
use crate::events::Events;
use crate::metrics::Metrics;
use crate::policy::Policy;

/// Longest request id taken from a client.
const REQUEST_ID_BYTES: usize = 128;
/// After how long a client may try again when the queue was full.
const RETRY_FULL: Duration = Duration::from_secs(1);
/// After how long a client may try again when experts or the router were not available.
pub(crate) const RETRY_UNAVAILABLE: Duration = Duration::from_secs(5);
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
    pub(crate) callers: Callers,
    pub(crate) policy: Policy,
    pub(crate) metrics: Arc<Metrics>,
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

/// What holds for all sequences of a request.
#[derive(Clone, Debug)]
pub(crate) struct Terms {
    pub(crate) arrived: Instant,
    pub(crate) deadline: Deadline,
    pub(crate) priority: Priority,
    pub(crate) admission: Arc<Admission>,
}

/// What a request is called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RequestId {
    /// In logs; made here, so that no two are the same.
    pub(crate) log: String,
    /// In answers: the client's own, if it sent one that can be repeated.
    pub(crate) shown: String,
}

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
    Unidentified(#[from] Unidentified),
    #[error(transparent)]
    Limited(#[from] Limited),
    #[error(transparent)]
    Overdue(#[from] Overdue),
    #[error(transparent)]
    Submit(#[from] SubmitError),
    #[error("{0}")]
    Internal(String),
}

impl Refusal {
    /// After how long the same request may be taken in; none when that is not to be expected.
    pub(crate) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Limited(limited) => Some(limited.retry_after),
            Self::Submit(SubmitError::Full(_)) => Some(RETRY_FULL),
            Self::NotReady(_) | Self::Submit(SubmitError::Stopped) => Some(RETRY_UNAVAILABLE),
            _ => None,
        }
    }
}

/// What an intake is made of.
#[derive(Debug)]
pub(crate) struct IntakeParts {
    pub(crate) model: Arc<ModelIdentity>,
    pub(crate) tokenizer: Arc<Tokenizer>,
    pub(crate) grammars: Grammatical,
    pub(crate) callers: Callers,
    pub(crate) policy: Policy,
    pub(crate) engine: Engine,
    pub(crate) health: Health,
    pub(crate) metrics: Arc<Metrics>,
}

impl Intake {
    pub(crate) fn new(parts: IntakeParts) -> Self {
        let IntakeParts { model, tokenizer, grammars, callers, policy, engine, health, metrics } = parts;
        Self {
            model,
            tokenizer,
            grammars: Arc::new(grammars),
            compilers: Arc::new(Semaphore::new(COMPILERS)),
            callers,
            policy,
            metrics,
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
        if let Some(most) = self.policy.max_prompt_tokens
            && ids.len() > most as usize
        {
            let problem = format!("it is {} tokens long, this router takes at most {most}", ids.len());
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

    /// `asked` as far as the router and the context, with `room` after the prompt, go; a request that says more than the router
    /// allows is refused, one that says nothing (`u32::MAX`) is not.
    fn max_tokens(&self, asked: u32, room: usize) -> Result<u32, Invalid> {
        let most = self.policy.max_completion_tokens.unwrap_or(u32::MAX);
        if asked > most && asked != u32::MAX {
            return Err(Invalid::new("max_tokens", format!("{asked}, this router generates at most {most}")));
        }
        Ok(asked.min(most).min(room as u32))
    }

    /// Hands `jobs` to the engine: all of them or none.
    pub(crate) fn submit(&self, jobs: Vec<Job>, terms: &Terms) -> Result<Vec<Events>, Refusal> {
        if let Some(obstacle) = self.health.obstacle() {
            return Err(Refusal::NotReady(obstacle));
        }
        let mut streams = Vec::with_capacity(jobs.len());
        let mut requests = Vec::with_capacity(jobs.len());
        let Terms { arrived, deadline, priority, ref admission } = *terms;
        let flow = admission.caller.flow(priority);
        for Job { id, prompt, generated, mut sampling, constraint, trace } in jobs {
            self.check_bias(&sampling)?;
            self.tokenizer.check(&generated).map_err(|error| invalid("generated_token_ids", &error))?;
            let room = self.model.spec.max_position_embeddings - prompt.len();
            if generated.len() > room {
                let problem = format!("{} tokens, after the prompt there is room for {room}", generated.len());
                return Err(Invalid::new("generated_token_ids", problem).into());
            }
            sampling.max_tokens = self.max_tokens(sampling.max_tokens, room)?;
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
                deadline,
                events,
            });
            streams.push(Events::new(stream, deadline, Arc::clone(admission)));
        }
        let accepted: Vec<_> = requests.iter().map(|r| (r.id.clone(), r.prompt.len(), r.sampling.max_tokens)).collect();
        let tokens = requests.iter().map(|r| r.prompt.len() + r.generated.len()).sum::<usize>() as u32;
        if let Some(most) = admission.most_tokens()
            && tokens > most
        {
            let problem =
                format!("{tokens} tokens with all choices, {} may use {most} a minute", admission.caller.name);
            return Err(Invalid::new("prompt", problem).into());
        }
        admission.take_tokens(tokens, Instant::now())?;
        self.engine.submit(requests).inspect_err(|_| admission.refund_tokens(tokens))?;
        for (request, prompt_tokens, max_tokens) in accepted {
            tracing::debug!(request, prompt_tokens, max_tokens, "accepted");
        }
        Ok(streams)
    }

    /// Names the next request, whose client calls it `own`.
    pub(crate) fn request_id(&self, own: Option<&[u8]>) -> RequestId {
        let log = format!("{:x}-{}", self.incarnation, self.requests.fetch_add(1, Ordering::Relaxed));
        let shown = own.and_then(plain).map_or_else(|| log.clone(), str::to_owned);
        RequestId { log, shown }
    }
}

/// A client's request id, if it can be repeated and logged as it is.
fn plain(id: &[u8]) -> Option<&str> {
    let fits = (1..=REQUEST_ID_BYTES).contains(&id.len()) && id.iter().all(u8::is_ascii_graphic);
    std::str::from_utf8(id).ok().filter(|_| fits)
}

fn invalid(field: &str, error: &TokenizerError) -> Invalid {
    Invalid::new(field, error.to_string())
}
