//! `sirocco up`: a whole cluster with one command, in this process or as processes of its own.

mod in_process;
mod processes;

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Result, bail};
use sirocco_proto::wire::inference::generate_request::Prompt;
use sirocco_store::EtcdArgs;
use tokio_util::sync::CancellationToken;

use crate::bundled;
use crate::cluster::{NODE_COLUMNS, NodeView, list_nodes};
use crate::generate::{SamplingArgs, complete, show};
use crate::output::table;

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
    #[arg(long, value_name = "TEXT")]
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
    pub(crate) etcd: EtcdArgs,
}

/// Where a started cluster answers.
#[derive(Clone, Debug)]
struct Addresses {
    coordinator: String,
    router: String,
}

/// Starts a cluster, serves until `shutdown` (or until the prompt is completed), and stops it.
pub(crate) async fn run(mut args: Args, shutdown: CancellationToken) -> Result<()> {
    let model = match args.model.take() {
        Some(folder) => folder,
        None => bundled::folder()?,
    };
    if args.processes {
        let mut cluster = processes::Cluster::start(&args, &model, &shutdown).await?;
        let result = match cluster.addresses() {
            Some(addresses) => {
                tokio::select! {
                    result = serve(&args, &addresses, &shutdown) => result,
                    result = cluster.any_ended() => result,
                }
            }
            None => Ok(()),
        };
        return cluster.stop().await.and(result);
    }
    let mut cluster = in_process::Cluster::start(&args, &model, &shutdown).await?;
    let addresses = cluster.addresses();
    let result = tokio::select! {
        ready = cluster.ready() => match ready {
            Ok(()) => tokio::select! {
                result = serve(&args, &addresses, &shutdown) => result,
                result = cluster.any_ended() => result,
            },
            Err(error) => Err(error),
        },
        () = shutdown.cancelled() => Ok(()),
    };
    cluster.stop().await.and(result)
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
    let completion = complete(&addresses.router, String::new(), prompt, args.sampling.clone(), show);
    tokio::select! {
        completion = completion => completion.map(|_| println!()),
        () = shutdown.cancelled() => bail!("interrupted"),
    }
}

/// What runs where, and the lines to copy to talk to it.
async fn describe(addresses: &Addresses) -> Result<String> {
    let nodes = list_nodes(&addresses.coordinator).await?;
    let rows: Vec<Vec<String>> = nodes.iter().map(NodeView::row).collect();
    let Addresses { coordinator, router } = addresses;
    let program = program();
    Ok(format!(
        "{}\n\n\
         {program} generate --router {router} \"In the beginning God\" --max-tokens 48 --temperature 0\n\
         {program} status --coordinator {coordinator}\n\
         {program} placement show --coordinator {coordinator}\n\
         grpcurl -plaintext -d '{{\"text\": \"In the beginning God\", \"max_tokens\": 16}}' {router} \
         sirocco.inference.v1.InferenceService/Generate",
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
