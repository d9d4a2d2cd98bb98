//! The program of an expert node.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use sirocco_process::NodeArgs;
use sirocco_store::{EtcdArgs, EtcdStore};

/// Holds and runs the experts that the placement gives it
#[derive(Debug, Parser)]
#[command(name = "expert-node", version)]
struct Args {
    #[command(flatten)]
    config: sirocco_expert_node::Config,
    #[command(flatten)]
    node: NodeArgs,
    #[command(flatten)]
    etcd: EtcdArgs,
}

#[tokio::main]
async fn main() -> ExitCode {
    sirocco_process::main("expert-node", async |args: Args, shutdown| {
        let store = EtcdStore::connect(args.etcd.into()).await?;
        Ok(sirocco_expert_node::start(args.config, args.node, store, shutdown).await?)
    })
    .await
}
