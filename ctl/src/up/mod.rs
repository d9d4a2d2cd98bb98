//! `sirocco up`: a whole cluster with one command, in this process or as processes of its own.

mod in_process;
mod processes;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use sirocco_process::DeviceArgs;
use sirocco_proto::wire::inference::generate_request::Prompt;
use sirocco_router_node::Policy;
use sirocco_store::EtcdArgs;
use sirocco_types::{ExpertDtype, ModelSpec};
use tokio_util::sync::CancellationToken;

use crate::bundled;
use crate::cluster::{NODE_COLUMNS, NodeView, list_nodes, problems};
use crate::generate::{Asked, SamplingArgs, complete, show};
use crate::output::table;

/// How long a cluster may take to be ready before what it waits for is said, and said again when it changes.
const EXPLAIN_AFTER: Duration = Duration::from_secs(3);

/// Flags of `up`.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    /// Checkpoint folder [default: the bundled model, a small Mixtral]
    #[arg(long, env = "SIROCCO_MODEL", value_name = "FOLDER")]
    pub(crate) model: Option<PathBuf>,
    /// Expert nodes to start
    #[arg(long, env = "SIROCCO_EXPERT_NODES", value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) expert_nodes: u16,
    /// Router nodes to start; the second and later ones listen on free ports
    #[arg(long, env = "SIROCCO_ROUTERS", value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) routers: u16,
    /// Complete this prompt, print the completion, and stop
    #[arg(long, env = "SIROCCO_PROMPT", value_name = "TEXT", conflicts_with = "api_keys")]
    pub(crate) prompt: Option<String>,
    #[command(flatten)]
    pub(crate) sampling: SamplingArgs,
    /// Where the router serves gRPC; port 0 takes any free one [default: 127.0.0.1:8001, any with --prompt]
    #[arg(long, env = "SIROCCO_GRPC", value_name = "ADDR")]
    pub(crate) grpc: Option<SocketAddr>,
    /// Where the router serves HTTP [default: 127.0.0.1:8000, any with --prompt]
    #[arg(long, env = "SIROCCO_HTTP", value_name = "ADDR")]
    pub(crate) http: Option<SocketAddr>,
    /// Where the coordinator serves gRPC [default: 127.0.0.1:7400, any with --prompt]
    #[arg(long, env = "SIROCCO_COORDINATOR_GRPC", value_name = "ADDR")]
    pub(crate) coordinator_grpc: Option<SocketAddr>,
    /// Where the coordinator serves HTTP [default: 127.0.0.1:7401, any with --prompt]
    #[arg(long, env = "SIROCCO_COORDINATOR_HTTP", value_name = "ADDR")]
    pub(crate) coordinator_http: Option<SocketAddr>,
    /// Compute threads of each node
    #[arg(long, env = "SIROCCO_THREADS", value_name = "N", default_value_t = sirocco_process::default_threads())]
    pub(crate) threads: usize,
    /// What the expert nodes keep expert weights as: bf16 as stored, or int8 or int4
    #[arg(long, env = "SIROCCO_EXPERT_DTYPE", value_name = "bf16|int8|int4", default_value_t)]
    pub(crate) expert_dtype: ExpertDtype,
    /// What routers and expert nodes run on; they share a GPU
    #[command(flatten)]
    pub(crate) device: DeviceArgs,
    /// Start each node as a process of its own, on etcd
    #[arg(long, env = "SIROCCO_PROCESSES")]
    pub(crate) processes: bool,
    /// Name of the cluster, with --processes
    #[arg(long, env = "SIROCCO_CLUSTER", value_name = "NAME", default_value = "default")]
    pub(crate) cluster: String,
    /// Longest wait, in seconds, for work under way to finish when stopping
    #[arg(long, env = "SIROCCO_DRAIN_S", value_name = "SECONDS", default_value_t = 20)]
    pub(crate) drain_s: u64,
    #[command(flatten)]
    pub(crate) policy: Policy,
    #[command(flatten)]
    pub(crate) etcd: EtcdArgs,
}

impl Args {
    /// Makes of the device `auto` what it is here, and says why no GPU is used.
    async fn settle_device(&mut self) -> Result<()> {
        let mut device = self.device.clone();
        let settled = tokio::task::spawn_blocking(move || {
            let said = sirocco_expert_node::settle(&mut device)?;
            anyhow::Ok((device, said))
        });
        let (device, said) = settled.await?.context("--device")?;
        if let Some(reason) = said {
            eprintln!("no GPU can be used; all runs on the CPU: {reason}");
        }
        self.device = device;
        Ok(())
    }

    /// Each router's share of a GPU for its KV cache; none where all routers may take what is usual.
    async fn kv_bytes(&self) -> Result<Option<u64>> {
        let (device, routers) = (self.device.clone(), self.routers);
        let share = tokio::task::spawn_blocking(move || sirocco_expert_node::kv_share(&device, routers));
        share.await?.context("--device")
    }

