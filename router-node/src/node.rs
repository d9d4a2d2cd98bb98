//! The life of a router node: load the model, listen, join the cluster, follow the placement, serve, leave.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use sirocco_compute::{
    BLOCK_TOKENS, DeviceError, KernelSettings, KvBlocks, Pool, RouterDevice, RouterLimits, kv_block_bytes, open_router,
};
use sirocco_model::{ChatTemplate, Checkpoint, CheckpointError, Grammars, Model, Tokenizer, TokenizerError};
use sirocco_process::http::{self, Health, Serving};
use sirocco_process::metrics::Page;
use sirocco_process::{
    BindError, DeviceArgs, LifeError, NodeArgs, Running, advertised, bind, leave_when_lost, watch_gpu,
};
use sirocco_proto::server::Services;
use sirocco_store::{ClusterState, Keys, LEASE_TTL, Mirror, Registration, Store, StoreError, to_json};
use sirocco_types::{
    Device, DeviceChoice, Epoch, Member, MemberState, ModelIdentity, ModelSpec, NodeId, NodeIdError, Role,
};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::{AbortOnDropHandle, TaskTracker};

use crate::api;
use crate::callers::{Callers, OpenError};
use crate::connection::Home;
use crate::dispatch::RemoteExperts;
use crate::engine::{Engine, EngineLimits, Parts};
use crate::intake::{Grammatical, Intake, IntakeParts};
use crate::load::{ExpertCounts, Reporter};
use crate::metrics::Metrics;
use crate::openai::{self, Chat};
use crate::page;
use crate::policy::Policy;
use crate::standing::Budget;
use crate::topology::{self, Topology};

const MAX_SEQUENCES: u32 = 32;
const MAX_QUEUE: u32 = 256;
const STEP_TOKENS: u32 = 512;
const OVERLAP_ROWS: u32 = 16;
const EXPERT_TIMEOUT_S: u64 = 60;

/// What a router node is told.
#[derive(Clone, Debug, clap::Args)]
pub struct Config {
    /// Checkpoint folder (config.json, safetensors, tokenizer.json); the experts' bytes are not read
    #[arg(long, env = "SIROCCO_MODEL", value_name = "FOLDER")]
    pub model: PathBuf,
    /// Where to serve gRPC; port 0 takes any free one
    #[arg(long, env = "SIROCCO_GRPC", value_name = "ADDR", default_value = "127.0.0.1:8001")]
    pub grpc: SocketAddr,
    /// Where to serve the OpenAI-compatible API under /v1, and /live, /ready, /health and /metrics
    #[arg(long, env = "SIROCCO_HTTP", value_name = "ADDR", default_value = "127.0.0.1:8000")]
    pub http: SocketAddr,
    /// What to run attention and the gates on
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Compute threads, of the CPU
    #[arg(long, env = "SIROCCO_THREADS", value_name = "N", default_value_t = sirocco_process::default_threads())]
    pub threads: usize,
    /// Sequences computed at once
    #[arg(long, env = "SIROCCO_MAX_SEQUENCES", value_name = "N", default_value_t = MAX_SEQUENCES, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_sequences: u32,
    /// Requests that may wait; one more is refused
    #[arg(long, env = "SIROCCO_MAX_QUEUE", value_name = "N", default_value_t = MAX_QUEUE, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_queue: u32,
    /// Tokens computed in one step; longer prompts are cut into chunks
    #[arg(long, env = "SIROCCO_STEP_TOKENS", value_name = "N", default_value_t = STEP_TOKENS, value_parser = clap::value_parser!(u32).range(1..))]
    pub step_tokens: u32,
    /// Most memory for the KV cache, in bytes [default: 1 GiB, or what the GPU has room for]
    #[arg(long, env = "SIROCCO_KV_BYTES", value_name = "BYTES")]
    pub kv_bytes: Option<u64>,
    /// A step is computed in two halves, so that the attention of one hides the experts of the other, when each half has this
    /// many rows for each expert on average; 0 never does. Halving smaller steps would read the experts' weights twice
    #[arg(long, env = "SIROCCO_OVERLAP_ROWS", value_name = "N", default_value_t = OVERLAP_ROWS)]
    pub overlap_rows: u32,
    /// Longest wait for the experts of one layer, in seconds, their move to another node included
    #[arg(long, env = "SIROCCO_EXPERT_TIMEOUT_S", value_name = "SECONDS", default_value_t = EXPERT_TIMEOUT_S)]
    pub expert_timeout_s: u64,
    /// Who may call, and how much a request may ask for
    #[command(flatten)]
    pub policy: Policy,
}

