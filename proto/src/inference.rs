//! `sirocco.inference.v1` in domain types: what a client asks of a router node and the events of its stream.

use std::time::Duration;

use sirocco_types::{FinishReason, Grammar, JsonSchema, Priority, Routing, SamplingParams, Timings, Usage};

use crate::Invalid;
pub use crate::wire::inference::inference_service_client::InferenceServiceClient;
pub use crate::wire::inference::inference_service_server::{InferenceService, InferenceServiceServer};
use crate::wire::inference::{self as wire, generate_response::Event as WireEvent};

/// A checked request for a completion.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateRequest {
    /// The model's name; none means the one served.
    pub model: Option<String>,
    /// What to complete.
    pub prompt: Prompt,
    /// How; `max_tokens` is `u32::MAX` when the client set none.
    pub sampling: SamplingParams,
    /// Whether the client chose `sampling.seed`; if not, the router draws one.
    pub seeded: bool,
    /// What to report of the computation.
    pub trace: Trace,
    /// Beside other requests, as far as the caller may.
    pub priority: Priority,
    /// Longest time to the last token that the request itself asks for.
    pub timeout: Option<Duration>,
    /// The completion's first tokens, which the client has: it goes on after them.
    pub generated: Vec<u32>,
    /// What the completion must be, and the field that says so.
    pub constraint: Option<(&'static str, Grammar)>,
}

/// What to complete.
#[derive(Clone, PartialEq, Eq)]
pub enum Prompt {
    /// To be tokenised with the model's special tokens.
    Text(String),
    /// Taken as they are.
    Ids(Vec<u32>),
}

impl Prompt {
    /// Refuses an empty prompt.
    pub fn validate(&self) -> Result<(), Invalid> {
        match self {
            Self::Text(text) if text.is_empty() => {
                Err(Invalid::new("text", "the prompt is empty, it must have at least 1 byte"))
            }
            Self::Ids(ids) if ids.is_empty() => {
                Err(Invalid::new("token_ids", "the prompt is empty, it must have at least 1 token"))
            }
            _ => Ok(()),
        }
    }
}

impl std::fmt::Debug for Prompt {
    /// Never shows the prompt: it may end up in a log.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Text(text) => write!(f, "Text({} bytes)", text.len()),
            Self::Ids(ids) => write!(f, "Ids({} tokens)", ids.len()),
        }
    }
}

/// What to report of the computation beside the tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Trace {
    /// Every token's logits.
    pub logits: bool,
    /// The experts of every position.
    pub routing: bool,
    /// Of the positions that are computed alone: what the KV cache has of the prompt is not computed for it.
    pub computed_only: bool,
}

impl TryFrom<wire::GenerateRequest> for GenerateRequest {
    type Error = Invalid;

    fn try_from(request: wire::GenerateRequest) -> Result<Self, Invalid> {
        use wire::generate_request::Prompt as WirePrompt;
        let prompt = match request.prompt {
            Some(WirePrompt::Text(text)) => Prompt::Text(text),
            Some(WirePrompt::TokenIds(ids)) => Prompt::Ids(ids.ids),
            None => return Err(Invalid::new("prompt", "absent, set text or token_ids")),
        };
        prompt.validate()?;
        let given = request.sampling.unwrap_or_default();
        let default = SamplingParams::default();
        let sampling = SamplingParams {
            repetition_penalty: given.repetition_penalty.unwrap_or(default.repetition_penalty),
            frequency_penalty: given.frequency_penalty.unwrap_or(default.frequency_penalty),
            presence_penalty: given.presence_penalty.unwrap_or(default.presence_penalty),
            logit_bias: given.logit_bias.into_iter().collect(),
            temperature: given.temperature.unwrap_or(default.temperature),
            top_k: given.top_k.unwrap_or(default.top_k),
            top_p: given.top_p.unwrap_or(default.top_p),
            min_p: given.min_p.unwrap_or(default.min_p),
            seed: given.seed.unwrap_or(default.seed),
            max_tokens: request.max_tokens.unwrap_or(u32::MAX),
            stop: request.stop,
            ignore_eos: request.ignore_eos,
            logprobs: request.logprobs,
        };
        sampling.validate()?;
        let priority = match wire::Priority::try_from(request.priority) {
            Ok(wire::Priority::Unspecified | wire::Priority::Normal) => Priority::Normal,
            Ok(wire::Priority::Low) => Priority::Low,
            Ok(wire::Priority::High) => Priority::High,
            Err(_) => return Err(Invalid::new("priority", format!("{}, must be from 0 to 3", request.priority))),
        };
        if request.timeout_ms == Some(0) {
            return Err(Invalid::new("timeout_ms", "0, must be at least 1"));
        }
        let generated = request.generated_token_ids;
        if !generated.is_empty() && given.seed.is_none() && sampling.temperature > 0.0 {
            return Err(Invalid::new(
                "sampling.seed",
                "absent, a completion goes on with the seed that `started` said",
            ));
        }
        if generated.len() > sampling.max_tokens as usize {
            let problem = format!("{} tokens, max_tokens is {}", generated.len(), sampling.max_tokens);
            return Err(Invalid::new("generated_token_ids", problem));
        }
        let constraint = request.constraint.map(constraint).transpose()?;
        if constraint.is_some() && sampling.ignore_eos {
            return Err(Invalid::new(
                "ignore_eos",
                "not supported together with a constraint, which says where to end",
            ));
        }
        let trace = request.trace.unwrap_or_default();
        Ok(Self {
            model: (!request.model.is_empty()).then_some(request.model),
            prompt,
            sampling,
            seeded: given.seed.is_some(),
            trace: Trace { logits: trace.logits, routing: trace.routing, computed_only: false },
            priority,
            timeout: request.timeout_ms.map(Duration::from_millis),
            generated,
            constraint,
        })
    }
}

