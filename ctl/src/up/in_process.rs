//! A cluster in this process: the same nodes, talking gRPC over loopback, on the embedded store.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Result, bail};
use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use sirocco_process::{NodeArgs, Running};
use sirocco_store::{EmbeddedStore, Store};
use tokio_util::sync::CancellationToken;

use super::{Addresses, Args, listener};

/// Running nodes, in the order in which they stop: routers first, so that nothing is cut off under them.
pub(super) struct Cluster {
    routers: Group,
    experts: Group,
    coordinators: Group,
}

/// Nodes that stop together.
struct Group {
    nodes: Vec<Running>,
    stop: CancellationToken,
}

impl Group {
    fn new() -> Self {
        Self { nodes: Vec::new(), stop: CancellationToken::new() }
    }
}

impl Cluster {
    /// Starts every node; they then place and load the experts by themselves.
    pub(super) async fn start(args: &Args, model: &Path, shutdown: &CancellationToken) -> Result<Self> {
        let store: Arc<dyn Store> = Arc::new(EmbeddedStore::new());
        let mut cluster = Self { routers: Group::new(), experts: Group::new(), coordinators: Group::new() };
        let node = |id: String| NodeArgs {
            id,
            cluster: args.cluster.clone(),
            advertise: None,
            drain_s: args.drain_s,
            config: None,
        };
        let any = ([127, 0, 0, 1], 0).into();

        let group = &mut cluster.coordinators;
        let config = sirocco_coordinator::Config {
            grpc: listener(args, args.coordinator_grpc, 7400),
            http: listener(args, args.coordinator_http, 7401),
            settle_ms: 200,
        };
        let coordinator = node("coordinator-0".into());
        group
            .nodes
            .push(sirocco_coordinator::start(config, coordinator, Arc::clone(&store), group.stop.clone()).await?);

        let group = &mut cluster.routers;
        for index in 0..args.routers {
            let mut config = sirocco_router_node::Config::new(model.to_owned());
            config.threads = args.threads;
            if index == 0 {
                config.grpc = listener(args, args.grpc, 8001);
                config.http = listener(args, args.http, 8000);
            }
            let router = node(format!("router-{index}"));
            group.nodes.push(sirocco_router_node::start(config, router, Arc::clone(&store), group.stop.clone()).await?);
        }

        let group = &mut cluster.experts;
        let capacity = sirocco_expert_node::default_capacity() / u64::from(args.expert_nodes);
        for index in 0..args.expert_nodes {
            if shutdown.is_cancelled() {
                break;
            }
            let config = sirocco_expert_node::Config {
                model: model.to_owned(),
                grpc: any,
                http: any,
                threads: args.threads,
                capacity_bytes: Some(capacity),
                zone: None,
                no_progress: true,
            };
            let expert = node(format!("expert-{index}"));
            group.nodes.push(sirocco_expert_node::start(config, expert, Arc::clone(&store), group.stop.clone()).await?);
        }
        Ok(cluster)
    }

    pub(super) fn addresses(&self) -> Addresses {
        Addresses {
            coordinator: self.coordinators.nodes[0].grpc.to_string(),
            router: self.routers.nodes[0].grpc.to_string(),
        }
    }

    /// Waits until every router can serve.
    pub(super) async fn ready(&mut self) -> Result<()> {
        let healths: Vec<_> = self.routers.nodes.iter().map(|node| node.health.clone()).collect();
        let ready = async {
            for health in healths {
                health.until_ready().await;
            }
        };
        tokio::select! {
            () = ready => Ok(()),
            result = self.any_ended() => result,
        }
    }

    /// Waits until a node ends that was not asked to.
    pub(super) async fn any_ended(&mut self) -> Result<()> {
        let groups = [&mut self.routers, &mut self.experts, &mut self.coordinators];
        let mut lives: FuturesUnordered<_> = groups
            .into_iter()
            .flat_map(|group| &mut group.nodes)
            .map(|node| async { (node.id.clone(), (&mut node.life).await) })
            .collect();
        match lives.next().await {
            Some((id, Ok(Ok(())))) => bail!("{id} ended by itself"),
            Some((id, Ok(Err(error)))) => bail!("{id} failed: {error}"),
            Some((id, Err(error))) => bail!("{id} failed: {error}"),
            None => bail!("there are no nodes"),
        }
    }

    /// Stops every node and waits for it.
    pub(super) async fn stop(self) -> Result<()> {
        let mut result = Ok(());
        for group in [self.routers, self.experts, self.coordinators] {
            group.stop.cancel();
            for node in group.nodes {
                if node.life.is_finished() {
                    continue;
                }
                let id = node.id.clone();
                if let Err(error) = node.ended().await {
                    result = Err(anyhow::anyhow!("{id}: {error}"));
                }
            }
        }
        result
    }
}
