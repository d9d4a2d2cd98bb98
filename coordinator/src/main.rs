//! The program of a coordinator.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use sirocco_process::NodeArgs;
use sirocco_store::{EtcdArgs, EtcdStore};

/// Places every expert on an expert node, and tells operators how the cluster is
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
    sirocco_process::main("coordinator", async |args: Args, shutdown| {
        let store = EtcdStore::connect(args.etcd.into()).await?;
        Ok(sirocco_coordinator::start(args.config, args.node, store, shutdown).await?)
    })
    .await
}