/// The grammar a client wants, and the field's name. Whether it makes sense is seen when it is compiled.
fn constraint(given: wire::generate_request::Constraint) -> Result<(&'static str, Grammar), Invalid> {
    use wire::generate_request::Constraint;
    let (field, grammar) = match given {
        Constraint::JsonSchema(text) => ("json_schema", Grammar::Json(JsonSchema { text, strict: true })),
        Constraint::JsonObject(wire::JsonObject {}) => ("json_object", Grammar::Json(JsonSchema::object())),
        Constraint::Regex(text) => ("regex", Grammar::Regex(text)),
        Constraint::Lark(text) => ("lark", Grammar::Lark(text)),
    };
    grammar.validate().map_err(|error| Invalid::new(field, error.to_string()))?;
    Ok((field, grammar))
}

/// One event of a completion's stream.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The request was accepted.
    Started(Started),
    /// The next token.
    Token(Token),
    /// The end.
    Finished(Finished),
}

/// What is known once a request is accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Started {
    /// Names the request in logs.
    pub request_id: String,
    /// The model that answers.
    pub model: String,
    /// Tokens in the prompt.
    pub prompt_tokens: u32,
    /// What the draws depend on.
    pub seed: u64,
}

/// One generated token.
#[derive(Clone, PartialEq)]
pub struct Token {
    /// Counted from 0 within the completion.
    pub index: u32,
    /// Its id.
    pub id: u32,
    /// What it adds to the text.
    pub text: String,
    /// Natural logarithm of its probability, when asked for.
    pub logprob: Option<f32>,
    /// The most likely tokens, best first: id, log probability, text.
    pub top_logprobs: Vec<(u32, f32, String)>,
    /// `[vocab_size]`, when traced.
    pub logits: Vec<f32>,
    /// By layer, of the positions computed since the last token, when traced.
    pub routing: Vec<Routing>,
}

impl std::fmt::Debug for Token {
    /// Never shows the token: it may end up in a log.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Token({})", self.index)
    }
}

/// How a completion ended.
#[derive(Clone, PartialEq)]
pub struct Finished {
    /// Why.
    pub reason: FinishReason,
    /// Tokens it took.
    pub usage: Usage,
    /// Where its time went.
    pub timings: Timings,
    /// Text that was held back until it was known not to begin a stop string.
    pub text: String,
}

impl std::fmt::Debug for Finished {
    /// Never shows the text: it may end up in a log.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Finished({:?}, {:?})", self.reason, self.usage)
    }
}

impl From<Event> for wire::GenerateResponse {
    fn from(event: Event) -> Self {
        let event = match event {
            Event::Started(started) => WireEvent::Started(wire::Started {
                request_id: started.request_id,
                model: started.model,
                prompt_tokens: started.prompt_tokens,
                seed: started.seed,
            }),
            Event::Token(token) => WireEvent::Token(token.into()),
            Event::Finished(finished) => WireEvent::Finished(finished.into()),
        };
        Self { event: Some(event) }
    }
}

impl From<Token> for wire::Token {
    fn from(token: Token) -> Self {
        let top = token.top_logprobs.into_iter();
        Self {
            index: token.index,
            id: token.id,
            text: token.text,
            logprob: token.logprob,
            top_logprobs: top.map(|(id, logprob, text)| wire::TokenLogprob { id, logprob, text }).collect(),
            logits: bytemuck::cast_slice::<f32, u8>(&token.logits).to_vec().into(),
            routing: token.routing.into_iter().map(Into::into).collect(),
        }
    }
}

impl From<Routing> for wire::LayerRouting {
    fn from(routing: Routing) -> Self {
        Self {
            top_k: routing.top_k as u32,
            experts: routing.experts.into_iter().map(|expert| expert.0).collect(),
            weights: routing.weights,
        }
    }
}