impl Config {
    /// The defaults, for a checkpoint at `model`, on any free ports of this machine.
    pub fn new(model: PathBuf) -> Self {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        Self {
            model,
            grpc: any,
            http: any,
            device: DeviceArgs::default(),
            threads: sirocco_process::default_threads(),
            max_sequences: MAX_SEQUENCES,
            max_queue: MAX_QUEUE,
            step_tokens: STEP_TOKENS,
            kv_bytes: None,
            overlap_rows: OVERLAP_ROWS,
            expert_timeout_s: EXPERT_TIMEOUT_S,
            policy: Policy::default(),
        }
    }
}

/// Why a router node did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A name is not valid.
    #[error(transparent)]
    Name(#[from] NodeIdError),
    /// The checkpoint cannot be served.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The tokenizer cannot be used.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The API keys cannot be used.
    #[error(transparent)]
    Keys(#[from] OpenError),
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
    /// The compute threads cannot be started.
    #[error("--threads: {0}")]
    Threads(String),
    /// The KV cache has no room for a single block.
    #[error("--kv-bytes: {given} is less than one block of the KV cache takes, {block}")]
    KvCache {
        /// As configured.
        given: u64,
        /// Bytes of one block.
        block: usize,
    },
}

/// Starts a node and returns once it is a member; it is ready once a placement serves. `shutdown` asks it to leave.
pub async fn start(
    config: Config,
    args: NodeArgs,
    store: Arc<dyn Store>,
    shutdown: CancellationToken,
) -> Result<Running, StartError> {
    let started = Instant::now();
    // What this node ends by itself ends nothing beside it.
    let shutdown = shutdown.child_token();
    let id = NodeId::new(&args.id)?;
    let keys = Keys::new(&args.cluster)?;
    let (callers, reload) = Callers::open(config.policy.api_keys.as_deref())?;
    let grpc = bind("--grpc", config.grpc).await?;
    let http = bind("--http", config.http).await?;
    let (grpc_at, http_at) = (grpc.local_addr()?, http.local_addr()?);
    let reached_at = advertised(grpc_at, http_at, args.advertise.as_deref())?;
    let of_router = config.clone();
    let loaded = tokio::task::spawn_blocking(move || Loaded::read(&of_router)).await;
    let Loaded { identity, tokenizer, grammars, chat, model } = loaded.map_err(std::io::Error::other)??;
    let limits = EngineLimits {
        sequences: config.max_sequences as usize,
        queue: config.max_queue as usize,
        step_tokens: config.step_tokens as usize,
        overlap_rows: config.overlap_rows as usize,
    };

    let member = Member {
        id,
        role: Role::Router,
        state: MemberState::Starting,
        grpc: reached_at.0,
        http: reached_at.1,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        incarnation: sirocco_process::incarnation(),
        zone: None,
        device: Some(Device { kind: model.router().kind().into(), name: model.router().name() }),
        capacity_bytes: None,
        speed: None,
        max_experts_per_layer: None,
        serving_epoch: None,
        model: Some(ModelIdentity::clone(&identity)),
    };
    let health = Health::new("router-node", &args.id);
    let member_key = keys.member(Role::Router, &member.id);
    let registration = Registration::open(Arc::clone(&store), &member_key, &to_json(&member), LEASE_TTL).await?;
    let mirror = Mirror::start(store, keys.prefix()).await?;
    tracing::info!(id = %member.id, grpc = %grpc_at, model = identity.name, fingerprint = identity.fingerprint.short(), "joined");

    let (tasks, connections) = (TaskTracker::new(), TaskTracker::new());
    let waiting = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let home = Home { runtime: waiting.handle().clone(), tasks: connections.clone() };
    if let Some(reload) = reload {
        tasks.spawn(reload.run(shutdown.clone()));
    }
    let states = ClusterState::follow(&mirror, &keys, &tasks);
    let (sender, topology) = watch::channel(Arc::new(Topology::default()));
    let page = Page::new(&health);
    let metrics = Arc::new(Metrics::new(&page));
    if let Some(gauge) = model.router().gauge() {
        watch_gpu(&page, move || gauge());
    }
    let (told, epoch) = watch::channel(Epoch::default());
    let (states_of, metrics_of) = (states.clone(), Arc::clone(&metrics));
    tasks.spawn(topology::follow(states_of, sender, told, metrics_of, home, shutdown.clone()));
    let tokens = Arc::new(ExpertCounts::new(&identity.spec));
    let reporter =
        Reporter { node: member.id.clone(), incarnation: member.incarnation, started, tokens: Arc::clone(&tokens) };
    tasks.spawn(reporter.run(states.clone(), shutdown.clone()));
    let experts = RemoteExperts {
        topology: topology.clone(),
        fingerprint: identity.fingerprint,
        hidden_size: identity.spec.hidden_size,
        timeout: Duration::from_secs(config.expert_timeout_s),
        tokens,
        turns: Arc::new(ExpertCounts::new(&identity.spec)),
        usual: Arc::default(),
        hedges: Arc::new(Budget::of_hedges()),
        retries: Arc::new(Budget::of_retries()),
        metrics: Arc::clone(&metrics),
    };
    let lost = CancellationToken::new();
    let parts = Parts {
        model,
        tokenizer: Arc::clone(&tokenizer),
        experts,
        limits,
        metrics: Arc::clone(&metrics),
        lost: lost.clone(),
    };
    let (engine, engine_thread) = Engine::start(parts, waiting, connections)?;
    Metrics::watch(&page, &engine, topology.clone());
    let serving =
        Serving { connections: config.policy.max_connections as usize, grace: Duration::from_secs(args.drain_s) };
    let intake = IntakeParts {
        model: Arc::clone(&identity),
        tokenizer,
        grammars,
        callers,
        policy: config.policy,
        engine,
        health: health.clone(),
        metrics,
    };
    let intake = Arc::new(Intake::new(intake));
    let routes =
        http::routes(health.clone(), page).merge(page::routes()).merge(openai::routes(Arc::clone(&intake), chat));
    let service = api::service(intake);
    tasks.spawn(leave_when_lost(lost.clone(), shutdown.clone(), health.clone()));
    let fronts = Fronts { grpc, services: Services::default().with(service), http, serving, routes };
    let presence = Presence { member, member_key, registration, health: health.clone() };
    let presence = AbortOnDropHandle::new(tokio::spawn(presence.keep(states, epoch, shutdown.clone())));
    let grace = serving.grace;
    let life = Life { presence, mirror, tasks, engine_thread, shutdown, lost, grace };
    let life = tokio::spawn(life.run(fronts, health.clone()));
    Ok(Running { id: args.id, grpc: grpc_at, http: http_at, health, life: AbortOnDropHandle::new(life) })
}

/// What is read from the checkpoint's folder.
struct Loaded {
    identity: Arc<ModelIdentity>,
    tokenizer: Arc<Tokenizer>,
    grammars: Grammatical,
    chat: Chat,
    model: Model,
}

impl Loaded {
    fn read(config: &Config) -> Result<Self, StartError> {
        let folder = &config.model;
        let checkpoint = Checkpoint::open(folder)?;
        let device = device(config, checkpoint.spec())?;
        let tokenizer = Tokenizer::load(folder, checkpoint.spec())?;
        let model = Model::load(&checkpoint, device)?;
        let router = model.router();
        tracing::info!(
            device = router.kind(),
            name = router.name(),
            bytes = router.weight_bytes(),
            kv_tokens = router.kv_blocks() * BLOCK_TOKENS,
            "model loaded, without its experts"
        );
        let chat = chat(folder, &checkpoint.identity().name);
        if let Err(problem) = &chat {
            tracing::warn!("chats will be refused: {problem}");
        }
        let grammars = Grammars::new(&tokenizer, checkpoint.spec());
        if let Err(problem) = &grammars {
            tracing::warn!("constraints on completions will be refused: {problem}");
        }
        let (identity, tokenizer) = (Arc::new(checkpoint.identity().clone()), Arc::new(tokenizer));
        Ok(Self { identity, tokenizer, grammars, chat, model })
    }
}

/// The chat template of `model` in `folder`. One that cannot be used is no reason not to serve the model.
fn chat(folder: &Path, model: &str) -> Chat {
    let template = ChatTemplate::load(folder).map_err(|error| format!("the model's chat template: {error}"))?;
    template.ok_or_else(|| format!("the model {model} has no chat template"))
}

/// What a model like `spec` runs on, as `config` wants it. Takes seconds when kernels are compiled.
fn device(config: &Config, spec: &ModelSpec) -> Result<RouterDevice, StartError> {
    let DeviceArgs { device, nvrtc, no_cuda_graphs: no_graphs, .. } = &config.device;
    let cache = config.device.kernel_folder();
    let settings = KernelSettings { nvrtc: nvrtc.clone(), cache, no_graphs: *no_graphs };
    let limits = RouterLimits {
        step_tokens: config.step_tokens as usize,
        step_sequences: config.max_sequences as usize,
        kv_blocks: kv_blocks(config, spec)?,
    };
    let pool = Pool::new(config.threads).map_err(|error| StartError::Threads(error.to_string()))?;
    let (opened, said) = open_router(*device, &settings, spec, limits, pool)?;
    match said {
        Some(reason) if *device == DeviceChoice::Auto => {
            tracing::warn!(reason, "no GPU can be used; the router runs on the CPU");
        }
        Some(reason) => tracing::warn!(reason, "the router runs on the CPU"),
        None => {}
    }
    Ok(opened)
}

/// Blocks that the budget pays for, but no more than every sequence at full length can use.
fn kv_blocks(config: &Config, spec: &ModelSpec) -> Result<KvBlocks, StartError> {
    let most = config.max_sequences as usize * spec.max_position_embeddings.div_ceil(BLOCK_TOKENS);
    let Some(given) = config.kv_bytes else { return Ok(KvBlocks::AsFit { most }) };
    let block = kv_block_bytes(spec);
    match usize::try_from(given / block as u64).unwrap_or(usize::MAX).min(most) {
        0 => Err(StartError::KvCache { given, block }),
        blocks => Ok(KvBlocks::Exactly(blocks)),
    }
}

/// What the router tells others of itself.
struct Presence {
    member: Member,
    member_key: String,
    registration: Registration,
    health: Health,
}

impl Presence {
    /// Keeps the member record and the health in step with the placement that all the router does goes by, until `shutdown`.
    async fn keep(
        mut self,
        mut states: watch::Receiver<Arc<ClusterState>>,
        mut epoch: watch::Receiver<Epoch>,
        shutdown: CancellationToken,
    ) -> Registration {
        loop {
            let current = *epoch.borrow_and_update();
            let own = self.member.model.as_ref().map(|model| model.fingerprint);
            let served = states.borrow_and_update().model().map(|model| model.fingerprint);
            match served {
                Some(served) if Some(served) != own => {
                    self.health.not_ready(format!("the cluster serves another checkpoint, {}", served.short()));
                }
                _ if current.0 == 0 => self.health.not_ready("no placement serves yet"),
                _ => {
                    self.member.state = MemberState::Ready;
                    self.member.serving_epoch = Some(current);
                    self.registration.set([(self.member_key.clone(), to_json(&self.member))]);
                    self.health.ready();
                }
            }
            tokio::select! {
                () = shutdown.cancelled() => return self.registration,
                Ok(()) = epoch.changed() => {}
                Ok(()) = states.changed() => {}
            }
        }
    }
}

/// Where clients come in.
struct Fronts {
    grpc: TcpListener,
    services: Services,
    http: TcpListener,
    serving: Serving,
    routes: axum::Router,
}

/// What a running node consists of.
struct Life {
    presence: AbortOnDropHandle<Registration>,
    mirror: Mirror,
    tasks: TaskTracker,
    engine_thread: std::thread::JoinHandle<()>,
    shutdown: CancellationToken,
    /// Cancelled when the device is lost.
    lost: CancellationToken,
    grace: Duration,
}

impl Life {
    /// Serves until the shutdown, then finishes the requests under way, leaves the cluster and ends.
    async fn run(self, fronts: Fronts, health: Health) -> Result<(), LifeError> {
        let Fronts { grpc, services, http, serving, routes } = fronts;
        let reports = AbortOnDropHandle::new(tokio::spawn(services.health().follow(health.subscribe())));
        let http = http::serve_routes(http, routes, self.shutdown.clone(), serving);
        let (served, answered) = tokio::join!(services.serve(grpc, self.shutdown.clone(), self.grace), http);

        health.not_ready("stopping");
        self.shutdown.cancel();
        drop(reports);
        self.presence.await?.close().await;
        self.mirror.close().await;
        self.tasks.close();
        let engine = tokio::task::spawn_blocking(|| self.engine_thread.join());
        let all = async { tokio::join!(self.tasks.wait(), engine).1 };
        match tokio::time::timeout(self.grace, all).await {
            Ok(Ok(Err(_))) => Err("the engine failed".into()),
            Ok(_) if self.lost.is_cancelled() => Err("the device was lost".into()),
            Ok(_) => served.map_err(LifeError::from).and(answered.map_err(LifeError::from)),
            Err(_) => {
                tracing::warn!("work was still under way at the end of the grace period");
                if self.lost.is_cancelled() { Err("the device was lost".into()) } else { Ok(served?) }
            }
        }
    }
}
