//! What went wrong, in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`, with the status that belongs to it.

use std::time::Duration;

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use sirocco_proto::Invalid;

use crate::deadline::Overdue;
use crate::engine::{GenerateError, SubmitError};
use crate::intake::{RETRY_UNAVAILABLE, Refusal};
use crate::metrics::Outcome;

/// An answer that is an error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Problem {
    pub(super) status: StatusCode,
    pub(super) message: String,
    /// The request's field that is to blame.
    pub(super) param: Option<String>,
    code: Option<&'static str>,
    /// When the same request may be answered.
    retry_after: Option<Duration>,
    /// How the request is counted.
    pub(super) outcome: Outcome,
}

impl Problem {
    /// A problem that no single field is to blame for.
    pub(super) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        let code = match status {
            StatusCode::TOO_MANY_REQUESTS => Some("rate_limit_exceeded"),
            StatusCode::UNAUTHORIZED => Some("invalid_api_key"),
            StatusCode::REQUEST_TIMEOUT | StatusCode::GATEWAY_TIMEOUT => Some("timeout"),
            StatusCode::SERVICE_UNAVAILABLE => Some("unavailable"),
            StatusCode::INTERNAL_SERVER_ERROR => Some("internal_error"),
            _ => None,
        };
        let outcome = if status.is_server_error() { Outcome::Internal } else { Outcome::Invalid };
        Self { status, message: message.into(), param: None, code, retry_after: None, outcome }
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
        let mut response = (self.status, Json(self.body())).into_response();
        response.extensions_mut().insert(self.outcome);
        let headers = response.headers_mut();
        if let Some(retry_after) = self.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(whole_seconds(retry_after)));
        }
        match self.status {
            StatusCode::UNAUTHORIZED => {
                headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            // What is left of the request is not worth waiting for.
            StatusCode::REQUEST_TIMEOUT => {
                headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            // Otherwise OpenAI's clients ask twice again for what takes too long.
            StatusCode::GATEWAY_TIMEOUT => {
                headers.insert("x-should-retry", HeaderValue::from_static("false"));
            }
            _ => {}
        }
        response
    }
}

/// As `Retry-After` has it: not too early, and never at once.
pub(crate) fn whole_seconds(wait: Duration) -> u64 {
    (wait.as_secs() + u64::from(wait.subsec_nanos() > 0)).max(1)
}

impl From<Overdue> for Problem {
    fn from(error: Overdue) -> Self {
        Self { outcome: Outcome::Overdue, ..Self::new(StatusCode::GATEWAY_TIMEOUT, error.to_string()) }
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
        let retry_after = refusal.retry_after();
        let problem = match refusal {
            Refusal::UnknownModel { .. } => Self {
                param: Some("model".into()),
                code: Some("model_not_found"),
                ..Self::new(StatusCode::NOT_FOUND, message)
            },
            Refusal::Invalid(error) => error.into(),
            Refusal::Grammar(_) => Self::new(StatusCode::BAD_REQUEST, message),
            Refusal::Unidentified(_) => Self::new(StatusCode::UNAUTHORIZED, message),
            Refusal::Limited(_) => Self::new(StatusCode::TOO_MANY_REQUESTS, message),
            Refusal::Overdue(error) => error.into(),
            Refusal::Submit(SubmitError::Full(_)) => {
                Self { code: Some("queue_full"), ..Self::new(StatusCode::TOO_MANY_REQUESTS, message) }
            }
            Refusal::Submit(SubmitError::TooMany { .. }) => Self::invalid("n", message),
            Refusal::NotReady(_) | Refusal::Submit(SubmitError::Stopped) => {
                Self::new(StatusCode::SERVICE_UNAVAILABLE, message)
            }
            Refusal::Internal(_) => Self::new(StatusCode::INTERNAL_SERVER_ERROR, message),
        };
        Self { retry_after, outcome, ..problem }
    }
}

impl From<GenerateError> for Problem {
    fn from(error: GenerateError) -> Self {
        let (message, outcome) = (error.to_string(), Outcome::from(&error));
        let problem = match error {
            GenerateError::Grammar(_) => Self::new(StatusCode::BAD_REQUEST, message),
            GenerateError::TooLarge(_) => Self::invalid("max_tokens", message),
            GenerateError::Overdue(error) => error.into(),
            GenerateError::Unavailable(_) => {
                let retry_after = Some(RETRY_UNAVAILABLE);
                Self { retry_after, ..Self::new(StatusCode::SERVICE_UNAVAILABLE, message) }
            }
            GenerateError::Internal(_) => Self::new(StatusCode::INTERNAL_SERVER_ERROR, message),
        };
        Self { outcome, ..problem }
    }
}

#[cfg(test)]
mod tests {
    use sirocco_model::ConstraintError;

    use super::*;
    use crate::callers::Unidentified;
    use crate::deadline::Deadline;

    #[test]
    fn each_problem_has_its_status_type_and_code() {
        let overdue = Deadline::new(std::time::Instant::now(), Duration::from_secs(1), []).overdue();
        let refused = Refusal::UnknownModel { given: "a".into(), served: "b".into() };
        let cases: [(Problem, u16, &str, Value, Value); 9] = [
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
            (
                GenerateError::Grammar(ConstraintError::TooComplex(3)).into(),
                400,
                "invalid_request_error",
                Value::Null,
                Value::Null,
            ),
            (GenerateError::Unavailable("x".into()).into(), 503, "server_error", Value::Null, "unavailable".into()),
            (
                Refusal::from(Unidentified::UnknownKey).into(),
                401,
                "invalid_request_error",
                Value::Null,
                "invalid_api_key".into(),
            ),
            (overdue.into(), 504, "server_error", Value::Null, "timeout".into()),
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
    fn nobody_is_told_to_come_back_too_early() {
        for (wait_ms, seconds) in [(0, 1), (1, 1), (1000, 1), (1001, 2), (59_999, 60)] {
            assert_eq!(whole_seconds(Duration::from_millis(wait_ms)), seconds);
        }
    }

    #[test]
    fn a_field_is_blamed_by_the_name_the_client_used() {
        let problem = Problem::invalid("max_tokens", "0, must be at least 1").blamed_on("max_completion_tokens");
        assert_eq!(problem.message, "max_completion_tokens: 0, must be at least 1");
        assert_eq!(problem.param.as_deref(), Some("max_completion_tokens"));
    }
}