    /// Each expert node's share of the machine's memory or of the GPU's, once the routers have taken theirs.
    async fn capacity_bytes(&self, spec: &ModelSpec) -> Result<u64> {
        let (device, dtype, nodes) = (self.device.clone(), self.expert_dtype, self.expert_nodes);
        let spec = spec.clone();
        let share = move || sirocco_expert_node::capacity_share(&device, &spec, dtype, nodes);
        tokio::task::spawn_blocking(share).await?.context("--device")
    }
}

/// Where a started cluster answers.
#[derive(Clone, Debug)]
struct Addresses {
    coordinator: String,
    router: String,
    router_http: String,
}

/// A cluster under the care of this process.
trait Cluster {
    /// Starts every node and waits until the routers can serve.
    async fn start(&mut self, args: &Args, model: &Path) -> Result<Addresses>;

    /// Waits until a node ends that was not asked to, which is always an error.
    async fn any_ended(&mut self) -> Result<()>;

    /// Asks every node that was started to stop, and waits for it.
    async fn stop(self) -> Result<()>;
}

/// Starts a cluster, serves until `shutdown` (or until the prompt is completed), and stops it.
pub(crate) async fn run(mut args: Args, shutdown: CancellationToken) -> Result<()> {
    let model = match args.model.take() {
        Some(folder) => folder,
        None => bundled::folder()?,
    };
    args.settle_device().await?;
    if args.processes {
        run_on(processes::Processes::new(&args), &args, &model, &shutdown).await
    } else {
        run_on(in_process::InProcess::new(), &args, &model, &shutdown).await
    }
}

async fn run_on(mut cluster: impl Cluster, args: &Args, model: &Path, shutdown: &CancellationToken) -> Result<()> {
    let started = tokio::select! {
        started = cluster.start(args, model) => started.map(Some),
        () = shutdown.cancelled() => Ok(None),
    };
    let result = match started {
        Ok(Some(addresses)) => tokio::select! {
            result = serve(args, &addresses, shutdown) => result,
            result = cluster.any_ended() => result,
        },
        Ok(None) => Ok(()),
        Err(error) => Err(error),
    };
    // What went wrong first is the cause; what stopping reports may be a consequence of it.
    let stopped = cluster.stop().await;
    result.and(stopped)
}

/// Says what a cluster that is not ready yet waits for, as its coordinator sees it. Never returns.
async fn explain_wait(coordinator: &str) -> Result<()> {
    let mut said = Vec::new();
    loop {
        tokio::time::sleep(EXPLAIN_AFTER).await;
        // A coordinator that does not answer yet is one more thing to wait for.
        let problems = problems(coordinator).await.unwrap_or_default();
        if problems != said {
            for problem in &problems {
                eprintln!("waiting: {problem}");
            }
            said = problems;
        }
    }
}

/// What is done with a cluster that can serve.
async fn serve(args: &Args, addresses: &Addresses, shutdown: &CancellationToken) -> Result<()> {
    let Some(prompt) = &args.prompt else {
        println!("{}\n", describe(addresses).await?);
        println!("ready");
        shutdown.cancelled().await;
        return Ok(());
    };
    eprintln!("ready");
    let prompt = Prompt::Text(prompt.clone());
    let asked = Asked { routers: vec![addresses.router.clone()], model: String::new(), api_key: None, prompt };
    let completion = complete(asked, args.sampling.clone(), show);
    tokio::select! {
        completion = completion => completion.map(|_| println!()),
        () = shutdown.cancelled() => bail!("interrupted"),
    }
}

/// What runs where, where its page is, and the lines to copy to talk to it.
async fn describe(addresses: &Addresses) -> Result<String> {
    let nodes = list_nodes(&addresses.coordinator).await?;
    let rows: Vec<Vec<String>> = nodes.iter().map(NodeView::row).collect();
    let Addresses { coordinator, router, router_http } = addresses;
    let program = program();
    Ok(format!(
        "{}\n\n\
         page: http://{router_http}/\n\n\
         {program} generate --router {router} \"In the beginning God\" --max-tokens 48 --temperature 0\n\
         {program} status --coordinator {coordinator}\n\
         {program} placement show --coordinator {coordinator}\n\
         grpcurl -plaintext -d '{{\"text\": \"In the beginning God\", \"max_tokens\": 16}}' {router} \
         sirocco.inference.v1.InferenceService/Generate\n\
         curl http://{router_http}/v1/completions -H 'Content-Type: application/json' \
         -d '{{\"prompt\": \"In the beginning God\", \"max_tokens\": 16}}'",
        table(&NODE_COLUMNS, &rows, false)
    ))
}

/// How this program can be called from here.
fn program() -> String {
    let path = std::env::current_exe().unwrap_or_else(|_| "sirocco".into());
    let here = std::env::current_dir().unwrap_or_default();
    path.strip_prefix(&here).unwrap_or(&path).display().to_string()
}

/// Where a listener goes: as told, at its usual place, or anywhere when the cluster lives for one prompt only.
fn listener(args: &Args, given: Option<SocketAddr>, usual_port: u16) -> SocketAddr {
    given.unwrap_or_else(|| SocketAddr::from(([127, 0, 0, 1], if args.prompt.is_some() { 0 } else { usual_port })))
}
