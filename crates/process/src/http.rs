//! The small HTTP server beside every gRPC one: whether the process lives, whether it can do its work, and why not.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use axum::{Json, Router};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

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

    fn set(&self, obstacle: Option<String>) {
        self.obstacle.send_if_modified(|current| {
            let changed = *current != obstacle;
            *current = obstacle;
            changed
        });
    }
}

/// Serves `/live`, `/ready` and `/health` on `listener` until `shutdown`.
pub async fn serve(listener: TcpListener, health: Health, shutdown: CancellationToken) -> std::io::Result<()> {
    let app = Router::new()
        .route("/live", get(|| async { "live\n" }))
        .route("/ready", get(ready))
        .route("/health", get(report))
        .with_state(health);
    axum::serve(listener, app).with_graceful_shutdown(shutdown.cancelled_owned()).await
}

/// The address others reach `listener` at: `advertised` (a host, or host and port), or where it listens.
pub fn advertised(listener: &TcpListener, advertised: Option<&str>) -> std::io::Result<String> {
    let local = listener.local_addr()?;
    Ok(match advertised {
        Some(host) if host.contains(':') => host.to_owned(),
        Some(host) => format!("{host}:{}", local.port()),
        None => local.to_string(),
    })
}

async fn ready(State(health): State<Health>) -> (StatusCode, String) {
    match &*health.obstacle.borrow() {
        None => (StatusCode::OK, "ready\n".to_owned()),
        Some(obstacle) => (StatusCode::SERVICE_UNAVAILABLE, format!("{obstacle}\n")),
    }
}

async fn report(State(health): State<Health>) -> Json<Value> {
    let obstacle = health.obstacle.borrow().clone();
    Json(json!({
        "role": health.role,
        "id": &*health.id,
        "version": env!("CARGO_PKG_VERSION"),
        "uptime_s": health.started.elapsed().as_secs(),
        "ready": obstacle.is_none(),
        "obstacle": obstacle,
    }))
}
