//! How the leader's actions look in the store.

use std::sync::Arc;

use serde::Serialize;
use sirocco_store::{ClusterState, Keys, Op, to_json};
use sirocco_types::{EpochRef, LayerId, LayerLoad, NodeLoad, PlacementKind, Role};

use crate::load::LoadSnapshot;
use crate::reconcile::Action;

/// The changes that `action` makes, in the order in which they must be made.
pub(crate) fn ops(keys: &Keys, action: Action, leader: &str) -> Vec<Op> {
    match action {
        Action::AdoptModel(model) => vec![put(keys.model(), &model)],
        Action::PublishTarget(placement, about) => {
            let epoch = placement.epoch;
            let layers = (0..).map(LayerId).zip(&placement.layers);
            let mut ops: Vec<Op> = layers.map(|(id, layer)| put(keys.layer(epoch, id), layer)).collect();
            ops.push(put(keys.about(epoch), &about));
            ops.push(put(keys.placement(PlacementKind::Target), &EpochRef { epoch, leader: leader.to_owned() }));
            ops
        }
        Action::KeepTarget(epoch, about) => vec![put(keys.about(epoch), &about)],
        Action::FlipServing(epoch) => {
            vec![put(keys.placement(PlacementKind::Serving), &EpochRef { epoch, leader: leader.to_owned() })]
        }
        Action::ForgetEpoch(epoch) => vec![Op::DeletePrefix(keys.epoch(epoch))],
        Action::Record(operation) => vec![put(keys.operation(operation.id), &operation)],
        Action::ForgetOperation(id) => vec![Op::Delete(keys.operation(id))],
        Action::Cordon(node, Some(cordon)) => vec![put(keys.cordon(&node), &cordon)],
        Action::Cordon(node, None) => vec![Op::Delete(keys.cordon(&node))],
        Action::SetMinReplicas(least) => vec![put(keys.min_replicas(), &least)],
    }
}

/// Says what is about to be written.
pub(super) fn log(action: &Action) {
    match action {
        Action::AdoptModel(model) => {
            tracing::info!(model = model.name, fingerprint = model.fingerprint.short(), "the cluster serves");
        }
        Action::PublishTarget(placement, about) => {
            let (epoch, unplaced) = (placement.epoch, placement.unplaced().count());
            tracing::info!(%epoch, unplaced, kind = %about.kind, reason = about.reason, "new target placement");
        }
        Action::FlipServing(epoch) => tracing::info!(%epoch, "placement serves"),
        Action::Record(operation) => {
            let (id, kind, state) = (operation.id, operation.kind, operation.state);
            tracing::debug!(id, %kind, subject = operation.subject, %state, detail = operation.detail, "operation");
        }
        Action::KeepTarget(..)
        | Action::Cordon(..)
        | Action::SetMinReplicas(_)
        | Action::ForgetEpoch(_)
        | Action::ForgetOperation(_) => {}
    }
}

/// The changes that bring the stored load from `written` to `loads`; what is the same is left alone, and nodes that have
/// left are forgotten.
pub(super) fn load(keys: &Keys, state: &ClusterState, loads: &LoadSnapshot, written: &Arc<LoadSnapshot>) -> Vec<Op> {
    let timeless = |load: &LayerLoad| LayerLoad { at_ms: 0, ..load.clone() };
    let mut ops: Vec<Op> = Vec::new();
    for (index, layer) in loads.layers.iter().enumerate() {
        if written.layers.get(index).map(timeless) != Some(timeless(layer)) {
            ops.push(put(keys.layer_load(LayerId(index as u32)), layer));
        }
    }
    let timeless = |load: &NodeLoad| NodeLoad { at_ms: 0, ..load.clone() };
    for (id, node) in &loads.nodes {
        if written.nodes.get(id).map(timeless) != Some(timeless(node)) {
            ops.push(put(keys.node_load(id), node));
        }
    }
    let gone = state.node_loads().filter(|(id, _)| state.member(Role::Expert, id).is_none());
    ops.extend(gone.map(|(id, _)| Op::Delete(keys.node_load(id))));
    ops
}

fn put<T: Serialize>(key: String, value: &T) -> Op {
    Op::Put { key, value: to_json(value), lease: None }
}
