//! What went wrong, in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`, with the status that belongs to it.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use sirocco_proto::Invalid;

use crate::engine::{GenerateError, SubmitError};
use crate::intake::Refusal;
use crate::metrics::Outcome;

/// Seconds after which a client may try again when the queue was full.
const RETRY_FULL_S: u16 = 1;
/// Seconds after which a client may try again when experts or the router were not available.
const RETRY_UNAVAILABLE_S: u16 = 5;

/// An answer that is an error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Problem {
    pub(super) status: StatusCode,
    pub(super) message: String,
    /// The request's field that is to blame.
    pub(super) param: Option<String>,
    code: Option<&'static str>,
    /// How the request is counted.
    pub(super) outcome: Outcome,
}

impl Problem {
    /// A problem that no single field is to blame for.
    pub(super) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        let code = match status {
            StatusCode::TOO_MANY_REQUESTS => Some("queue_full"),
            StatusCode::SERVICE_UNAVAILABLE => Some("unavailable"),
            StatusCode::INTERNAL_SERVER_ERROR => Some("internal_error"),
            _ => None,
        };
        let outcome = if status.is_server_error() { Outcome::Internal } else { Outcome::Invalid };
        Self { status, message: message.into(), param: None, code, outcome }
    }

    /// A request that can never succeed because of `param`.
    pub(super) fn invalid(param: impl Into<String>, problem: impl std::fmt::Display) -> Self {
        let param = param.into();
        let message = format!("{param}: {problem}");
        Self { param: Some(param), ..Self::new(StatusCode::BAD_REQUEST, message) }
    }

    /// A field of OpenAI's that is not served.
    pub(super) fn unsupported(param: impl Into<String>) -> Self {
        let problem = Self::invalid(param, "not supported in this version; leave it out");
        Self { code: Some("unsupported_parameter"), ..problem }
    }

    /// The same problem, blamed on `param`: clients know a field under another name than the engine.
    pub(super) fn blamed_on(self, param: &str) -> Self {
        let Some(old) = &self.param else { return self };
        let problem = self.message.strip_prefix(&format!("{old}: ")).unwrap_or(&self.message);
        Self { message: format!("{param}: {problem}"), param: Some(param.to_owned()), ..self }
    }

    /// The answer's body.
    pub(super) fn body(&self) -> Value {
        let kind = match self.status {
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        };
        json!({"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}})
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let retry_after = match self.status {
            StatusCode::TOO_MANY_REQUESTS => Some(RETRY_FULL_S),
            StatusCode::SERVICE_UNAVAILABLE => Some(RETRY_UNAVAILABLE_S),
            _ => None,
        };
        let mut response = (self.status, Json(self.body())).into_response();
        response.extensions_mut().insert(self.outcome);
        if let Some(seconds) = retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

impl From<Invalid> for Problem {
    fn from(error: Invalid) -> Self {
        Self::invalid(error.field, error.problem)
    }
}

impl From<Refusal> for Problem {
    fn from(refusal: Refusal) -> Self {
        let (message, outcome) = (refusal.to_string(), Outcome::from(&refusal));
        let problem = match refusal {
            Refusal::UnknownModel { .. } => Self {
                param: Some("model".into()),
                code: Some("model_not_found"),
                ..Self::new(StatusCode::NOT_FOUND, message)
            },
            Refusal::Invalid(error) => error.into(),
            Refusal::Submit(SubmitError::Full(_)) => Self::new(StatusCode::TOO_MANY_REQUESTS, message),
            Refusal::Submit(SubmitError::TooMany { .. }) => Self::invalid("n", message),
            Refusal::NotReady(_) | Refusal::Submit(SubmitError::Stopped) => {
                Self::new(StatusCode::SERVICE_UNAVAILABLE, message)
            }
            Refusal::Internal(_) => Self::new(StatusCode::INTERNAL_SERVER_ERROR, message),
        };
        Self { outcome, ..problem }
    }
}

impl From<GenerateError> for Problem {
    fn from(error: GenerateError) -> Self {
        let (message, outcome) = (error.to_string(), Outcome::from(&error));
        let problem = match error {
            GenerateError::TooLarge(_) => Self::invalid("max_tokens", message),
            GenerateError::Unavailable(_) => Self::new(StatusCode::SERVICE_UNAVAILABLE, message),
            GenerateError::Internal(_) => Self::new(StatusCode::INTERNAL_SERVER_ERROR, message),
        };
        Self { outcome, ..problem }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_problem_has_its_status_type_and_code() {
        let refused = Refusal::UnknownModel { given: "a".into(), served: "b".into() };
        let cases: [(Problem, u16, &str, Value, Value); 6] = [
            (refused.into(), 404, "invalid_request_error", "model".into(), "model_not_found".into()),
            (Invalid::new("top_p", "2").into(), 400, "invalid_request_error", "top_p".into(), Value::Null),
            (
                Problem::unsupported("tools"),
                400,
                "invalid_request_error",
                "tools".into(),
                "unsupported_parameter".into(),
            ),
            (Refusal::from(SubmitError::Full(2)).into(), 429, "rate_limit_error", Value::Null, "queue_full".into()),
            (GenerateError::Unavailable("x".into()).into(), 503, "server_error", Value::Null, "unavailable".into()),
            (GenerateError::Internal("x".into()).into(), 500, "server_error", Value::Null, "internal_error".into()),
        ];
        for (problem, status, kind, param, code) in cases {
            let error = &problem.body()["error"];
            assert_eq!(problem.status.as_u16(), status);
            assert_eq!((&error["type"], &error["param"], &error["code"]), (&kind.into(), &param, &code));
            let retry = problem.into_response().headers().contains_key(header::RETRY_AFTER);
            assert_eq!(retry, status == 429 || status == 503);
        }
    }

    #[test]
    fn a_field_is_blamed_by_the_name_the_client_used() {
        let problem = Problem::invalid("max_tokens", "0, must be at least 1").blamed_on("max_completion_tokens");
        assert_eq!(problem.message, "max_completion_tokens: 0, must be at least 1");
        assert_eq!(problem.param.as_deref(), Some("max_completion_tokens"));
    }
}
