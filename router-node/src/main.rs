//! The program of a router node.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use sirocco_process::{NodeArgs, Shutdown, config, exit, live, logs};
use sirocco_store::{EtcdArgs, EtcdStore};
use tokio_util::sync::CancellationToken;

/// Runs everything of a model but its experts, and serves clients.
#[derive(Debug, Parser)]
#[command(name = "router-node", version)]
struct Args {
    #[command(flatten)]
    config: sirocco_router_node::Config,
    #[command(flatten)]
    node: NodeArgs,
    #[command(flatten)]
    etcd: EtcdArgs,
}

#[tokio::main]
async fn main() -> ExitCode {
    let args: Args = config::parse();
    logs::init(logs::SERVER);
    let token = CancellationToken::new();
    let result = match Shutdown::listen() {
        Ok(signals) => signals.drive(&token, run(args, token.clone())).await,
        Err(error) => Err(error.into()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("router-node: {error:#}");
            ExitCode::from(exit::FAILED)
        }
    }
}

async fn run(args: Args, shutdown: CancellationToken) -> anyhow::Result<()> {
    let store = tokio::select! {
        store = EtcdStore::connect(args.etcd.into()) => store?,
        () = shutdown.cancelled() => return Ok(()),
    };
    let node = sirocco_router_node::start(args.config, args.node, store, shutdown).await?;
    live(node).await.map_err(anyhow::Error::from_boxed)
}
