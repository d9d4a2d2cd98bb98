//! The life of an expert node: open the checkpoint, listen, join the cluster, hold and serve, leave.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use sirocco_compute::{CpuBackend, DeviceError, ExpertBackend, Pool, open_backend};
use sirocco_model::{Checkpoint, CheckpointError};
use sirocco_process::http::{self, Health};
use sirocco_process::metrics::Page;
use sirocco_process::{
    BindError, DeviceArgs, LifeError, NodeArgs, Running, advertised, bind, leave_when_lost, watch_gpu,
};
use sirocco_proto::expert::ExpertServer;
use sirocco_proto::server::Services;
use sirocco_store::{ClusterState, Keys, LEASE_TTL, Mirror, Registration, Store, StoreError, to_json};
use sirocco_types::{Device, DeviceChoice, ExpertDtype, Member, MemberState, ModelIdentity, NodeId, NodeIdError, Role};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::{AbortOnDropHandle, TaskTracker};

use crate::batch::{Batcher, Held};
use crate::departure::Departure;
use crate::load::Reporter;
use crate::loader::Loader;
use crate::metrics::Metrics;
use crate::service::Service;
use crate::share::kernel_settings;

/// What an expert node is told.
#[derive(Clone, Debug, clap::Args)]
pub struct Config {
    /// Checkpoint folder (config.json and safetensors); only the bytes of the experts placed here are read
    #[arg(long, env = "SIROCCO_MODEL", value_name = "FOLDER")]
    pub model: PathBuf,
    /// Where to serve gRPC; port 0 takes any free one
    #[arg(long, env = "SIROCCO_GRPC", value_name = "ADDR", default_value = "127.0.0.1:7500")]
    pub grpc: SocketAddr,
    /// Where to serve /live, /ready, /health and /metrics
    #[arg(long, env = "SIROCCO_HTTP", value_name = "ADDR", default_value = "127.0.0.1:7501")]
    pub http: SocketAddr,
    /// What to run experts on
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Compute threads, of the CPU; a node that serves nothing yet loads as many experts at once
    #[arg(long, env = "SIROCCO_THREADS", value_name = "N", default_value_t = sirocco_process::default_threads())]
    pub threads: usize,
    /// Most bytes of expert weights to hold [default: four fifths of the machine's memory, or what the GPU has room for]
    #[arg(long, env = "SIROCCO_CAPACITY_BYTES", value_name = "BYTES")]
    pub capacity_bytes: Option<u64>,
    /// How fast this node runs experts, in percent of an ordinary node: a node twice as fast gets twice the load
    #[arg(long, env = "SIROCCO_SPEED", value_name = "PERCENT", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub speed: u32,
    /// Most experts of one layer to hold [default: any number]
    #[arg(long, env = "SIROCCO_MAX_EXPERTS_PER_LAYER", value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub max_experts_per_layer: Option<u32>,
    /// What to keep expert weights as: bf16 as stored, or int8 or int4, which take half and a quarter of the memory and change the
    /// answers a little. All nodes of a cluster have the same
    #[arg(long, env = "SIROCCO_EXPERT_DTYPE", value_name = "bf16|int8|int4", default_value_t)]
    pub expert_dtype: ExpertDtype,
    /// Failure domain; replicas of one expert go to different ones
    #[arg(long, env = "SIROCCO_ZONE", value_name = "NAME")]
    pub zone: Option<String>,
    /// Do not show on a terminal how loading goes
    #[arg(long, env = "SIROCCO_NO_PROGRESS")]
    pub no_progress: bool,
}

