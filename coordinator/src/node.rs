//! The life of a coordinator: listen, join the cluster, stand for election, answer operators, leave.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use sirocco_process::http::{self, Health};
use sirocco_process::{BindError, LifeError, NodeArgs, Running, advertised, bind};
use sirocco_proto::cluster::ClusterServiceServer;
use sirocco_proto::server::Services;
use sirocco_store::{ClusterState, Keys, LEASE_TTL, Mirror, Registration, Store, StoreError, to_json};
use sirocco_types::{Member, MemberState, NodeId, NodeIdError, Role};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::{AbortOnDropHandle, TaskTracker};

use crate::api::Api;
use crate::leader::Candidate;

/// What a coordinator is told.
#[derive(Clone, Debug, clap::Args)]
pub struct Config {
    /// Where to serve gRPC; port 0 takes any free one
    #[arg(long, env = "SIROCCO_GRPC", value_name = "ADDR", default_value = "127.0.0.1:7400")]
    pub grpc: SocketAddr,
    /// Where to serve /live, /ready and /health
    #[arg(long, env = "SIROCCO_HTTP", value_name = "ADDR", default_value = "127.0.0.1:7401")]
    pub http: SocketAddr,
    /// How long the set of expert nodes must stay the same before experts are placed anew, in milliseconds
    #[arg(long, env = "SIROCCO_SETTLE_MS", value_name = "MS", default_value_t = 500)]
    pub settle_ms: u64,
}

/// Why a coordinator did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A name is not valid.
    #[error(transparent)]
    Name(#[from] NodeIdError),
    /// An address is not free.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The cluster does not take it in.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The system refuses sockets.
    #[error("the system refuses: {0}")]
    System(#[from] std::io::Error),
}

/// Starts a coordinator and returns once it is a member. `shutdown` asks it to leave.
pub async fn start(
    config: Config,
    args: NodeArgs,
    store: Arc<dyn Store>,
    shutdown: CancellationToken,
) -> Result<Running, StartError> {
    let id = NodeId::new(&args.id)?;
    let keys = Keys::new(&args.cluster)?;
    let grpc = bind("--grpc", config.grpc).await?;
    let http = bind("--http", config.http).await?;
    let (grpc_at, http_at) = (grpc.local_addr()?, http.local_addr()?);
    let reached_at = advertised(grpc_at, http_at, args.advertise.as_deref())?;
    let member = Member {
        id: id.clone(),
        role: Role::Coordinator,
        state: MemberState::Ready,
        grpc: reached_at.0,
        http: reached_at.1,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        incarnation: sirocco_process::incarnation(),
        zone: None,
        device: None,
        capacity_bytes: None,
        speed: None,
        max_experts_per_layer: None,
        serving_epoch: None,
        model: None,
    };
    let health = Health::new("coordinator", &args.id);
    let member_key = keys.member(Role::Coordinator, &id);
    let registration = Registration::open(Arc::clone(&store), &member_key, &to_json(&member), LEASE_TTL).await?;
    let mirror = Mirror::start(Arc::clone(&store), keys.prefix()).await?;
    tracing::info!(%id, grpc = %grpc_at, "joined");

    let tasks = TaskTracker::new();
    let states = ClusterState::follow(&mirror, &keys, &tasks);
    let settle = Duration::from_millis(config.settle_ms);
    let candidate = Candidate { id, store, keys, states: states.clone(), settle };
    tasks.spawn(candidate.run(shutdown.clone()));
    let api = Api { cluster: args.cluster, states, stale_since: mirror.stale_since(), shutdown: shutdown.clone() };
    let life = Life { registration, mirror, tasks, shutdown, grace: Duration::from_secs(args.drain_s) };
    let life = tokio::spawn(life.run(api, (grpc, http), health.clone()));
    Ok(Running { id: args.id, grpc: grpc_at, http: http_at, health, life: AbortOnDropHandle::new(life) })
}

/// What a running coordinator consists of.
struct Life {
    registration: Registration,
    mirror: Mirror,
    tasks: TaskTracker,
    shutdown: CancellationToken,
    grace: Duration,
}

impl Life {
    /// Serves until the shutdown, then resigns, leaves the cluster and ends.
    async fn run(self, api: Api, (grpc, http): (TcpListener, TcpListener), health: Health) -> Result<(), LifeError> {
        let services = Services::default().with(ClusterServiceServer::new(api));
        let reports = AbortOnDropHandle::new(tokio::spawn(services.health().follow(health.subscribe())));
        self.tasks.spawn(http::serve(http, health.clone(), self.shutdown.clone()));
        health.ready();
        let served = services.serve(grpc, self.shutdown.clone(), self.grace).await;

        health.not_ready("stopping");
        self.shutdown.cancel();
        drop(reports);
        self.registration.close().await;
        self.mirror.close().await;
        self.tasks.close();
        if tokio::time::timeout(self.grace, self.tasks.wait()).await.is_err() {
            tracing::warn!("work was still under way at the end of the grace period");
        }
        Ok(served?)
    }
}
