//! The OpenAI-compatible HTTP API of a router node, under `/v1`.
//!
//! `body` reads a request's fields, `sampling`, `prompts` and `form` check them, `generate` hands them to the intake, `answer` and
//! `stream` say what comes back, `problem` what went wrong, each in OpenAI's shape. It takes the same way to the engine as gRPC,
//! [`Intake`], and never logs a prompt or a completion.

mod answer;
mod body;
mod choice;
mod form;
mod generate;
mod models;
mod problem;
mod prompts;
mod sampling;
mod stream;

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use sirocco_model::ChatTemplate;
use sirocco_process::http::Peer;

use crate::callers::{Caller, Rate};
use crate::intake::{Intake, Refusal};
use crate::metrics::{Front, Outcome};
use problem::Problem;
pub(crate) use problem::whole_seconds;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The checkpoint's chat template, or why there is none to use.
pub(crate) type Chat = Result<ChatTemplate, String>;

/// What every handler works with.
#[derive(Clone, Debug)]
struct Api {
    intake: Arc<Intake>,
    chat: Arc<Chat>,
    /// Seconds since 1970 at which this process began to serve the model.
    created: u64,
}

/// The routes under `/v1`.
pub(crate) fn routes(intake: Arc<Intake>, chat: Chat) -> Router {
    let api = Api { intake, chat: Arc::new(chat), created: answer::now() };
    let v1 = Router::new()
        .route("/models", get(models::list))
        .route("/models/{*id}", get(models::one))
        .route("/completions", post(generate::completions))
        .route("/chat/completions", post(generate::chat_completions))
        .fallback(async |uri: Uri| {
            Problem::new(StatusCode::NOT_FOUND, format!("there is nothing at /v1{}", uri.path()))
        })
        .method_not_allowed_fallback(async |method: Method, uri: Uri| {
            Problem::new(StatusCode::METHOD_NOT_ALLOWED, format!("/v1{} does not take {method}", uri.path()))
        })
        .layer(middleware::from_fn_with_state(api.clone(), identify))
        .layer(middleware::from_fn_with_state(api.clone(), track))
        .with_state(api);
    Router::new().nest("/v1", v1)
}

/// Follows each request for a completion to its end, which is in its answer when that is a problem, and else told by whoever
/// gives the answer.
async fn track(State(api): State<Api>, mut request: Request, next: Next) -> Response {
    if request.method() != Method::POST {
        return next.run(request).await;
    }
    let tracked = api.intake.metrics.request(Front::Http);
    request.extensions_mut().insert(tracked.clone());
    let response = next.run(request).await;
    if let Some(outcome) = response.extensions().get::<Outcome>() {
        tracked.end(*outcome);
    }
    response
}

/// Gives each request an id, its answer the client's own or that one, and lets in only whose caller is known.
async fn identify(State(api): State<Api>, mut request: Request, next: Next) -> Response {
    let headers = request.headers();
    let id = api.intake.request_id(headers.get(REQUEST_ID).map(HeaderValue::as_bytes));
    let peer = request.extensions().get::<Peer>().map(|peer| peer.0.ip());
    let authorization = headers.get(header::AUTHORIZATION).map(HeaderValue::as_bytes);
    let caller = api.intake.callers.identify(authorization, peer);
    let name = caller.as_ref().map_or("unknown", |caller| caller.name.as_str());
    tracing::debug!(request = id.log, client_id = id.shown, caller = name, "over HTTP");
    let shown = HeaderValue::from_str(&id.shown);
    let mut response = match caller {
        Ok(caller) => {
            request.extensions_mut().insert(id);
            request.extensions_mut().insert(Arc::clone(&caller));
            let mut response = next.run(request).await;
            tell_rates(&caller, response.headers_mut());
            response
        }
        Err(unidentified) => Problem::from(Refusal::from(unidentified)).into_response(),
    };
    if let Ok(shown) = shown {
        response.headers_mut().insert(REQUEST_ID, shown);
    }
    response
}

/// Says how far the caller's limits are used, in OpenAI's headers.
fn tell_rates(caller: &Caller, headers: &mut HeaderMap) {
    for Rate { of, limit, remaining, reset } in caller.rates(Instant::now()) {
        let values = [("limit", limit.to_string()), ("remaining", remaining.to_string()), ("reset", duration(reset))];
        for (what, value) in values {
            let name = HeaderName::try_from(format!("x-ratelimit-{what}-{of}"));
            if let (Ok(name), Ok(value)) = (name, HeaderValue::try_from(value)) {
                headers.insert(name, value);
            }
        }
    }
}

/// As OpenAI's headers have it: `20ms`, `1.5s`, `6m0s`.
fn duration(time: Duration) -> String {
    match time.as_millis() {
        ms @ ..1000 => format!("{ms}ms"),
        ms @ 1000..60_000 => format!("{}s", ms as f64 / 1e3),
        ms => format!("{}m{}s", ms / 60_000, ms % 60_000 / 1000),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_as_openai_does() {
        for (ms, text) in [(0, "0ms"), (20, "20ms"), (1000, "1s"), (1500, "1.5s"), (60_000, "1m0s"), (361_900, "6m1s")]
        {
            assert_eq!(duration(Duration::from_millis(ms)), text);
        }
    }
}
