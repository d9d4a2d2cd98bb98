//! A request's bytes and the fields in them. What a field means is decided elsewhere; what is unknown is ignored, as OpenAI's
//! clients expect.

use std::collections::BTreeMap;

use axum::body::Body;
use axum::http::StatusCode;
use futures::StreamExt as _;
use serde::Deserialize;
use serde_json::Value;
use sirocco_types::Priority;

use super::problem::Problem;
use crate::policy::Policy;

/// Of a longer body this much more is read and thrown away, so that a client that is still writing sees the refusal.
const DISCARDED_BYTES: usize = 64 << 20;

/// The fields of both kinds of request. An absent field and `null` are the same.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Fields {
    pub(super) model: Option<String>,
    /// See [`super::prompts`].
    pub(super) prompt: Value,
    /// See [`super::prompts`].
    pub(super) messages: Value,
    pub(super) max_tokens: Option<u32>,
    pub(super) max_completion_tokens: Option<u32>,
    pub(super) temperature: Option<f32>,
    pub(super) top_p: Option<f32>,
    pub(super) top_k: Option<i64>,
    pub(super) min_p: Option<f32>,
    pub(super) presence_penalty: Option<f32>,
    pub(super) frequency_penalty: Option<f32>,
    pub(super) repetition_penalty: Option<f32>,
    /// By token id in decimal.
    pub(super) logit_bias: Option<BTreeMap<String, f32>>,
    pub(super) seed: Option<serde_json::Number>,
    pub(super) n: Option<u32>,
    pub(super) best_of: Option<u32>,
    /// A string or a list of strings.
    pub(super) stop: Value,
    pub(super) ignore_eos: Option<bool>,
    /// A number for completions, a boolean for chats.
    pub(super) logprobs: Value,
    pub(super) top_logprobs: Option<u32>,
    pub(super) echo: Option<bool>,
    pub(super) return_token_ids: Option<bool>,
    /// Of every token, by layer, which experts it went through.
    pub(super) return_experts: Option<bool>,
    pub(super) stream: Option<bool>,
    pub(super) priority: Option<Priority>,
    /// In seconds.
    pub(super) timeout: Option<f64>,
    pub(super) stream_options: Option<StreamOptions>,
    response_format: Option<ResponseFormat>,
    tools: Value,
    tool_choice: Value,
    functions: Value,
    function_call: Value,
    audio: Value,
    suffix: Option<String>,
}

/// What a stream says beside its choices.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct StreamOptions {
    /// End with the usage of the whole request.
    pub(super) include_usage: Option<bool>,
}

#[derive(Debug, Deserialize)]
struct ResponseFormat {
    r#type: String,
}

/// Reads a request. Errors: 413 when it is too long, 408 when it comes too slowly, 400 when it is not JSON or a field has the wrong type, saying where.
pub(super) async fn read(body: Body, policy: &Policy) -> Result<Fields, Problem> {
    let arrived = tokio::time::timeout(policy.body_timeout(), bytes(body, policy.max_body_bytes)).await;
    let late = |_| {
        let message = format!("the body did not arrive within {} s", policy.body_timeout_s);
        Problem::new(StatusCode::REQUEST_TIMEOUT, message)
    };
    parse(&arrived.map_err(late)??)
}

async fn bytes(body: Body, most: usize) -> Result<Vec<u8>, Problem> {
    let (mut bytes, mut discarded) = (Vec::new(), 0);
    let mut pieces = body.into_data_stream();
    while let Some(piece) = pieces.next().await {
        let piece = piece.map_err(|error| Problem::new(StatusCode::BAD_REQUEST, format!("the body: {error}")))?;
        if discarded == 0 && bytes.len() + piece.len() <= most {
            bytes.extend_from_slice(&piece);
            continue;
        }
        bytes = Vec::new();
        discarded += piece.len();
        if discarded > DISCARDED_BYTES {
            break;
        }
    }
    if discarded > 0 {
        let message = format!("the body is too long, it may have at most {most} bytes");
        return Err(Problem::new(StatusCode::PAYLOAD_TOO_LARGE, message));
    }
    Ok(bytes)
}

