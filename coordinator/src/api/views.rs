//! The cluster's state in the words of `sirocco.cluster.v1`.

use sirocco_proto::wire::cluster as wire;
use sirocco_store::ClusterState;
use sirocco_types::{Epoch, LayerId, Member, ModelSpec, NodeId, Placement, Role};
use tokio::time::Instant;

use crate::inputs::Planned;
use crate::load::LoadSnapshot;
use crate::problems::problems;
use crate::reconcile::is_free;

pub(super) fn cluster(
    name: &str,
    state: &ClusterState,
    loads: &LoadSnapshot,
    stale_since: Option<Instant>,
) -> wire::Cluster {
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
        imbalance: if loads.layers.is_empty() { LoadSnapshot::stored(state).imbalance() } else { loads.imbalance() },
        problems,
    }
}

pub(super) fn nodes(state: &ClusterState) -> Vec<wire::Node> {
    Role::ALL.into_iter().flat_map(|role| state.members(role)).map(|member| node(state, member)).collect()
}

fn node(state: &ClusterState, member: &Member) -> wire::Node {
    let node = wire::Node::from(member);
    if member.role != Role::Expert {
        return node;
    }
    let holdings = state.holdings(&member.id);
    let refused = holdings.into_iter().flat_map(|holdings| &holdings.refused);
    let cordon = match state.cordon(&member.id) {
        Some(cordon) if cordon.drain && is_free(state, &member.id) => "drained",
        Some(cordon) if cordon.drain => "draining",
        Some(_) => "cordoned",
        None => "",
    };
    wire::Node {
        cordon: cordon.to_owned(),
        weight_bytes: holdings.map_or(0, |holdings| holdings.weight_bytes),
        experts: holdings.map_or(0, |holdings| holdings.count() as u32),
        target_experts: state.target().map_or(0, |target| target.experts_on(&member.id).count() as u32),
        refused: refused.map(|refused| format!("{}: {}", refused.key, refused.reason)).collect(),
        ..node
    }
}

/// Every expert of the model, by layer, then by index.
pub(super) fn experts(state: &ClusterState) -> impl Iterator<Item = wire::Expert> {
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
            tokens_per_s: state
                .layer_load(key.layer)
                .and_then(|load| load.tokens_per_s.get(key.expert.index()).copied())
                .unwrap_or(0.0),
            min_replicas: state.min_replicas().of(key),
        }
    })
}

fn names(nodes: &[NodeId]) -> Vec<String> {
    nodes.iter().map(ToString::to_string).collect()
}

/// The placements that are kept, newest first.
pub(super) fn placements(state: &ClusterState) -> Vec<wire::PlacementAbout> {
    let epoch_of = |placement: Option<&Placement>| placement.map(|placement| placement.epoch);
    let (target, serving) = (epoch_of(state.target()), epoch_of(state.serving()));
    let mut epochs: Vec<Epoch> = state.epochs().collect();
    epochs.reverse();
    let about = |epoch: Epoch| wire::PlacementAbout {
        epoch: epoch.0,
        target: target == Some(epoch),
        serving: serving == Some(epoch),
        ..state.about(epoch).map(Into::into).unwrap_or_default()
    };
    epochs.into_iter().map(about).collect()
}

/// The load as `loads` has it.
pub(super) fn load(loads: &LoadSnapshot, live: bool, predicted: Option<f64>) -> wire::Load {
    wire::Load {
        layers: (0..).map(LayerId).zip(&loads.layers).map(Into::into).collect(),
        nodes: loads.nodes.iter().map(Into::into).collect(),
        live,
        imbalance: loads.imbalance(),
        predicted_imbalance: predicted.unwrap_or(0.0),
    }
}

/// What a plan does.
pub(super) fn plan(planned: &Planned) -> wire::Plan {
    let placement = Placement { epoch: Epoch(0), layers: planned.layers.clone() };
    wire::Plan {
        moves: planned.moves.iter().map(Into::into).collect(),
        moved_bytes: planned.moved_bytes,
        imbalance_before: planned.imbalance_before,
        imbalance_after: planned.imbalance_after,
        unserved: planned.unserved.iter().map(|(key, why)| format!("{key}: {why}")).collect(),
        short_of_replicas: planned.short.clone(),
        placement: Some((&placement).into()),
    }
}
