//! The program of a router node.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use sirocco_process::NodeArgs;
use sirocco_store::{EtcdArgs, EtcdStore};

/// Runs everything of a model but its experts, and serves clients
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
    sirocco_process::main("router-node", async |args: Args, shutdown| {
        let store = EtcdStore::connect(args.etcd.into()).await?;
        Ok(sirocco_router_node::start(args.config, args.node, store, shutdown).await?)
    })
    .await
}
