//! The life of a coordinator: listen, join the cluster, stand for election, answer operators, leave.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use sirocco_process::http::{self, Health};
use sirocco_process::metrics::Page;
use sirocco_process::{BindError, LifeError, NodeArgs, Running, advertised, bind};
use sirocco_proto::cluster::ClusterServiceServer;
use sirocco_proto::load::LoadServiceServer;
use sirocco_proto::server::Services;
use sirocco_store::{ClusterState, Keys, LEASE_TTL, Mirror, Registration, Store, StoreError, to_json};
use sirocco_types::{Member, MemberState, NodeId, NodeIdError, Role};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::{AbortOnDropHandle, TaskTracker};

use crate::api::Api;
use crate::leader::Candidate;
use crate::load::{Keeper, LoadSnapshot};
use crate::metrics::{self, Metrics};
use crate::rebalance::Policy;

/// Operators' requests that may wait for the leader's next step; more wait to be handed over.
const COMMANDS: usize = 16;

/// Load reports that may wait to be taken in; nodes wait with theirs meanwhile.
const REPORTS: usize = 1024;

/// What a coordinator is told.
#[derive(Clone, Debug, clap::Args)]
pub struct Config {
    /// Where to serve gRPC; port 0 takes any free one
    #[arg(long, env = "SIROCCO_GRPC", value_name = "ADDR", default_value = "127.0.0.1:7400")]
    pub grpc: SocketAddr,
    /// Where to serve /live, /ready, /health and /metrics
    #[arg(long, env = "SIROCCO_HTTP", value_name = "ADDR", default_value = "127.0.0.1:7401")]
    pub http: SocketAddr,
    /// How long the set of expert nodes must stay the same before experts are placed anew, in milliseconds
    #[arg(long, env = "SIROCCO_SETTLE_MS", value_name = "MS", default_value_t = SETTLE_MS)]
    pub settle_ms: u64,
    /// Never move experts because of their load unless told to by `sirocco rebalance`
    #[arg(long, env = "SIROCCO_NO_AUTO_REBALANCE")]
    pub no_auto_rebalance: bool,
    /// Imbalance (slowest node's time over the mean) from which experts are placed anew, in percent over 100
    #[arg(long, env = "SIROCCO_REBALANCE_THRESHOLD", value_name = "PERCENT", default_value_t = REBALANCE_THRESHOLD)]
    pub rebalance_threshold: u32,
    /// How long a placement stays before load may change it, in seconds
    #[arg(long, env = "SIROCCO_REBALANCE_COOLDOWN_S", value_name = "SECONDS", default_value_t = REBALANCE_COOLDOWN_S)]
    pub rebalance_cooldown_s: u64,
    /// Most bytes that load may move in ten minutes
    #[arg(long, env = "SIROCCO_REBALANCE_BYTES", value_name = "BYTES", default_value_t = REBALANCE_BYTES)]
    pub rebalance_bytes: u64,
    /// In what time measured load loses half of its weight, in seconds
    #[arg(long, env = "SIROCCO_LOAD_HALF_LIFE_S", value_name = "SECONDS", default_value_t = LOAD_HALF_LIFE_S, value_parser = clap::value_parser!(u64).range(1..))]
    pub load_half_life_s: u64,
}

const SETTLE_MS: u64 = 500;
const REBALANCE_THRESHOLD: u32 = 15;
const REBALANCE_COOLDOWN_S: u64 = 60;
const REBALANCE_BYTES: u64 = 64 << 30;
const LOAD_HALF_LIFE_S: u64 = 60;

impl Config {
    /// The defaults, listening at `grpc` and `http`.
    pub fn new(grpc: SocketAddr, http: SocketAddr) -> Self {
        Self {
            grpc,
            http,
            settle_ms: SETTLE_MS,
            no_auto_rebalance: false,
            rebalance_threshold: REBALANCE_THRESHOLD,
            rebalance_cooldown_s: REBALANCE_COOLDOWN_S,
            rebalance_bytes: REBALANCE_BYTES,
            load_half_life_s: LOAD_HALF_LIFE_S,
        }
    }

    fn policy(&self) -> Option<Policy> {
        (!self.no_auto_rebalance).then_some(Policy {
            threshold: f64::from(self.rebalance_threshold) / 100.0,
            cooldown: Duration::from_secs(self.rebalance_cooldown_s),
            bytes_per_window: self.rebalance_bytes,
        })
    }
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
    let (commands, asked) = mpsc::channel(COMMANDS);
    let (reports, reported) = mpsc::channel(REPORTS);
    let (snapshots, loads) = watch::channel(Arc::new(LoadSnapshot::default()));
    let half_life = Duration::from_secs(config.load_half_life_s);
    let keeper = Keeper { id: id.clone(), half_life, states: states.clone(), reports: reported, snapshots };
    tasks.spawn(keeper.run(shutdown.clone()));
    let page = Page::new(&health);
    let metrics = Arc::new(Metrics::new(&page));
    let (of_states, of_loads, stale_since) = (states.clone(), loads.clone(), mirror.stale_since());
    metrics::watch(&page, metrics::View { id: id.clone(), states: of_states, loads: of_loads, stale_since });
    let candidate = Candidate {
        id: id.clone(),
        store,
        keys,
        states: states.clone(),
        loads: loads.clone(),
        commands: asked,
        settle,
        policy: config.policy(),
        metrics,
    };
    tasks.spawn(candidate.run(shutdown.clone()));
    let api = Api {
        id,
        cluster: args.cluster,
        states,
        loads,
        commands,
        reports,
        stale_since: mirror.stale_since(),
        shutdown: shutdown.clone(),
    };
    let life = Life { registration, mirror, tasks, shutdown, grace: Duration::from_secs(args.drain_s) };
    let life = tokio::spawn(life.run(api, (grpc, http), health.clone(), page));
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
    async fn run(
        self,
        api: Api,
        (grpc, http): (TcpListener, TcpListener),
        health: Health,
        page: Page,
    ) -> Result<(), LifeError> {
        let services =
            Services::default().with(ClusterServiceServer::new(api.clone())).with(LoadServiceServer::new(api));
        let reports = AbortOnDropHandle::new(tokio::spawn(services.health().follow(health.subscribe())));
        self.tasks.spawn(http::serve(http, health.clone(), page, self.shutdown.clone()));
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
