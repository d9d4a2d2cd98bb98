//! The small HTTP server beside every gRPC one: whether the process lives, whether it can do its work, and why not, and its
//! metrics. A node may have it serve more.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use axum::{Json, Router};
use hyper::server::conn::http1;
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::metrics::{self, Page};

/// How a server of health alone is served.
const SMALL: Serving = Serving { connections: 256, grace: Duration::from_secs(2) };
/// How long a client may take to send the head of a request, its first and each next one on a connection.
const HEAD: Duration = Duration::from_secs(30);
/// Pause after the system refused a connection, for others to end.
const BACKOFF: Duration = Duration::from_millis(100);

/// What a server may take.
#[derive(Clone, Copy, Debug)]
pub struct Serving {
    /// Connections at once; more wait until one ends.
    pub connections: usize,
    /// How long answers under way may take once the server is asked to end.
    pub grace: Duration,
}

/// Where a request comes from: an extension of every request.
#[derive(Clone, Copy, Debug)]
pub struct Peer(pub SocketAddr);

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
    serve_routes(listener, routes(health, page), shutdown, SMALL).await
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

/// Serves `routes` on `listener` until `shutdown`; answers under way may then go on as long as `serving` says.
pub async fn serve_routes(
    listener: TcpListener,
    routes: Router,
    shutdown: CancellationToken,
    serving: Serving,
) -> std::io::Result<()> {
    let places = Arc::new(Semaphore::new(serving.connections));
    let mut connections = JoinSet::new();
    let mut place = None;
    loop {
        tokio::select! {
            () = shutdown.cancelled() => break,
            Some(_) = connections.join_next() => {}
            free = Arc::clone(&places).acquire_owned(), if place.is_none() => place = free.ok(),
            accepted = listener.accept(), if place.is_some() => match (accepted, place.take()) {
                (Ok((stream, peer)), Some(place)) => {
                    let connection = Connection { stream, peer: Peer(peer), place };
                    connections.spawn(connection.serve(routes.clone(), shutdown.clone()));
                }
                (Err(error), _) => {
                    tracing::debug!(%error, "a connection was not accepted");
                    tokio::time::sleep(BACKOFF).await;
                }
                (Ok(_), None) => {}
            },
        }
    }
    drop(listener);
    // A client that never finishes its request must not hold up the end.
    let ended = async { while connections.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(serving.grace, ended).await;
    Ok(())
}

/// A client that has connected.
struct Connection {
    stream: TcpStream,
    peer: Peer,
    place: OwnedSemaphorePermit,
}

impl Connection {
    /// Answers until the client leaves, or until the answer under way at `shutdown` is whole.
    async fn serve(self, routes: Router, shutdown: CancellationToken) {
        let Self { stream, peer, place: _place } = self;
        // A connection that refuses the option still works, only slower.
        let _ = stream.set_nodelay(true);
        let routes = TowerToHyperService::new(routes);
        let service = service_fn(move |mut request| {
            hyper::Request::extensions_mut(&mut request).insert(peer);
            routes.call(request)
        });
        let mut builder = http1::Builder::new();
        builder.timer(TokioTimer::new()).header_read_timeout(HEAD);
        let mut connection = std::pin::pin!(builder.serve_connection(TokioIo::new(stream), service));
        let result = tokio::select! {
            result = &mut connection => result,
            () = shutdown.cancelled() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = result {
            tracing::debug!(%error, "a connection ended");
        }
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

    use super::*;

    /// A server on a free port, its health, and what ends it.
    async fn start(tasks: &mut JoinSet<std::io::Result<()>>) -> (SocketAddr, Health, CancellationToken) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, health) = (listener.local_addr().unwrap(), Health::new("coordinator", "c-0"));
        let shutdown = CancellationToken::new();
        let page = Page::new(&health);
        tasks.spawn(serve(listener, health.clone(), page, shutdown.clone()));
        (address, health, shutdown)
    }

    /// Status line and body of the answer for `path`.
    async fn get(address: SocketAddr, path: &str) -> (String, String) {
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
    async fn a_connection_without_a_place_waits_until_one_ends() {
        let mut tasks = JoinSet::new();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let serving = Serving { connections: 1, ..SMALL };
        let health = Health::new("coordinator", "c-0");
        let routes = routes(health.clone(), Page::new(&health));
        tasks.spawn(serve_routes(listener, routes, CancellationToken::new(), serving));
        let mut first = TcpStream::connect(address).await.unwrap();
        first.write_all(b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        first.read_exact(&mut [0; 12]).await.unwrap();
        let mut second = std::pin::pin!(get(address, "/live"));
        assert!(tokio::time::timeout(Duration::from_millis(50), &mut second).await.is_err());
        drop(first);
        assert_eq!(second.await.0, "200 OK");
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
        let ended = tokio::time::timeout(2 * SMALL.grace, tasks.join_next()).await;
        assert!(matches!(ended, Ok(Some(Ok(Ok(()))))), "{ended:?}");
    }
}
