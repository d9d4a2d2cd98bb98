//! `sirocco.cluster.v1`: the cluster's state in an operator's words. Any coordinator answers, leader or not.

use std::pin::Pin;
use std::sync::Arc;

use futures::{Stream, StreamExt as _};
use sirocco_proto::cluster::ClusterService;
use sirocco_proto::tonic::{Request, Response, Status};
use sirocco_proto::wire::cluster as wire;
use sirocco_store::ClusterState;
use sirocco_types::{Member, ModelSpec, NodeId, Placement, Role};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_stream::wrappers::WatchStream;
use tokio_util::sync::CancellationToken;

use crate::problems::problems;

/// The gRPC service of one coordinator.
#[derive(Debug)]
pub(crate) struct Api {
    pub(crate) cluster: String,
    pub(crate) states: watch::Receiver<Arc<ClusterState>>,
    /// Since when the store has been out of reach.
    pub(crate) stale_since: watch::Receiver<Option<Instant>>,
    pub(crate) shutdown: CancellationToken,
}

#[sirocco_proto::tonic::async_trait]
impl ClusterService for Api {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<wire::WatchResponse, Status>> + Send>>;

    async fn get_cluster(&self, _: Request<wire::GetClusterRequest>) -> Result<Response<wire::Cluster>, Status> {
        Ok(Response::new(cluster(&self.cluster, &self.state(), *self.stale_since.borrow())))
    }

    async fn list_nodes(
        &self,
        _: Request<wire::ListNodesRequest>,
    ) -> Result<Response<wire::ListNodesResponse>, Status> {
        Ok(Response::new(wire::ListNodesResponse { nodes: nodes(&self.state()) }))
    }

    async fn list_experts(
        &self,
        request: Request<wire::ListExpertsRequest>,
    ) -> Result<Response<wire::ListExpertsResponse>, Status> {
        let state = self.state();
        let layer = request.into_inner().layer;
        let layers = state.model().map_or(0, |model| model.spec.num_hidden_layers);
        if let Some(layer) = layer.filter(|layer| *layer as usize >= layers) {
            return Err(Status::invalid_argument(format!("layer: {layer}, the model has {layers}")));
        }
        let experts = experts(&state).filter(|expert| layer.is_none_or(|layer| expert.layer == layer)).collect();
        Ok(Response::new(wire::ListExpertsResponse { experts }))
    }

    async fn get_placement(
        &self,
        request: Request<wire::GetPlacementRequest>,
    ) -> Result<Response<wire::Placement>, Status> {
        let state = self.state();
        let placement = match request.into_inner().kind() {
            wire::PlacementKind::Target => state.target(),
            wire::PlacementKind::Serving | wire::PlacementKind::Unspecified => state.serving(),
        };
        Ok(Response::new(placement.map(Into::into).unwrap_or_default()))
    }

    async fn list_placements(
        &self,
        _: Request<wire::ListPlacementsRequest>,
    ) -> Result<Response<wire::ListPlacementsResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn get_load(&self, _: Request<wire::GetLoadRequest>) -> Result<Response<wire::Load>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn plan(&self, _: Request<wire::PlanRequest>) -> Result<Response<wire::Plan>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn operate(&self, _: Request<wire::OperateRequest>) -> Result<Response<wire::OperateResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn get_operation(&self, _: Request<wire::GetOperationRequest>) -> Result<Response<wire::Operation>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn list_operations(
        &self,
        _: Request<wire::ListOperationsRequest>,
    ) -> Result<Response<wire::ListOperationsResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn watch(&self, _: Request<wire::WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let (name, stale_since) = (self.cluster.clone(), self.stale_since.clone());
        let responses = WatchStream::new(self.states.clone()).map(move |state| {
            Ok(wire::WatchResponse {
                cluster: Some(cluster(&name, &state, *stale_since.borrow())),
                nodes: nodes(&state),
                serving: state.serving().map(Into::into),
            })
        });
        Ok(Response::new(Box::pin(responses.take_until(self.shutdown.clone().cancelled_owned()))))
    }
}

impl Api {
    fn state(&self) -> Arc<ClusterState> {
        Arc::clone(&self.states.borrow())
    }
}

fn cluster(name: &str, state: &ClusterState, stale_since: Option<Instant>) -> wire::Cluster {
    let epoch = |placement: Option<&Placement>| placement.map_or(0, |placement| placement.epoch.0);
    let mut problems = problems(state);
    if let Some(since) = stale_since {
        let seconds = since.elapsed().as_secs();
        problems.insert(0, format!("the store has not answered for {seconds} s; this is the state before that"));
    }
    wire::Cluster {
        name: name.to_owned(),
        leader: state.leader().unwrap_or_default().to_owned(),
        model: state.model().map(Into::into),
        target_epoch: epoch(state.target()),
        serving_epoch: epoch(state.serving()),
        serving: state.serving().is_some(),
        imbalance: 0.0,
        problems,
    }
}

fn nodes(state: &ClusterState) -> Vec<wire::Node> {
    Role::ALL.into_iter().flat_map(|role| state.members(role)).map(|member| node(state, member)).collect()
}

fn node(state: &ClusterState, member: &Member) -> wire::Node {
    let node = wire::Node::from(member);
    if member.role != Role::Expert {
        return node;
    }
    let holdings = state.holdings(&member.id);
    let refused = holdings.into_iter().flat_map(|holdings| &holdings.refused);
    wire::Node {
        weight_bytes: holdings.map_or(0, |holdings| holdings.weight_bytes),
        experts: holdings.map_or(0, |holdings| holdings.count() as u32),
        target_experts: state.target().map_or(0, |target| target.experts_on(&member.id).count() as u32),
        refused: refused.map(|refused| format!("{}: {}", refused.key, refused.reason)).collect(),
        ..node
    }
}

/// Every expert of the model, by layer, then by index.
fn experts(state: &ClusterState) -> impl Iterator<Item = wire::Expert> {
    let spec = state.model().map(|model| &model.spec);
    spec.into_iter().flat_map(ModelSpec::experts).map(|key| {
        let placed = |placement: Option<&Placement>| {
            placement.map(|placement| names(placement.replicas(key))).unwrap_or_default()
        };
        let holders = state.members(Role::Expert).map(|member| member.id.clone());
        let held: Vec<NodeId> =
            holders.filter(|id| state.holdings(id).is_some_and(|holdings| holdings.contains(key))).collect();
        wire::Expert {
            layer: key.layer.0,
            expert: key.expert.0,
            serving: placed(state.serving()),
            target: placed(state.target()),
            held: names(&held),
            tokens_per_s: 0.0,
            min_replicas: state.min_replicas().of(key),
        }
    })
}

fn names(nodes: &[NodeId]) -> Vec<String> {
    nodes.iter().map(ToString::to_string).collect()
}
