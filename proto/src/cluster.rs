//! `sirocco.cluster.v1` in domain types: what coordinators tell operators.

use sirocco_types::{
    EpochAbout, LayerId, LayerLoad, Member, ModelIdentity, Move, NodeId, NodeLoad, Operation, Placement, Role,
};

use crate::wire::cluster as wire;
pub use crate::wire::cluster::cluster_service_client::ClusterServiceClient;
pub use crate::wire::cluster::cluster_service_server::{ClusterService, ClusterServiceServer};

impl From<Role> for wire::Role {
    fn from(role: Role) -> Self {
        match role {
            Role::Coordinator => Self::Coordinator,
            Role::Router => Self::Router,
            Role::Expert => Self::Expert,
        }
    }
}

impl From<&ModelIdentity> for wire::Model {
    fn from(model: &ModelIdentity) -> Self {
        Self {
            name: model.name.clone(),
            fingerprint: model.fingerprint.to_string(),
            model_type: model.spec.model_type.clone(),
            layers: model.spec.num_hidden_layers as u32,
            experts_per_layer: model.spec.num_local_experts as u32,
            experts_per_token: model.spec.num_experts_per_tok as u32,
            expert_bytes: model.expert_bytes(),
        }
    }
}

impl From<&Placement> for wire::Placement {
    fn from(placement: &Placement) -> Self {
        let layers = placement.layers.iter().map(|layer| wire::LayerPlacement {
            experts: layer
                .experts
                .iter()
                .map(|nodes| wire::Replicas { nodes: nodes.iter().map(ToString::to_string).collect() })
                .collect(),
        });
        Self { epoch: placement.epoch.0, layers: layers.collect() }
    }
}

impl From<&Member> for wire::Node {
    /// What the member itself says; holdings and target are the coordinator's to add.
    fn from(member: &Member) -> Self {
        Self {
            id: member.id.to_string(),
            role: wire::Role::from(member.role).into(),
            state: member.state.to_string(),
            grpc_address: member.grpc.clone(),
            http_address: member.http.clone(),
            version: member.version.clone(),
            zone: member.zone.clone().unwrap_or_default(),
            device: member.device.as_ref().map(|device| device.name.clone()).unwrap_or_default(),
            capacity_bytes: member.capacity_bytes.unwrap_or(0),
            speed: member.speed.unwrap_or(0),
            max_experts_per_layer: member.max_experts_per_layer.unwrap_or(0),
            serving_epoch: member.serving_epoch.unwrap_or_default().0,
            model_fingerprint: member.model.as_ref().map(|m| m.fingerprint.to_string()).unwrap_or_default(),
            ..Self::default()
        }
    }
}

impl From<&EpochAbout> for wire::PlacementAbout {
    /// What the record says; its epoch and whether it is target or serving are the coordinator's to add.
    fn from(about: &EpochAbout) -> Self {
        Self {
            operation: about.operation,
            kind: about.kind.to_string(),
            reason: about.reason.clone(),
            moves: about.moves,
            moved_bytes: about.moved_bytes,
            imbalance_before: about.imbalance_before,
            imbalance_after: about.imbalance_after,
            leader: about.leader.clone(),
            at_ms: about.at_ms,
            ..Self::default()
        }
    }
}

impl From<&Operation> for wire::Operation {
    fn from(operation: &Operation) -> Self {
        Self {
            id: operation.id,
            kind: operation.kind.to_string(),
            subject: operation.subject.clone(),
            by: operation.by.clone(),
            state: operation.state.to_string(),
            detail: operation.detail.clone(),
            epoch: operation.epoch.unwrap_or_default().0,
            leader: operation.leader.clone(),
            started_ms: operation.started_ms,
            ended_ms: operation.ended_ms.unwrap_or(0),
        }
    }
}

impl From<(LayerId, &LayerLoad)> for wire::LayerLoad {
    fn from((layer, load): (LayerId, &LayerLoad)) -> Self {
        Self { layer: layer.0, tokens_per_s: load.tokens_per_s.clone(), imbalance: load.imbalance }
    }
}

impl From<(&NodeId, &NodeLoad)> for wire::NodeLoad {
    fn from((id, load): (&NodeId, &NodeLoad)) -> Self {
        Self {
            id: id.to_string(),
            busy: load.busy,
            queue: load.queue,
            batch_rows: load.batch_rows,
            rows_per_s: load.rows_per_s,
            service_rows_per_s: load.service_rows_per_s,
        }
    }
}

impl From<&Move> for wire::Move {
    fn from(change: &Move) -> Self {
        Self {
            layer: change.key.layer.0,
            expert: change.key.expert.0,
            from: change.from.as_ref().map(ToString::to_string).unwrap_or_default(),
            to: change.to.to_string(),
        }
    }
}
