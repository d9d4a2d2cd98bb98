//! What the three kinds of node have in common: the flags that say who they are, a handle to one that runs, and their `main`.

use std::net::SocketAddr;
use std::process::ExitCode;

use tokio::task::JoinError;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::http::Health;
use crate::{Shutdown, chain, config, exit, logs};

/// Who a node is and how it leaves.
#[derive(Clone, Debug, clap::Args)]
pub struct NodeArgs {
    /// Name of this node, unique among nodes of its kind and the same after a restart [default: the host's name]
    #[arg(long, env = "SIROCCO_ID", value_name = "NAME", default_value_t = host_name(), hide_default_value = true)]
    pub id: String,
    /// Name of the cluster; clusters of different names share a store without meeting
    #[arg(long, env = "SIROCCO_CLUSTER", value_name = "NAME", default_value = "default")]
    pub cluster: String,
    /// Host (or host:port) at which other nodes reach this one's gRPC port [default: where it listens]
    #[arg(long, env = "SIROCCO_ADVERTISE", value_name = "HOST[:PORT]")]
    pub advertise: Option<String>,
    /// Longest wait, in seconds, for work under way to finish when this node is asked to stop; an expert node first waits as
    /// long for its experts to be served elsewhere
    #[arg(long, env = "SIROCCO_DRAIN_S", value_name = "SECONDS", default_value_t = 20)]
    pub drain_s: u64,
    /// Configuration file (TOML); its keys are the flags' names
    #[arg(long, env = "SIROCCO_CONFIG", value_name = "FILE")]
    pub config: Option<std::path::PathBuf>,
}

/// The host's name, as far as it can be a node's.
fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_ascii_lowercase();
    if name.is_empty() { "node-0".to_owned() } else { name }
}

/// Why a node ended.
pub type LifeError = Box<dyn std::error::Error + Send + Sync>;

/// A node that runs. It ends when dropped; ask it to end through the token it was started with.
#[derive(Debug)]
pub struct Running {
    /// Its id.
    pub id: String,
    /// Where its gRPC services listen.
    pub grpc: SocketAddr,
    /// Where its HTTP endpoints listen.
    pub http: SocketAddr,
    /// Whether it can do its work.
    pub health: Health,
    /// Its life, to be waited for.
    pub life: AbortOnDropHandle<Result<(), LifeError>>,
}

impl Running {
    /// Waits for its end.
    pub async fn ended(self) -> Result<(), LifeError> {
        self.life.await.unwrap_or_else(|error: JoinError| Err(error.into()))
    }
}

/// The whole life of a node's program: settings, logs, `start`, ready, wait for a signal or the node's own end, drain, exit.
///
/// Standard output gets `listening grpc=ADDR http=ADDR`, then `ready`, each on a line of its own.
pub async fn main<A, F>(program: &str, start: impl FnOnce(A, CancellationToken) -> F) -> ExitCode
where
    A: clap::Parser,
    F: Future<Output = Result<Running, LifeError>>,
{
    let args = config::parse::<A>();
    logs::init(logs::SERVER);
    let token = CancellationToken::new();
    let life = async {
        let node = tokio::select! {
            node = start(args, token.clone()) => node?,
            () = token.cancelled() => return Ok(()),
        };
        live(node).await
    };
    let result = match Shutdown::listen() {
        Ok(signals) => signals.drive(&token, life).await,
        Err(error) => Err(error.into()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{program}: {}", chain(&*error));
            ExitCode::from(exit::FAILED)
        }
    }
}

async fn live(node: Running) -> Result<(), LifeError> {
    println!("listening grpc={} http={}", node.grpc, node.http);
    let health = node.health.clone();
    let mut ended = std::pin::pin!(node.ended());
    tokio::select! {
        result = &mut ended => return result,
        () = health.until_ready() => println!("ready"),
    }
    ended.await
}
