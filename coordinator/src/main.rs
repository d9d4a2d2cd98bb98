//! The program of a coordinator.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use sirocco_process::{NodeArgs, Shutdown, config, exit, live, logs};
use sirocco_store::{EtcdArgs, EtcdStore};
use tokio_util::sync::CancellationToken;

/// Places every expert on an expert node, and tells operators how the cluster is.
#[derive(Debug, Parser)]
#[command(name = "coordinator", version)]
struct Args {
    #[command(flatten)]
    config: sirocco_coordinator::Config,
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
            eprintln!("coordinator: {error:#}");
            ExitCode::from(exit::FAILED)
        }
    }
}

async fn run(args: Args, shutdown: CancellationToken) -> anyhow::Result<()> {
    let store = tokio::select! {
        store = EtcdStore::connect(args.etcd.into()) => store?,
        () = shutdown.cancelled() => return Ok(()),
    };
    let node = sirocco_coordinator::start(args.config, args.node, store, shutdown).await?;
    live(node).await.map_err(anyhow::Error::from_boxed)
}
