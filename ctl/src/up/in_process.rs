//! A cluster in this process: the same nodes, talking gRPC over loopback, on the embedded store.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Result, anyhow, bail};
use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use sirocco_process::{NodeArgs, Running};
use sirocco_store::{EmbeddedStore, Store};
use tokio_util::sync::CancellationToken;

use super::{Addresses, Args, Cluster, explain_wait, listener};

/// Running nodes, in the order in which they stop: routers first, so that nothing is cut off under them.
pub(super) struct InProcess {
    routers: Group,
    experts: Group,
    coordinators: Group,
}

/// Nodes that stop together.
#[derive(Default)]
struct Group {
    nodes: Vec<Running>,
    stop: CancellationToken,
}

impl InProcess {
    /// A cluster without nodes.
    pub(super) fn new() -> Self {
        Self { routers: Group::default(), experts: Group::default(), coordinators: Group::default() }
    }

    async fn start_nodes(&mut self, args: &Args, model: &Path) -> Result<Addresses> {
        let store: Arc<dyn Store> = Arc::new(EmbeddedStore::new());
        let node = |id: String| NodeArgs {
            id,
            cluster: args.cluster.clone(),
            advertise: None,
            drain_s: args.drain_s,
            config: None,
        };

        let group = &mut self.coordinators;
        let config = sirocco_coordinator::Config {
            settle_ms: 200,
            ..sirocco_coordinator::Config::new(
                listener(args, args.coordinator_grpc, 7400),
                listener(args, args.coordinator_http, 7401),
            )
        };
        let coordinator = node("coordinator-0".into());
        group
            .nodes
            .push(sirocco_coordinator::start(config, coordinator, Arc::clone(&store), group.stop.clone()).await?);

        let kv_bytes = args.kv_bytes().await?;
        let group = &mut self.routers;
        for index in 0..args.routers {
            let mut config = sirocco_router_node::Config::new(model.to_owned());
            config.threads = args.threads;
            config.device = args.device.clone();
            config.kv_bytes = kv_bytes;
            config.policy = args.policy.clone();
            if index == 0 {
                config.grpc = listener(args, args.grpc, 8001);
                config.http = listener(args, args.http, 8000);
            }
            let router = node(format!("router-{index}"));
            group.nodes.push(sirocco_router_node::start(config, router, Arc::clone(&store), group.stop.clone()).await?);
        }

        let capacity_bytes = args.capacity_bytes(&sirocco_model::read_spec(model)?).await?;
        let group = &mut self.experts;
        for index in 0..args.expert_nodes {
            let any = ([127, 0, 0, 1], 0).into();
            let config = sirocco_expert_node::Config {
                model: model.to_owned(),
                grpc: any,
                http: any,
                threads: args.threads,
                capacity_bytes: Some(capacity_bytes),
                device: args.device.clone(),
                speed: 100,
                max_experts_per_layer: None,
                expert_dtype: args.expert_dtype,
                zone: None,
                no_progress: true,
            };
            let expert = node(format!("expert-{index}"));
            group.nodes.push(sirocco_expert_node::start(config, expert, Arc::clone(&store), group.stop.clone()).await?);
        }
        Ok(Addresses {
            coordinator: self.coordinators.nodes[0].grpc.to_string(),
            router: self.routers.nodes[0].grpc.to_string(),
            router_http: self.routers.nodes[0].http.to_string(),
        })
    }
}

impl Cluster for InProcess {
    async fn start(&mut self, args: &Args, model: &Path) -> Result<Addresses> {
        let addresses = self.start_nodes(args, model).await?;
        let healths: Vec<_> = self.routers.nodes.iter().map(|node| node.health.clone()).collect();
        let ready = async {
            for health in healths {
                health.until_ready().await;
            }
        };
        tokio::select! {
            () = ready => {}
            result = self.any_ended() => result?,
            result = explain_wait(&addresses.coordinator) => result?,
        }
        Ok(addresses)
    }

    async fn any_ended(&mut self) -> Result<()> {
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

    async fn stop(self) -> Result<()> {
        let mut result = Ok(());
        for group in [self.routers, self.experts, self.coordinators] {
            group.stop.cancel();
            for node in group.nodes.into_iter().filter(|node| !node.life.is_finished()) {
                let id = node.id.clone();
                result = result.and(node.ended().await.map_err(|error| anyhow!("{id}: {error}")));
            }
        }
        result
    }
}
