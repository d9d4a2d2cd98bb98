//! How gRPC services are offered: tuned HTTP/2, health and reflection on every server, a shutdown that drains.

use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::{oneshot, watch};
use tokio_stream::wrappers::TcpListenerStream;
use tokio_stream::{Stream, StreamExt as _};
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic::transport::server::Connected;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use crate::channel::{KEEPALIVE, MAX_FRAME_BYTES, MAX_ROWS_FRAME_BYTES, MAX_ROWS_STREAMS, MAX_STREAMS, WINDOW_BYTES};
use crate::socket::Socket;

/// The services of one server under construction.
#[derive(Debug)]
pub struct Services {
    routes: Routes,
    names: Vec<&'static str>,
    health: HealthReporter,
}

/// Says whether a server's services serve; starts as not serving.
#[derive(Clone, Debug)]
pub struct HealthSwitch {
    reporter: HealthReporter,
    names: Vec<&'static str>,
}

/// Why services are not served any more.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The system refuses a thread or what it waits with.
    #[error("the system refuses: {0}")]
    System(#[from] std::io::Error),
    /// The server failed.
    #[error(transparent)]
    Transport(#[from] tonic::transport::Error),
    /// Its thread panicked.
    #[error("the thread that serves failed")]
    Thread,
}

impl Default for Services {
    fn default() -> Self {
        let (health, service) = tonic_health::server::health_reporter();
        Self { routes: Routes::new(service), names: Vec::new(), health }
    }
}

impl Services {
    /// Adds a service.
    #[must_use]
    pub fn with<S, B>(mut self, service: S) -> Self
    where
        S: tonic::codegen::Service<
                tonic::codegen::http::Request<tonic::body::Body>,
                Response = tonic::codegen::http::Response<B>,
                Error = std::convert::Infallible,
            > + tonic::server::NamedService
            + Clone
            + Send
            + Sync
            + 'static,
        S::Future: Send + 'static,
        B: tonic::codegen::Body<Data = bytes::Bytes> + Send + 'static,
        B::Error: Into<tonic::codegen::StdError>,
    {
        self.names.push(S::NAME);
        self.routes = self.routes.add_service(service);
        self
    }

    /// The switch of their health.
    pub fn health(&self) -> HealthSwitch {
        HealthSwitch { reporter: self.health.clone(), names: self.names.clone() }
    }

    /// Serves on `listener` until `shutdown`, then lets the calls in flight finish. Long-lived streams must watch for the
    /// same shutdown and end by themselves; what is left after `grace` is cut.
    pub async fn serve(
        self,
        listener: TcpListener,
        shutdown: CancellationToken,
        grace: Duration,
    ) -> Result<(), tonic::transport::Error> {
        let incoming = TcpListenerStream::new(listener).map(|stream| {
            if let Ok(stream) = &stream {
                // A connection that refuses the option still works, only slower.
                let _ = stream.set_nodelay(true);
            }
            stream
        });
        self.serve_incoming(incoming, MAX_FRAME_BYTES, MAX_STREAMS, shutdown, grace).await
    }

    async fn serve_incoming<I>(
        self,
        incoming: impl Stream<Item = std::io::Result<I>>,
        max_frame_bytes: u32,
        max_streams: u32,
        shutdown: CancellationToken,
        grace: Duration,
    ) -> Result<(), tonic::transport::Error>
    where
        I: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
    {
        let (interval, timeout) = KEEPALIVE;
        let routes = with_reflection(self.routes, &self.names);
        let serving = Server::builder()
            .initial_stream_window_size(WINDOW_BYTES)
            .initial_connection_window_size(WINDOW_BYTES)
            .max_frame_size(max_frame_bytes)
            .max_concurrent_streams(max_streams)
            .http2_keepalive_interval(Some(interval))
            .http2_keepalive_timeout(Some(timeout))
            .add_routes(routes)
            .serve_with_incoming_shutdown(incoming, shutdown.clone().cancelled_owned());
        let cut = async {
            shutdown.cancelled().await;
            tokio::time::sleep(grace).await;
        };
        tokio::select! {
            result = serving => result,
            () = cut => {
                tracing::warn!(grace_s = grace.as_secs(), "calls were still open at the end of the grace period");
                Ok(())
            }
        }
    }

    /// The same for few connections that are waited on, by one thread of its own called `name`: a message changes hands between
    /// connection and service without waking anyone, and the thread stays awake for what comes soon. Stops serving when dropped,
    /// too.
    pub async fn serve_apart(
        self,
        name: &str,
        listener: TcpListener,
        shutdown: CancellationToken,
        grace: Duration,
    ) -> Result<(), ServeError> {
        let shutdown = shutdown.child_token();
        let _dropped = shutdown.clone().drop_guard();
        let listener = listener.into_std()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (ended, end) = oneshot::channel();
        std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            let result = runtime.block_on(async {
                let incoming = TcpListenerStream::new(TcpListener::from_std(listener)?);
                let incoming = incoming.map(|stream| stream.and_then(Socket::of_server));
                Ok(self.serve_incoming(incoming, MAX_ROWS_FRAME_BYTES, MAX_ROWS_STREAMS, shutdown, grace).await?)
            });
            drop(runtime);
            // Nobody listens any more when the future was dropped.
            let _ = ended.send(result);
        })?;
        end.await.unwrap_or(Err(ServeError::Thread))
    }
}

impl HealthSwitch {
    /// Reports every service as serving while there is no obstacle, until the sender of `obstacle` is gone.
    pub async fn follow(self, mut obstacle: watch::Receiver<Option<String>>) {
        loop {
            let serving = obstacle.borrow_and_update().is_none();
            let status = if serving { ServingStatus::Serving } else { ServingStatus::NotServing };
            self.reporter.set_service_status("", status).await;
            for name in &self.names {
                self.reporter.set_service_status(*name, status).await;
            }
            if obstacle.changed().await.is_err() {
                return;
            }
        }
    }
}

fn with_reflection(routes: Routes, names: &[&'static str]) -> Routes {
    let builder = || {
        let builder = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(crate::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .with_service_name("grpc.health.v1.Health");
        names.iter().fold(builder, |builder, name| builder.with_service_name(*name))
    };
    let v1 = builder().build_v1().expect("the descriptors come from this build");
    let v1alpha = builder().build_v1alpha().expect("the descriptors come from this build");
    routes.add_service(v1).add_service(v1alpha)
}