fn parse(bytes: &[u8]) -> Result<Fields, Problem> {
    // A list would be taken for the fields in their order.
    if !bytes.trim_ascii_start().starts_with(b"{") {
        return Err(Problem::new(StatusCode::BAD_REQUEST, "the body must be a JSON object"));
    }
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let fields: Fields = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = error.path().to_string();
        let inner = error.into_inner();
        match inner.classify() {
            serde_json::error::Category::Data if path != "." => Problem::invalid(path, inner),
            _ => Problem::new(StatusCode::BAD_REQUEST, format!("the body is not valid JSON: {inner}")),
        }
    })?;
    json.end()
        .map_err(|error| Problem::new(StatusCode::BAD_REQUEST, format!("the body goes on after its JSON: {error}")))?;
    fields.refuse_unsupported()?;
    Ok(fields)
}

impl Fields {
    /// Refuses what would change the answer in a way that is not served.
    fn refuse_unsupported(&self) -> Result<(), Problem> {
        let idle = |choice: &Value| choice.is_null() || choice == "none" || choice == "auto";
        let refused = [
            ("tools", self.tools.is_null()),
            ("tool_choice", idle(&self.tool_choice)),
            ("functions", self.functions.is_null()),
            ("function_call", idle(&self.function_call)),
            ("audio", self.audio.is_null()),
            ("suffix", self.suffix.as_deref().is_none_or(str::is_empty)),
            ("response_format", self.response_format.as_ref().is_none_or(|format| format.r#type == "text")),
        ];
        match refused.into_iter().find(|(_, served)| !served) {
            Some((param, _)) => Err(Problem::unsupported(param)),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(json: &str) -> Problem {
        parse(json.as_bytes()).unwrap_err()
    }

    #[test]
    fn unknown_fields_and_null_are_tolerated() {
        let text = r#"{"model": null, "temperature": null, "user": "u", "metadata": {"a": [1]}, "what": {"is": "this"},
                       "tools": null, "tool_choice": "none", "response_format": {"type": "text"}, "suffix": ""}"#;
        let fields = parse(text.as_bytes()).unwrap();
        assert_eq!((fields.model, fields.temperature), (None, None));
    }

    #[test]
    fn what_is_not_served_is_refused_by_name() {
        let cases = [
            ("tools", r#"[{"type": "function"}]"#),
            ("tools", "[]"),
            ("tool_choice", r#""required""#),
            ("functions", "[]"),
            ("function_call", r#"{"name": "f"}"#),
            ("audio", r#"{"voice": "x"}"#),
            ("suffix", r#""x""#),
            ("response_format", r#"{"type": "json_object"}"#),
        ];
        for (param, value) in cases {
            let problem = problem(&format!("{{\"{param}\": {value}}}"));
            assert_eq!((problem.status.as_u16(), problem.param.as_deref()), (400, Some(param)));
            assert!(problem.message.contains("not supported"), "{}", problem.message);
        }
    }

    #[test]
    fn a_wrong_type_names_its_field_and_bad_json_its_place() {
        let cases = [
            (r#"{"temperature": "hot"}"#, Some("temperature"), "invalid type"),
            (r#"{"priority": "urgent"}"#, Some("priority"), "unknown variant"),
            (r#"{"timeout": "1m"}"#, Some("timeout"), "f64"),
            (r#"{"max_tokens": -1}"#, Some("max_tokens"), "u32"),
            (r#"{"stream_options": {"include_usage": 3}}"#, Some("stream_options.include_usage"), "bool"),
            (r#"{"logit_bias": {"5": "x"}}"#, Some("logit_bias.5"), "f32"),
            ("{\n  \"n\": ]", None, "line 2 column"),
            ("[1]", None, "JSON object"),
            ("", None, "JSON object"),
            ("{} {}", None, "goes on"),
        ];
        for (json, param, part) in cases {
            let problem = problem(json);
            assert_eq!((problem.status.as_u16(), problem.param.as_deref()), (400, param), "{json}");
            assert!(problem.message.contains(part), "{json}: {}", problem.message);
        }
    }

    #[tokio::test]
    async fn a_body_may_have_as_many_bytes_as_the_policy_says() {
        let policy = Policy { max_body_bytes: 4096, ..Policy::default() };
        let padded = |bytes: usize| format!("{{{}}}", " ".repeat(bytes - 2));
        assert!(read(padded(4096).into(), &policy).await.is_ok());
        let problem = read(padded(4097).into(), &policy).await.unwrap_err();
        assert_eq!(problem.status.as_u16(), 413);
        assert!(problem.message.contains("4096"), "{}", problem.message);
    }
}
