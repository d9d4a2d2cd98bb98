//! `POST /v1/completions` and `POST /v1/chat/completions`: from a request's body to its answer.

use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Json;
use axum::body::Body;
use axum::extract::{Extension, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use futures::stream::{Peekable, SelectAll, select_all};
use futures::{Stream, StreamExt as _};
use sirocco_model::Constraint;
use sirocco_proto::inference::{Event, Prompt, Trace};
use sirocco_types::Usage;

use super::answer::Head;
use super::body::Fields;
use super::choice::{Choice, Kind, Piece, Report};
use super::form::{Form, form};
use super::problem::Problem;
use super::sampling::{Drawing, drawing};
use super::{Api, body, prompts, stream};
use crate::callers::Caller;
use crate::deadline::Deadline;
use crate::engine::GenerateError;
use crate::intake::{Job, Refusal, RequestId, Terms};
use crate::metrics::{Outcome, Tracked};

/// The events of all choices, each with its choice's index, as they come.
pub(super) type Events = Pin<Box<Peekable<SelectAll<ChoiceEvents>>>>;
type ChoiceEvents = Pin<Box<dyn Stream<Item = (usize, Result<Event, GenerateError>)> + Send>>;

/// A request under way.
pub(super) struct Call {
    pub(super) head: Head,
    pub(super) report: Report,
    pub(super) choices: Vec<Choice>,
    pub(super) events: Events,
    /// So far.
    pub(super) usage: Usage,
    pub(super) include_usage: bool,
    pub(super) tracked: Tracked,
}

/// What a request asks, but for what is to be completed.
struct Asked {
    id: RequestId,
    kind: Kind,
    fields: Fields,
    drawing: Drawing,
    form: Form,
    /// What keeps completions to the form.
    constraint: Option<Constraint>,
    terms: Terms,
    tracked: Tracked,
}

/// What a prompt has become.
struct Tokens {
    ids: Vec<u32>,
    echo: String,
}

/// `POST /v1/completions`
pub(super) async fn completions(
    State(api): State<Api>,
    Extension(id): Extension<RequestId>,
    Extension(caller): Extension<Arc<Caller>>,
    Extension(tracked): Extension<Tracked>,
    body: Body,
) -> Result<Response, Problem> {
    let asked = Asked::read(&api, (id, tracked), &caller, Kind::Completion, body).await?;
    answer(asked.terms.deadline.within(begin_completion(&api, asked)).await?).await
}

async fn begin_completion(api: &Api, asked: Asked) -> Result<Call, Problem> {
    let prompts = prompts::of_completion(&asked.fields.prompt)?;
    let most = api.intake.policy.max_choices as usize;
    if prompts.len() * asked.drawing.n > most {
        let (prompts, n) = (prompts.len(), asked.drawing.n);
        let problem = format!("{prompts} prompts with {n} choices each, there may be {most} choices in all");
        return Err(Problem::invalid("prompt", problem));
    }
    let mut tokens = Vec::with_capacity(prompts.len());
    for (param, prompt) in prompts {
        let text = match &prompt {
            Prompt::Text(text) => Some(text.clone()),
            Prompt::Ids(_) => None,
        };
        let ids = api.intake.tokens(prompt).await.map_err(|refusal| Problem::from(refusal).blamed_on(&param))?;
        let echo = match asked.fields.echo {
            Some(true) => text.unwrap_or_else(|| api.intake.tokenizer.decode(&ids)),
            _ => String::new(),
        };
        tokens.push(Tokens { ids, echo });
    }
    asked.call(api, tokens)
}

/// `POST /v1/chat/completions`
pub(super) async fn chat_completions(
    State(api): State<Api>,
    Extension(id): Extension<RequestId>,
    Extension(caller): Extension<Arc<Caller>>,
    Extension(tracked): Extension<Tracked>,
    body: Body,
) -> Result<Response, Problem> {
    let asked = Asked::read(&api, (id, tracked), &caller, Kind::Chat, body).await?;
    answer(asked.terms.deadline.within(begin_chat(&api, asked)).await?).await
}

async fn begin_chat(api: &Api, asked: Asked) -> Result<Call, Problem> {
    let messages = prompts::of_chat(&asked.fields.messages)?;
    let tools = asked.form.tools.clone();
    let chat = Arc::clone(&api.chat);
    // A template may take its time, so it does not run on the I/O runtime.
    let rendered = tokio::task::spawn_blocking(move || match &*chat {
        Ok(template) => template.render(&messages, &tools).map_err(|error| error.to_string()),
        Err(problem) => Err(format!("{problem}; /v1/completions takes a prompt as it is")),
    });
    let rendered =
        rendered.await.map_err(|error| Problem::new(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))?;
    let text = rendered.map_err(|problem| Problem::invalid("messages", problem))?;
    let blame = |refusal| Problem::from(refusal).blamed_on("messages");
    let ids = api.intake.encode(text, false).await.map_err(blame)?;
    let ids = api.intake.tokens(Prompt::Ids(ids)).await.map_err(blame)?;
    asked.call(api, vec![Tokens { ids, echo: String::new() }])
}

impl Call {
    /// Adds what a choice that has ended took.
    pub(super) fn count(&mut self, event: &Event) {
        if let Event::Finished(finished) = event {
            self.usage.completion_tokens += finished.usage.completion_tokens;
            self.usage.cached_tokens += finished.usage.cached_tokens;
        }
    }
}

impl Asked {
    /// Lets the request in, then reads and checks `body`.
    async fn read(
        api: &Api,
        (id, tracked): (RequestId, Tracked),
        caller: &Arc<Caller>,
        kind: Kind,
        body: Body,
    ) -> Result<Self, Problem> {
        let arrived = Instant::now();
        let admission = caller.admit(arrived).map_err(Refusal::from)?;
        let policy = &api.intake.policy;
        let fields = body::read(body, policy).await?;
        api.intake.check_model(fields.model.as_deref().unwrap_or_default())?;
        if fields.stream_options.is_some() && fields.stream != Some(true) {
            return Err(Problem::invalid("stream_options", "it needs stream to be true"));
        }
        let (mut drawing, form) = (drawing(kind, &fields, policy)?, form(kind, &fields)?);
        let deadline = Deadline::new(arrived, policy.request_timeout(), timeout(&fields)?);
        let constraint = match form.grammar.clone() {
            Some(grammar) => {
                let compiled = deadline.within(api.intake.constrain(grammar, Vec::new())).await;
                Some(compiled.map_err(|refusal| match refusal {
                    Refusal::Grammar(error) => form.blame(&error),
                    refusal => refusal.into(),
                })?)
            }
            None => None,
        };
        if form.must_call() {
            // They end texts; a call that they cut would be none.
            drawing.params.stop = Vec::new();
        }
        let terms = Terms { arrived, deadline, priority: fields.priority.unwrap_or_default(), admission };
        Ok(Self { id, kind, fields, drawing, form, constraint, terms, tracked })
    }

    /// Hands every choice for `prompts` to the engine.
    fn call(self, api: &Api, prompts: Vec<Tokens>) -> Result<Call, Problem> {
        let Self { id, kind, fields, drawing, form, constraint, terms, tracked } = self;
        let report = Report {
            kind,
            logprobs: drawing.params.logprobs.map(|_| Arc::clone(&api.intake.tokenizer)),
            token_ids: fields.return_token_ids == Some(true),
            experts: (fields.return_experts == Some(true)).then(|| Arc::clone(&api.intake.tokenizer)),
            stream: fields.stream == Some(true),
            calls: form.calls().then(|| (api.intake.marker(), id.log.clone())),
        };
        let prompt_tokens = prompts.iter().map(|prompt| prompt.ids.len() as u32).sum();
        let (mut jobs, mut choices) = (Vec::new(), Vec::new());
        for Tokens { ids, echo } in prompts {
            for of_prompt in 0..drawing.n {
                let index = jobs.len();
                let sampling = drawing.choice(index, of_prompt);
                jobs.push(Job {
                    id: format!("{}.{index}", id.log),
                    prompt: ids.clone(),
                    generated: Vec::new(),
                    sampling,
                    constraint: constraint.clone(),
                    // The token's own position is always computed.
                    trace: Trace { routing: report.experts.is_some(), computed_only: true, ..Trace::default() },
                });
                let shown = if report.token_ids { ids.clone() } else { Vec::new() };
                choices.push(Choice::new(report.clone(), index, shown, echo.clone()));
            }
        }
        let streams = api.intake.submit(jobs, &terms).map_err(|refusal| {
            let problem = Problem::from(refusal);
            let renamed = problem.param.as_deref() == Some("max_tokens") && fields.max_completion_tokens.is_some();
            if renamed { problem.blamed_on("max_completion_tokens") } else { problem }
        })?;
        let events = streams
            .into_iter()
            .enumerate()
            .map(|(index, events)| -> ChoiceEvents { Box::pin(events.map(move |event| (index, event))) });
        Ok(Call {
            head: Head::new(kind, &id.log, &api.intake.model),
            report,
            choices,
            events: Box::pin(select_all(events).peekable()),
            usage: Usage { prompt_tokens, ..Usage::default() },
            include_usage: fields.stream_options.is_some_and(|options| options.include_usage == Some(true)),
            tracked,
        })
    }
}

/// The time the request asks for.
fn timeout(fields: &Fields) -> Result<Option<Duration>, Problem> {
    let Some(seconds) = fields.timeout else { return Ok(None) };
    // What is too long for a duration is too long for the router, whose limit then counts.
    let timeout =
        if seconds > 0.0 { Some(Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)) } else { None };
    timeout.map(Some).ok_or_else(|| Problem::invalid("timeout", format!("{seconds} s, must be more than 0")))
}

/// Waits for the first event, so that a failure before it has its own status, and answers.
async fn answer(mut call: Call) -> Result<Response, Problem> {
    if let Some((_, Err(error))) = call.events.as_mut().peek().await {
        return Err(error.clone().into());
    }
    if call.report.stream {
        return Ok(stream::sse(call));
    }
    let mut pieces: Vec<Piece> = call.choices.iter().map(|_| Piece::default()).collect();
    while let Some((index, event)) = call.events.next().await {
        let event = event?;
        call.count(&event);
        pieces[index].add(event);
    }
    call.tracked.end(Outcome::Ok);
    let choices = call.choices.iter_mut().zip(&pieces).map(|(choice, piece)| choice.whole(piece)).collect();
    Ok(Json(call.head.whole(choices, call.usage)).into_response())
}
