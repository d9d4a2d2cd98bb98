//! `sirocco.cluster.v1` in domain types: what coordinators tell operators.

use sirocco_types::{Member, ModelIdentity, Placement, Role};

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
            expert_bytes: model.spec.expert_bytes(),
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
            serving_epoch: member.serving_epoch.unwrap_or_default().0,
            model_fingerprint: member.model.as_ref().map(|m| m.fingerprint.to_string()).unwrap_or_default(),
            ..Self::default()
        }
    }
}