/// Why an expert node did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A name is not valid.
    #[error(transparent)]
    Name(#[from] NodeIdError),
    /// The checkpoint cannot be served.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// An address is not free.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The cluster does not take it in.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The system refuses threads or sockets.
    #[error("the system refuses: {0}")]
    System(#[from] std::io::Error),
    /// The device cannot be used.
    #[error("--device: {0}")]
    Device(#[from] DeviceError),
    /// The device has no room for that much.
    #[error("--capacity-bytes: {asked}, the device has room for {room}")]
    Capacity {
        /// As told.
        asked: u64,
        /// After what kernels need.
        room: u64,
    },
    /// The compute threads cannot be started.
    #[error("--threads: {0}")]
    Threads(String),
}

/// Starts a node and returns once it is a member; it then loads what is placed on it. `shutdown` asks it to leave, which
/// it does once its experts are served elsewhere.
pub async fn start(
    config: Config,
    args: NodeArgs,
    store: Arc<dyn Store>,
    shutdown: CancellationToken,
) -> Result<Running, StartError> {
    let started = Instant::now();
    let id = NodeId::new(&args.id)?;
    let keys = Keys::new(&args.cluster)?;
    let folder = config.model.clone();
    let checkpoint = tokio::task::spawn_blocking(move || Checkpoint::open(&folder)).await;
    let checkpoint = Arc::new(checkpoint.map_err(std::io::Error::other)??);
    let grpc = bind("--grpc", config.grpc).await?;
    let http = bind("--http", config.http).await?;
    let (grpc_at, http_at) = (grpc.local_addr()?, http.local_addr()?);
    let reached_at = advertised(grpc_at, http_at, args.advertise.as_deref())?;
    let backend = backend(&config, &checkpoint).await?;
    let capacity_bytes = capacity(config.capacity_bytes, backend.capacity_bytes())?;

    let member = Member {
        id: id.clone(),
        role: Role::Expert,
        state: MemberState::Ready,
        grpc: reached_at.0,
        http: reached_at.1,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        incarnation: sirocco_process::incarnation(),
        zone: config.zone.clone(),
        device: Some(Device { kind: backend.kind().into(), name: device_name(&*backend, config.expert_dtype) }),
        capacity_bytes: Some(capacity_bytes),
        speed: Some(config.speed),
        max_experts_per_layer: config.max_experts_per_layer,
        serving_epoch: None,
        model: Some(ModelIdentity { expert_dtype: config.expert_dtype, ..checkpoint.identity().clone() }),
    };
    let health = Health::new("expert-node", &args.id);
    let member_key = keys.member(Role::Expert, &id);
    let registration = Registration::open(Arc::clone(&store), &member_key, &to_json(&member), LEASE_TTL).await?;
    let mirror = Mirror::start(store, keys.prefix()).await?;
    tracing::info!(%id, grpc = %grpc_at, model = %member.model.as_ref().map(|m| m.fingerprint.short()).unwrap_or_default(), "joined");

    let held = Arc::new(ArcSwap::from_pointee(Held::new()));
    let page = Page::new(&health);
    let metrics = Arc::new(Metrics::new(&page, checkpoint.spec()));
    let (leave, lost) = (CancellationToken::new(), CancellationToken::new());
    let (batcher, compute) =
        Batcher::start(Arc::clone(&held), Arc::clone(&metrics), Arc::clone(&backend), lost.clone())?;
    metrics.watch(&page, &held, capacity_bytes, &batcher);
    if backend.kind() == "cuda" {
        let gpu = Arc::clone(&backend);
        watch_gpu(&page, move || gpu.readings());
    }
    let tasks = TaskTracker::new();
    tasks.spawn(leave_when_lost(lost.clone(), leave.clone(), health.clone()));
    let states = ClusterState::follow(&mirror, &keys, &tasks);
    let registration = Arc::new(registration);
    let grace = Duration::from_secs(args.drain_s);
    let reporter = Reporter {
        node: id.clone(),
        incarnation: member.incarnation,
        started,
        metrics: Arc::clone(&metrics),
        batcher: batcher.clone(),
    };
    tasks.spawn(reporter.run(states.clone(), leave.clone()));
    let departure =
        Departure { member: (member_key, member), registration: Arc::clone(&registration), patience: grace };
    tasks.spawn(departure.run(states.clone(), shutdown, leave.clone()));
    let loader = Loader {
        id: id.clone(),
        keys: keys.clone(),
        checkpoint: Arc::clone(&checkpoint),
        backend,
        held: Arc::clone(&held),
        registration: Arc::clone(&registration),
        health: health.clone(),
        metrics: Arc::clone(&metrics),
        at_once: config.threads.max(1),
        progress: !config.no_progress,
    };
    tasks.spawn(loader.run(states, leave.clone()));
    let service = Service { id, model: Arc::new(checkpoint.identity().clone()), held, batcher, metrics };
    let life = Life { registration, mirror, tasks, compute, leave, lost, grace };
    let life = tokio::spawn(life.run(service, (grpc, http), health.clone(), page));
    Ok(Running { id: args.id, grpc: grpc_at, http: http_at, health, life: AbortOnDropHandle::new(life) })
}

/// What a running node consists of.
struct Life {
    registration: Arc<Registration>,
    mirror: Mirror,
    tasks: TaskTracker,
    compute: std::thread::JoinHandle<()>,
    /// Cancelled once the node may leave.
    leave: CancellationToken,
    /// Cancelled when the device is lost.
    lost: CancellationToken,
    grace: Duration,
}

impl Life {
    /// Serves until the node may leave, then finishes what is under way, leaves the cluster and ends.
    async fn run(
        self,
        service: Service,
        (grpc, http): (TcpListener, TcpListener),
        health: Health,
        page: Page,
    ) -> Result<(), LifeError> {
        let services = Services::default().with(ExpertServer::new(service, self.leave.clone()));
        let switch = services.health();
        let health_reports = AbortOnDropHandle::new(tokio::spawn(switch.follow(health.subscribe())));
        self.tasks.spawn(http::serve(http, health.clone(), page, self.leave.clone()));
        let served = services.serve_apart("streams", grpc, self.leave.clone(), self.grace).await;

        health.not_ready("stopping");
        self.leave.cancel();
        self.mirror.close().await;
        self.tasks.close();
        drop(health_reports);
        if tokio::time::timeout(self.grace, self.tasks.wait()).await.is_err() {
            tracing::warn!("work was still under way at the end of the grace period");
        }
        if let Ok(registration) = Arc::try_unwrap(self.registration) {
            registration.close().await;
        }
        if tokio::task::spawn_blocking(|| self.compute.join().is_err()).await.unwrap_or(true) {
            return Err("the compute thread failed".into());
        }
        if self.lost.is_cancelled() {
            return Err("the device was lost".into());
        }
        Ok(served?)
    }
}

/// What experts run on, as `config` wants it, for those of `checkpoint`. Takes seconds when kernels are compiled.
async fn backend(config: &Config, checkpoint: &Checkpoint) -> Result<Arc<dyn ExpertBackend>, StartError> {
    let pool = Pool::new(config.threads).map_err(|error| StartError::Threads(error.to_string()))?;
    let (spec, device) = (checkpoint.spec(), config.device.device);
    let cpu = CpuBackend {
        pool,
        dtype: config.expert_dtype,
        hidden_size: spec.hidden_size,
        intermediate_size: spec.intermediate_size,
    };
    let settings = kernel_settings(&config.device);
    let opened = tokio::task::spawn_blocking(move || open_backend(device, &settings, cpu)).await;
    let (backend, said) = opened.map_err(std::io::Error::other)??;
    match said {
        Some(reason) if device == DeviceChoice::Auto => {
            tracing::warn!(reason, "no GPU can be used; experts run on the CPU");
        }
        Some(reason) => tracing::warn!(reason, "experts run on the CPU"),
        None => tracing::info!(device = backend.kind(), name = backend.name(), "experts run here"),
    }
    Ok(backend.into())
}

/// Most bytes of experts to hold: as `asked`, when the device has `room` for it.
fn capacity(asked: Option<u64>, room: Option<u64>) -> Result<u64, StartError> {
    match (asked, room) {
        (Some(asked), Some(room)) if asked > room => Err(StartError::Capacity { asked, room }),
        (asked, room) => Ok(asked.or(room).unwrap_or_else(default_capacity)),
    }
}

/// What the node computes with, for people to read.
fn device_name(backend: &dyn ExpertBackend, dtype: ExpertDtype) -> String {
    match dtype {
        ExpertDtype::Bf16 => backend.name(),
        quantised => format!("{}, {quantised} experts", backend.name()),
    }
}

/// Four fifths of the machine's memory, in bytes.
pub(crate) fn default_capacity() -> u64 {
    let info = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total =
        info.lines().find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    total.map_or(1 << 30, |kib| kib * 1024 / 5 * 4)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_holds_what_it_is_told_if_the_device_has_room_and_else_what_the_device_has_room_for() {
        assert_eq!(capacity(Some(5), None).unwrap(), 5);
        assert_eq!(capacity(Some(5), Some(9)).unwrap(), 5);
        assert_eq!(capacity(None, Some(9)).unwrap(), 9);
        assert_eq!(capacity(None, None).unwrap(), default_capacity());
        let error = capacity(Some(10), Some(9)).unwrap_err().to_string();
        assert_eq!(error, "--capacity-bytes: 10, the device has room for 9");
    }
}
