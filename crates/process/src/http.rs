//! The small HTTP server beside every gRPC one: whether the process lives, whether it can do its work, and why not, and its
//! metrics. A node may have it serve more.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use axum::serve::ListenerExt as _;
use axum::{Json, Router};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::metrics::{self, Page};

/// How long answers under way may take once the server is asked to end.
const GRACE: Duration = Duration::from_secs(2);

/// What the endpoints report. Cheap to clone; starts as not ready.
#[derive(Clone, Debug)]
pub struct Health {
    role: &'static str,
    id: Arc<str>,
    started: Instant,
    /// Why the process is not ready; none when it is.
    obstacle: watch::Sender<Option<String>>,
}

impl Health {
    /// The health of process `id`.
    pub fn new(role: &'static str, id: &str) -> Self {
        let obstacle = watch::Sender::new(Some("starting".to_owned()));
        Self { role, id: id.into(), started: Instant::now(), obstacle }
    }

    /// The process can do its work.
    pub fn ready(&self) {
        self.set(None);
    }

    /// The process cannot do its work, because of `obstacle`.
    pub fn not_ready(&self, obstacle: impl Into<String>) {
        self.set(Some(obstacle.into()));
    }

    /// Waits until the process is ready.
    pub async fn until_ready(&self) {
        // The sender is part of self, so the channel is open.
        let _ = self.obstacle.subscribe().wait_for(Option::is_none).await;
    }

    /// Why the process is not ready, none when it is; and word of changes.
    pub fn subscribe(&self) -> watch::Receiver<Option<String>> {
        self.obstacle.subscribe()
    }

    /// Why the process is not ready now; none when it is.
    pub fn obstacle(&self) -> Option<String> {
        self.obstacle.borrow().clone()
    }

    /// What the process is.
    pub(crate) fn role(&self) -> &'static str {
        self.role
    }

    /// The process' name in its cluster.
    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    fn set(&self, obstacle: Option<String>) {
        self.obstacle.send_if_modified(|current| {
            let changed = *current != obstacle;
            *current = obstacle;
            changed
        });
    }
}

/// Serves [`routes`] on `listener` until `shutdown`; answers under way may then take two seconds.
pub async fn serve(
    listener: TcpListener,
    health: Health,
    page: Page,
    shutdown: CancellationToken,
) -> std::io::Result<()> {
    serve_routes(listener, routes(health, page), shutdown, GRACE).await
}

/// `/live`, `/ready`, `/health` and, with what is on `page`, `/metrics`, for a node to add its own to.
pub fn routes(health: Health, page: Page) -> Router {
    Router::new()
        .route("/live", get(|| async { "live\n" }))
        .route("/ready", get(ready))
        .route("/health", get(report))
        .with_state(health)
        .route("/metrics", get(async move || scrape(&page)))
}

/// Serves `routes` on `listener` until `shutdown`; answers under way may then take `grace`.
pub async fn serve_routes(
    listener: TcpListener,
    routes: Router,
    shutdown: CancellationToken,
    grace: Duration,
) -> std::io::Result<()> {
    let listener = listener.tap_io(|stream| {
        // A connection that refuses the option still works, only slower.
        let _ = stream.set_nodelay(true);
    });
    let server = axum::serve(listener, routes).with_graceful_shutdown(shutdown.clone().cancelled_owned());
    // A client that never finishes its request must not hold up the end.
    let overdue = async {
        shutdown.cancelled().await;
        tokio::time::sleep(grace).await;
    };
    tokio::select! {
        result = server => result,
        () = overdue => Ok(()),
    }
}

async fn ready(State(health): State<Health>) -> (StatusCode, String) {
    match &*health.obstacle.borrow() {
        None => (StatusCode::OK, "ready\n".to_owned()),
        Some(obstacle) => (StatusCode::SERVICE_UNAVAILABLE, format!("{obstacle}\n")),
    }
}

fn scrape(page: &Page) -> Response {
    match page.render() {
        Ok(text) => ([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

async fn report(State(health): State<Health>) -> Json<Value> {
    let obstacle = health.obstacle();
    Json(json!({
        "role": health.role,
        "id": &*health.id,
        "version": env!("CARGO_PKG_VERSION"),
        "uptime_s": health.started.elapsed().as_secs(),
        "ready": obstacle.is_none(),
        "obstacle": obstacle,
    }))
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpStream;
    use tokio::task::JoinSet;

    use super::*;

    /// A server on a free port, its health, and what ends it.
    async fn start(tasks: &mut JoinSet<std::io::Result<()>>) -> (std::net::SocketAddr, Health, CancellationToken) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, health) = (listener.local_addr().unwrap(), Health::new("coordinator", "c-0"));
        let shutdown = CancellationToken::new();
        let page = Page::new(&health);
        tasks.spawn(serve(listener, health.clone(), page, shutdown.clone()));
        (address, health, shutdown)
    }

    /// Status line and body of the answer for `path`.
    async fn get(address: std::net::SocketAddr, path: &str) -> (String, String) {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.lines().next().unwrap()["HTTP/1.0 ".len()..].to_owned(), body.to_owned())
    }

    #[tokio::test]
    async fn a_process_that_cannot_work_lives_and_says_why() {
        let mut tasks = JoinSet::new();
        let (address, health, _) = start(&mut tasks).await;
        health.not_ready("no placement yet");
        let report = async |path| serde_json::from_str::<Value>(&get(address, path).await.1).unwrap();
        assert_eq!(get(address, "/live").await.0, "200 OK");
        assert_eq!(get(address, "/ready").await, ("503 Service Unavailable".into(), "no placement yet\n".into()));
        assert_eq!(report("/health").await["obstacle"], "no placement yet");
        health.ready();
        assert_eq!(get(address, "/ready").await, ("200 OK".into(), "ready\n".into()));
        assert!(get(address, "/metrics").await.1.contains("\nsirocco_ready 1\n"));
        let report = report("/health").await;
        assert_eq!(
            (&report["role"], &report["id"], &report["ready"]),
            (&json!("coordinator"), &json!("c-0"), &json!(true))
        );
    }

    #[tokio::test]
    async fn a_client_that_stalls_does_not_hold_up_the_end() {
        let mut tasks = JoinSet::new();
        let (address, _, shutdown) = start(&mut tasks).await;
        let mut stalled = TcpStream::connect(address).await.unwrap();
        stalled.write_all(b"GET /live HTTP/1.1\r\nhost: ").await.unwrap();
        // A whole answer to a later client: the first connection has been accepted by then.
        get(address, "/live").await;
        shutdown.cancel();
        let ended = tokio::time::timeout(2 * GRACE, tasks.join_next()).await;
        assert!(matches!(ended, Ok(Some(Ok(Ok(()))))), "{ended:?}");
    }
}