impl From<Finished> for wire::Finished {
    fn from(finished: Finished) -> Self {
        let reason = match finished.reason {
            FinishReason::Stop => wire::FinishReason::Stop,
            FinishReason::Length => wire::FinishReason::Length,
        };
        Self {
            reason: reason.into(),
            usage: Some(wire::Usage {
                prompt_tokens: finished.usage.prompt_tokens,
                completion_tokens: finished.usage.completion_tokens,
                cached_tokens: finished.usage.cached_tokens,
            }),
            timings: Some(wire::Timings {
                queue_ms: finished.timings.queue_ms,
                first_token_ms: finished.timings.first_token_ms,
                total_ms: finished.timings.total_ms,
            }),
            text: finished.text,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(prompt: &str) -> wire::GenerateRequest {
        wire::GenerateRequest {
            prompt: Some(wire::generate_request::Prompt::Text(prompt.into())),
            ..Default::default()
        }
    }

    #[test]
    fn what_is_absent_has_the_documented_default() {
        let request = GenerateRequest::try_from(text("x")).unwrap();
        let expected = SamplingParams { max_tokens: u32::MAX, ..SamplingParams::default() };
        assert_eq!((request.sampling, request.seeded, request.model), (expected, false, None));
        assert_eq!((request.priority, request.timeout), (Priority::Normal, None));
    }

    #[test]
    fn a_bad_field_is_named() {
        use wire::generate_request::Constraint;
        let with_constraint = |constraint| wire::GenerateRequest { constraint: Some(constraint), ..text("x") };
        let with = |sampling| wire::GenerateRequest { sampling: Some(sampling), ..text("x") };
        let cases = [
            (wire::GenerateRequest::default(), "prompt"),
            (text(""), "text"),
            (with(wire::SamplingParams { temperature: Some(-1.0), ..Default::default() }), "temperature"),
            (with(wire::SamplingParams { top_p: Some(2.0), ..Default::default() }), "top_p"),
            (with(wire::SamplingParams { presence_penalty: Some(3.0), ..Default::default() }), "presence_penalty"),
            (with(wire::SamplingParams { frequency_penalty: Some(-3.0), ..Default::default() }), "frequency_penalty"),
            (with(wire::SamplingParams { logit_bias: [(1, 101.0)].into(), ..Default::default() }), "logit_bias"),
            (wire::GenerateRequest { max_tokens: Some(0), ..text("x") }, "max_tokens"),
            (wire::GenerateRequest { logprobs: Some(99), ..text("x") }, "logprobs"),
            (wire::GenerateRequest { priority: 4, ..text("x") }, "priority"),
            (wire::GenerateRequest { timeout_ms: Some(0), ..text("x") }, "timeout_ms"),
            (with_constraint(Constraint::JsonSchema(" ".repeat((64 << 10) + 1))), "json_schema"),
            (with_constraint(Constraint::Regex("a".repeat((16 << 10) + 1))), "regex"),
            (with_constraint(Constraint::Lark("a".repeat((16 << 10) + 1))), "lark"),
            (
                wire::GenerateRequest {
                    ignore_eos: true,
                    ..with_constraint(Constraint::JsonObject(wire::JsonObject {}))
                },
                "ignore_eos",
            ),
            (wire::GenerateRequest { generated_token_ids: vec![1], ..text("x") }, "sampling.seed"),
            (
                wire::GenerateRequest {
                    generated_token_ids: vec![1, 2],
                    max_tokens: Some(1),
                    ..with(wire::SamplingParams { seed: Some(1), ..Default::default() })
                },
                "generated_token_ids",
            ),
        ];
        for (request, field) in cases {
            assert_eq!(GenerateRequest::try_from(request).unwrap_err().field, field);
        }
    }

    #[test]
    fn a_constraint_is_a_grammar() {
        use wire::generate_request::Constraint;
        let schema = |text: &str| Grammar::Json(JsonSchema { text: text.into(), strict: true });
        let cases = [
            (Constraint::JsonSchema("{}".into()), "json_schema", schema("{}")),
            (Constraint::JsonObject(wire::JsonObject {}), "json_object", schema(r#"{"type": "object"}"#)),
            (Constraint::Regex("a+".into()), "regex", Grammar::Regex("a+".into())),
            (Constraint::Lark("start: \"a\"".into()), "lark", Grammar::Lark("start: \"a\"".into())),
        ];
        for (given, field, grammar) in cases {
            let request = wire::GenerateRequest { constraint: Some(given), ..text("x") };
            assert_eq!(GenerateRequest::try_from(request).unwrap().constraint, Some((field, grammar)));
        }
    }

    #[test]
    fn debug_shows_no_prompt_and_no_completion() {
        let request = GenerateRequest::try_from(text("secret")).unwrap();
        assert!(!format!("{request:?}").contains("secret"));
    }
}
