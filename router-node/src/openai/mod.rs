//! The OpenAI-compatible HTTP API of a router node, under `/v1`.
//!
//! `body` reads a request's fields, `sampling` and `prompts` check them, `generate` hands them to the intake, `answer` and
//! `stream` say what comes back, `problem` what went wrong, each in OpenAI's shape. It takes the same way to the engine as gRPC,
//! [`Intake`], and never logs a prompt or a completion.

mod answer;
mod body;
mod choice;
mod generate;
mod models;
mod problem;
mod prompts;
mod sampling;
mod stream;

use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{HeaderName, HeaderValue, Method, StatusCode, Uri};
use axum::middleware::{self, Next};
use axum::response::Response;
use axum::routing::{get, post};
use sirocco_model::ChatTemplate;

use crate::intake::Intake;
use crate::metrics::{Front, Metrics, Outcome};
use problem::Problem;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Longest request id taken from a client.
const REQUEST_ID_BYTES: usize = 128;

/// The checkpoint's chat template, or why there is none to use.
pub(crate) type Chat = Result<ChatTemplate, String>;

/// What every handler works with.
#[derive(Clone, Debug)]
struct Api {
    intake: Arc<Intake>,
    chat: Arc<Chat>,
    metrics: Arc<Metrics>,
    /// Seconds since 1970 at which this process began to serve the model.
    created: u64,
}

/// Names a request in logs and answers.
#[derive(Clone, Debug)]
struct RequestId(String);

/// The routes under `/v1`.
pub(crate) fn routes(intake: Arc<Intake>, chat: Chat, metrics: Arc<Metrics>) -> Router {
    let api = Api { intake, chat: Arc::new(chat), metrics, created: answer::now() };
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
    let tracked = api.metrics.request(Front::Http);
    request.extensions_mut().insert(tracked.clone());
    let response = next.run(request).await;
    if let Some(outcome) = response.extensions().get::<Outcome>() {
        tracked.end(*outcome);
    }
    response
}

/// Gives each request an id, and its answer the client's own or that one.
async fn identify(State(api): State<Api>, mut request: Request, next: Next) -> Response {
    let id = api.intake.request_id();
    let own = request.headers().get(REQUEST_ID).filter(|own| is_plain(own)).cloned();
    tracing::debug!(request = id, client_id = own.as_ref().and_then(|own| own.to_str().ok()), "over HTTP");
    let header = own.or_else(|| HeaderValue::from_str(&id).ok());
    request.extensions_mut().insert(RequestId(id));
    let mut response = next.run(request).await;
    if let Some(header) = header {
        response.headers_mut().insert(REQUEST_ID, header);
    }
    response
}

/// Whether a client's request id may be repeated and logged as it is.
fn is_plain(id: &HeaderValue) -> bool {
    (1..=REQUEST_ID_BYTES).contains(&id.len()) && id.as_bytes().iter().all(u8::is_ascii_graphic)
}
