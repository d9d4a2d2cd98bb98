//! An operator who asks any coordinator and, when that one cannot answer, the next.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use sirocco_proto::channel;
use sirocco_proto::cluster::ClusterServiceClient;
use sirocco_proto::tonic::transport::Channel;
use sirocco_proto::tonic::{Code, Response, Status};
use sirocco_proto::wire::cluster as wire;
use sirocco_proto::wire::cluster::operate_request::Action;
use sirocco_testkit::PATIENCE;
use sirocco_testkit::cluster::{Cluster, Node};
use tokio::time::Instant;

use super::{POLL, until};

/// Who the records say has asked.
pub(crate) const BY: &str = "tester@e2e";

/// Longest wait for one coordinator.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

type Client = ClusterServiceClient<Channel>;

/// See the module.
pub(crate) struct Operator {
    addresses: Vec<String>,
    next: AtomicUsize,
}

impl Operator {
    /// Asks the coordinators of `cluster`; those that are dead too.
    pub(crate) fn of(cluster: &Cluster) -> Self {
        Self::of_nodes(&cluster.coordinators)
    }

    /// Asks `nodes`.
    pub(crate) fn of_nodes<'a>(nodes: impl IntoIterator<Item = &'a Node>) -> Self {
        let addresses = nodes.into_iter().map(|node| node.grpc.clone()).collect();
        Self { addresses, next: AtomicUsize::new(0) }
    }

    /// Has the cluster do `action`; returns once it is recorded.
    pub(crate) async fn operate(&self, action: Action) -> wire::Operation {
        let request = wire::OperateRequest { by: BY.to_owned(), action: Some(action) };
        let response = self.ask(async |mut client: Client| client.operate(request.clone()).await).await;
        response.operation.expect("what was done")
    }

    /// As [`Operator::operate`]; returns once it is done. Panics when it fails.
    pub(crate) async fn complete(&self, action: Action) -> wire::Operation {
        let id = self.operate(action).await.id;
        let operation = self.ended(id).await;
        assert_eq!(operation.state, "done", "{operation:?}");
        operation
    }

    /// The record of operation `id` when it is over.
    pub(crate) async fn ended(&self, id: u64) -> wire::Operation {
        until(&format!("operation {id} to end"), async || {
            self.operations().await.into_iter().find(|operation| operation.id == id && operation.state != "running")
        })
        .await
    }

    /// All operations, newest first.
    pub(crate) async fn operations(&self) -> Vec<wire::Operation> {
        let request = wire::ListOperationsRequest { limit: 0 };
        self.ask(async |mut client: Client| client.list_operations(request).await).await.operations
    }

    pub(crate) async fn cluster(&self) -> wire::Cluster {
        self.ask(async |mut client: Client| client.get_cluster(wire::GetClusterRequest {}).await).await
    }

    pub(crate) async fn nodes(&self) -> Vec<wire::Node> {
        self.ask(async |mut client: Client| client.list_nodes(wire::ListNodesRequest {}).await).await.nodes
    }

    pub(crate) async fn experts(&self) -> Vec<wire::Expert> {
        let request = wire::ListExpertsRequest { layer: None };
        self.ask(async |mut client: Client| client.list_experts(request).await).await.experts
    }

    pub(crate) async fn load(&self) -> wire::Load {
        self.ask(async |mut client: Client| client.get_load(wire::GetLoadRequest {}).await).await
    }

    /// The placements that are kept, newest first.
    pub(crate) async fn placements(&self) -> Vec<wire::PlacementAbout> {
        let request = wire::ListPlacementsRequest {};
        self.ask(async |mut client: Client| client.list_placements(request).await).await.placements
    }

    /// Waits until nothing is under way: what is to be serves, and no operation runs.
    pub(crate) async fn settled(&self) -> wire::Cluster {
        until("the cluster to settle", async || {
            let cluster = self.cluster().await;
            let running = self.operations().await.iter().any(|operation| operation.state == "running");
            (cluster.serving && cluster.serving_epoch == cluster.target_epoch && !running).then_some(cluster)
        })
        .await
    }

    /// Waits until routers are sent to `node` for an expert of every layer.
    pub(crate) async fn serves(&self, node: &str) {
        until(&format!("{node} to serve"), async || {
            let experts = self.experts().await;
            let layers = experts.iter().map(|expert| expert.layer).max()?;
            let on_node = |expert: &wire::Expert| expert.serving.iter().any(|name| name == node);
            (0..=layers)
                .all(|layer| experts.iter().any(|expert| expert.layer == layer && on_node(expert)))
                .then_some(())
        })
        .await;
    }

    /// Asks one coordinator after the other until one answers. Refusals that time heals count as no answer.
    async fn ask<T>(&self, call: impl AsyncFn(Client) -> Result<Response<T>, Status>) -> T {
        let began = Instant::now();
        loop {
            let address = &self.addresses[self.next.fetch_add(1, Ordering::Relaxed) % self.addresses.len()];
            let asked = async {
                let channel =
                    channel::connect(address).await.map_err(|error| Status::unavailable(error.to_string()))?;
                call(ClusterServiceClient::new(channel)).await
            };
            let answer = tokio::time::timeout(ANSWER_TIMEOUT, asked).await;
            match answer.unwrap_or_else(|_| Err(Status::deadline_exceeded("no answer"))) {
                Ok(response) => return response.into_inner(),
                Err(status) if passes(&status) && began.elapsed() < PATIENCE => tokio::time::sleep(POLL).await,
                Err(status) => panic!("after {:?}: {status}", began.elapsed()),
            }
        }
    }
}

/// Whether the same question may be answered a little later.
fn passes(status: &Status) -> bool {
    let on_its_way = status.code() == Code::FailedPrecondition && status.message().contains("on its way");
    matches!(status.code(), Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled) || on_its_way
}

pub(crate) fn cordon(node: &str) -> Action {
    Action::Cordon(wire::NodeAction { node: node.to_owned() })
}

pub(crate) fn uncordon(node: &str) -> Action {
    Action::Uncordon(wire::NodeAction { node: node.to_owned() })
}

pub(crate) fn drain(node: &str) -> Action {
    Action::Drain(wire::NodeAction { node: node.to_owned() })
}

pub(crate) fn min_replicas(replicas: u32) -> Action {
    Action::SetMinReplicas(wire::SetMinReplicas { replicas, layer: None, expert: None })
}
