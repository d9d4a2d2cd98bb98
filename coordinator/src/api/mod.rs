//! `sirocco.cluster.v1`: the cluster's state in an operator's words, and what operators ask for.
//!
//! Any coordinator answers. What needs the leader's measurements or its pen is passed on to the leader, once.

mod leader;
mod reports;
mod views;

use std::collections::BTreeSet;
use std::pin::Pin;
use std::sync::Arc;

use futures::{Stream, StreamExt as _};
use sirocco_proto::Invalid;
use sirocco_proto::cluster::ClusterService;
use sirocco_proto::tonic::{Request, Response, Status};
use sirocco_proto::wire::cluster as wire;
use sirocco_store::ClusterState;
use sirocco_types::{Epoch, ExpertId, LayerId, LoadReport, NodeId};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_stream::wrappers::WatchStream;
use tokio_util::sync::CancellationToken;

use crate::inputs::{Inputs, WhatIf};
use crate::leader::Command;
use crate::load::LoadSnapshot;
use crate::operations::{self, MAX_BY_BYTES};

/// Most nodes that a plan may imagine.
const MAX_IMAGINED: u32 = 10_000;

/// The gRPC services of one coordinator.
#[derive(Clone, Debug)]
pub(crate) struct Api {
    pub(crate) id: NodeId,
    pub(crate) cluster: String,
    pub(crate) states: watch::Receiver<Arc<ClusterState>>,
    pub(crate) loads: watch::Receiver<Arc<LoadSnapshot>>,
    pub(crate) commands: mpsc::Sender<Command>,
    pub(crate) reports: mpsc::Sender<LoadReport>,
    /// Since when the store has been out of reach.
    pub(crate) stale_since: watch::Receiver<Option<Instant>>,
    pub(crate) shutdown: CancellationToken,
}

#[sirocco_proto::tonic::async_trait]
impl ClusterService for Api {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<wire::WatchResponse, Status>> + Send>>;

    async fn get_cluster(&self, _: Request<wire::GetClusterRequest>) -> Result<Response<wire::Cluster>, Status> {
        Ok(Response::new(views::cluster(
            &self.cluster,
            &self.state(),
            &self.loads.borrow(),
            *self.stale_since.borrow(),
        )))
    }

    async fn list_nodes(
        &self,
        _: Request<wire::ListNodesRequest>,
    ) -> Result<Response<wire::ListNodesResponse>, Status> {
        Ok(Response::new(wire::ListNodesResponse { nodes: views::nodes(&self.state()) }))
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
        let experts = views::experts(&state).filter(|expert| layer.is_none_or(|layer| expert.layer == layer)).collect();
        Ok(Response::new(wire::ListExpertsResponse { experts }))
    }

    async fn get_placement(
        &self,
        request: Request<wire::GetPlacementRequest>,
    ) -> Result<Response<wire::Placement>, Status> {
        let state = self.state();
        let request = request.into_inner();
        if request.epoch > 0 {
            let epoch = Epoch(request.epoch);
            let placement = state.epoch(epoch).ok_or_else(|| not_kept(epoch))?;
            return Ok(Response::new(placement.into()));
        }
        let placement = match request.kind() {
            wire::PlacementKind::Target => state.target(),
            wire::PlacementKind::Serving | wire::PlacementKind::Unspecified => state.serving(),
        };
        Ok(Response::new(placement.map(Into::into).unwrap_or_default()))
    }

    async fn list_placements(
        &self,
        _: Request<wire::ListPlacementsRequest>,
    ) -> Result<Response<wire::ListPlacementsResponse>, Status> {
        Ok(Response::new(wire::ListPlacementsResponse { placements: views::placements(&self.state()) }))
    }

    async fn get_load(&self, request: Request<wire::GetLoadRequest>) -> Result<Response<wire::Load>, Status> {
        let state = self.state();
        if state.leader_address().is_none() {
            let stored = LoadSnapshot::stored(&state);
            return Ok(Response::new(views::load(&stored, false, predicted(&state, &stored))));
        }
        if let Some((mut leader, request)) = self.leader(&request)? {
            return leader.get_load(request).await;
        }
        let loads = Arc::clone(&self.loads.borrow());
        Ok(Response::new(views::load(&loads, true, predicted(&state, &loads))))
    }

    async fn plan(&self, request: Request<wire::PlanRequest>) -> Result<Response<wire::Plan>, Status> {
        if let Some((mut leader, request)) = self.leader(&request)? {
            return leader.plan(request).await;
        }
        let (state, loads) = (self.state(), Arc::clone(&self.loads.borrow()));
        let wire::PlanRequest { add_nodes, remove_nodes, max_moved_bytes } = request.into_inner();
        if add_nodes > MAX_IMAGINED {
            return Err(Invalid::new("add_nodes", format!("{add_nodes}, must be at most {MAX_IMAGINED}")).into());
        }
        let remove = remove_nodes.iter().map(|name| node(name, "remove_nodes")).collect::<Result<BTreeSet<_>, _>>()?;
        for node in &remove {
            operations::known(&state, "remove_nodes", node).map_err(|refusal| leader::refused(&refusal))?;
        }
        let change = WhatIf { add: add_nodes as usize, remove };
        let inputs = Inputs::what_if(&state, &loads, &change)
            .ok_or_else(|| Status::failed_precondition("no node with a model has joined"))?;
        let limit = Some(max_moved_bytes).filter(|&bytes| bytes > 0);
        let planned = tokio::task::spawn_blocking(move || inputs.plan(limit)).await;
        let planned = planned.map_err(|error| sirocco_proto::failed(format!("planning failed: {error}")))?;
        Ok(Response::new(views::plan(&planned)))
    }

    async fn operate(&self, request: Request<wire::OperateRequest>) -> Result<Response<wire::OperateResponse>, Status> {
        if let Some((mut leader, request)) = self.leader(&request)? {
            return leader.operate(request).await;
        }
        let request = request.into_inner();
        let by = match request.by.len() {
            0 => "unknown".to_owned(),
            1..=MAX_BY_BYTES => request.by.clone(),
            long => return Err(Invalid::new("by", format!("{long} bytes, must be at most {MAX_BY_BYTES}")).into()),
        };
        let decision = self.command(action(request)?, by).await?;
        Ok(Response::new(wire::OperateResponse {
            operation: Some((&decision.operation).into()),
            plan: decision.planned.as_ref().map(views::plan),
        }))
    }

    async fn get_operation(
        &self,
        request: Request<wire::GetOperationRequest>,
    ) -> Result<Response<wire::Operation>, Status> {
        let id = request.into_inner().id;
        let state = self.state();
        let operation = state.operation(id).ok_or_else(|| Status::not_found(format!("id: {id} is not kept")))?;
        Ok(Response::new(operation.into()))
    }

    async fn list_operations(
        &self,
        request: Request<wire::ListOperationsRequest>,
    ) -> Result<Response<wire::ListOperationsResponse>, Status> {
        let limit = match request.into_inner().limit {
            0 => usize::MAX,
            limit => limit as usize,
        };
        let operations = self.state().operations().rev().take(limit).map(Into::into).collect();
        Ok(Response::new(wire::ListOperationsResponse { operations }))
    }

    async fn watch(&self, _: Request<wire::WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let (name, stale_since, loads) = (self.cluster.clone(), self.stale_since.clone(), self.loads.clone());
        let responses = WatchStream::new(self.states.clone()).map(move |state| {
            Ok(wire::WatchResponse {
                cluster: Some(views::cluster(&name, &state, &loads.borrow(), *stale_since.borrow())),
                nodes: views::nodes(&state),
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

/// Predicted imbalance of the serving placement under `loads`.
fn predicted(state: &ClusterState, loads: &LoadSnapshot) -> Option<f64> {
    Inputs::of(state, loads)?.imbalance(state.serving()?)
}

/// What an operator asks for, checked as far as the request alone tells.
fn action(request: wire::OperateRequest) -> Result<operations::Request, Status> {
    use operations::Request as Asked;
    use wire::operate_request::Action;
    Ok(match request.action {
        Some(Action::Cordon(wire::NodeAction { node: name })) => Asked::Cordon(node(&name, "cordon.node")?),
        Some(Action::Uncordon(wire::NodeAction { node: name })) => Asked::Uncordon(node(&name, "uncordon.node")?),
        Some(Action::Drain(wire::NodeAction { node: name })) => Asked::Drain(node(&name, "drain.node")?),
        Some(Action::Rebalance(wire::Rebalance { max_moved_bytes })) => {
            Asked::Rebalance { max_moved_bytes: Some(max_moved_bytes).filter(|&bytes| bytes > 0) }
        }
        Some(Action::Rollback(wire::Rollback { epoch })) => Asked::Rollback(Epoch(epoch)),
        Some(Action::SetMinReplicas(wire::SetMinReplicas { replicas, layer, expert })) => {
            Asked::SetMinReplicas { replicas, layer: layer.map(LayerId), expert: expert.map(ExpertId) }
        }
        None => return Err(Invalid::new("action", "absent").into()),
    })
}

fn node(name: &str, field: &str) -> Result<NodeId, Status> {
    NodeId::new(name).map_err(|error| Invalid::new(field, error.to_string()).into())
}

fn not_kept(epoch: Epoch) -> Status {
    Status::not_found(format!("epoch: {epoch} is not kept"))
}
