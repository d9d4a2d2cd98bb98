//! What the leader should write next, decided from the cluster's state alone.
//!
//! A change never has a gap: a new target is published, nodes load towards it, their holdings appear, and only when every
//! expert of the target is held does serving flip. Each step is derived from what the store says, so a leader that takes
//! over between any two steps goes on where the last one stopped. Pure: it never writes and never reads a clock.

use std::collections::BTreeMap;

use sirocco_store::ClusterState;
use sirocco_types::{
    Bytes, Cordon, Epoch, EpochAbout, ExpertDtype, ExpertKey, Fingerprint, MinReplicas, ModelIdentity, NodeId,
    Operation, OperationKind, OperationState, Placement, Role,
};

use crate::inputs::{Inputs, Planned, refuses, usable};

/// Epochs kept behind the serving one, to look back on and to bring back.
const EPOCHS_KEPT: usize = 16;

/// Operations kept.
const OPERATIONS_KEPT: usize = 200;

/// One write of the leader.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Action {
    /// The cluster serves this model from now on.
    AdoptModel(ModelIdentity),
    /// Nodes load towards this placement, whose epoch is new.
    PublishTarget(Placement, EpochAbout),
    /// The target, of this epoch, is right for other inputs too.
    KeepTarget(Epoch, EpochAbout),
    /// Routers dispatch by this epoch.
    FlipServing(Epoch),
    /// Nobody needs this epoch any more.
    ForgetEpoch(Epoch),
    /// An operation began or went on.
    Record(Operation),
    /// An operation is too old to be kept.
    ForgetOperation(u64),
    /// An operator's word on a node; none takes it back.
    Cordon(NodeId, Option<Cordon>),
    /// The least numbers of replicas.
    SetMinReplicas(MinReplicas),
}

/// Who leads and what time it is, to sign records with.
#[derive(Clone, Debug)]
pub(crate) struct Signature {
    pub(crate) leader: String,
    pub(crate) at_ms: u64,
}

/// The model to adopt now, before anything else can be decided: the one most members read, once no live member reads the
/// cluster's present one, with the dtype most of its expert nodes keep experts as, once none keeps them as the present one. Ties
/// go to the lowest fingerprint and the dtype with more bytes.
pub(crate) fn model_to_adopt(state: &ClusterState) -> Option<ModelIdentity> {
    let mut readers = BTreeMap::<Fingerprint, (usize, &ModelIdentity)>::new();
    for model in state.members(Role::Router).chain(state.members(Role::Expert)).filter_map(|m| m.model.as_ref()) {
        readers.entry(model.fingerprint).or_insert((0, model)).0 += 1;
    }
    let present = state.model().filter(|model| readers.contains_key(&model.fingerprint));
    let model = match present {
        Some(model) => model,
        None => readers.into_values().rev().max_by_key(|(count, _)| *count)?.1,
    };
    let expert_dtype = expert_dtype(state, model.fingerprint, present.map(|model| model.expert_dtype));
    let settled = present.is_some_and(|model| model.expert_dtype == expert_dtype);
    (!settled).then(|| ModelIdentity { expert_dtype, ..model.clone() })
}

/// What a checkpoint's experts are to be kept as: as at `present` while an expert node does so.
fn expert_dtype(state: &ClusterState, checkpoint: Fingerprint, present: Option<ExpertDtype>) -> ExpertDtype {
    let models = state.members(Role::Expert).filter_map(|member| member.model.as_ref());
    let kept: Vec<_> = models.filter(|m| m.fingerprint == checkpoint).map(|m| m.expert_dtype).collect();
    match present {
        Some(present) if kept.is_empty() || kept.contains(&present) => present,
        _ => {
            let nodes = |dtype: &ExpertDtype| kept.iter().filter(|kept| *kept == dtype).count();
            ExpertDtype::ALL.into_iter().rev().max_by_key(nodes).unwrap_or_default()
        }
    }
}

/// Whether the target was planned for other nodes or limits than `inputs`, or there is none.
pub(crate) fn needs_plan(state: &ClusterState, inputs: &Inputs) -> bool {
    let planned_for = state.target().and_then(|target| state.about(target.epoch));
    inputs.has_nodes() && planned_for.is_none_or(|about| about.inputs != inputs.digest())
}

/// Why [`needs_plan`]: what has changed since the target was made, a sentence.
fn why_plan(state: &ClusterState, inputs: &Inputs) -> String {
    let Some(target) = state.target() else { return "first placement".to_owned() };
    let mut known: Vec<&NodeId> = target.iter().flat_map(|(_, nodes)| nodes).collect();
    known.sort_unstable();
    known.dedup();
    let fate = |node: &NodeId| match (state.member(Role::Expert, node), state.cordon(node)) {
        (None, _) => format!("{node} is gone"),
        (Some(_), Some(cordon)) if cordon.drain => format!("{node} is drained"),
        (Some(_), _) => format!("{node} is leaving"),
    };
    let gone = known.iter().filter(|node| inputs.ids().binary_search(node).is_err()).map(|node| fate(node));
    let new = inputs.ids().iter().filter(|id| known.binary_search(id).is_err()).map(|id| format!("{id} joined"));
    let unable = inputs.ids().iter().filter(|id| refuses(state, id, |_| true));
    let unable = unable.map(|id| format!("{id} cannot load an expert"));
    let changes: Vec<String> = gone.chain(new).chain(unable).collect();
    match changes.len() {
        0 => "settings of nodes or replicas changed".to_owned(),
        1..=4 => changes.join(", "),
        more => format!("{}, and {} more", changes[..3].join(", "), more - 3),
    }
}

/// Makes `planned` the target for inputs that have changed; a target that stays as it is only says so.
pub(crate) fn place(state: &ClusterState, inputs: &Inputs, planned: Planned, signature: &Signature) -> Vec<Action> {
    let about = state.target().filter(|target| target.layers == planned.layers).and_then(|target| {
        let about = state.about(target.epoch)?;
        Some(Action::KeepTarget(target.epoch, EpochAbout { inputs: inputs.digest().to_owned(), ..about.clone() }))
    });
    if let Some(kept) = about {
        return vec![kept];
    }
    let (why, bytes) = (why_plan(state, inputs), Bytes(planned.moved_bytes));
    let detail = format!("{why}: {} experts, {bytes}", planned.moves.len());
    let operation = begin(state, OperationKind::Place, &signature.leader, detail, signature);
    publish(state, inputs, planned, operation, signature)
}

/// Makes `planned` the target: its operation, of `kind`, and the placement under the next epoch.
pub(crate) fn publish(
    state: &ClusterState,
    inputs: &Inputs,
    planned: Planned,
    operation: Operation,
    signature: &Signature,
) -> Vec<Action> {
    let epoch = next_epoch(state);
    let about = EpochAbout {
        operation: operation.id,
        kind: operation.kind,
        reason: operation.detail.clone(),
        inputs: inputs.digest().to_owned(),
        moves: planned.moves.len() as u64,
        moved_bytes: planned.moved_bytes,
        imbalance_before: planned.imbalance_before,
        imbalance_after: planned.imbalance_after,
        leader: signature.leader.clone(),
        at_ms: signature.at_ms,
    };
    let placement = Placement { epoch, layers: planned.layers };
    vec![
        Action::Record(Operation { epoch: Some(epoch), state: OperationState::Running, ..operation }),
        Action::PublishTarget(placement, about),
    ]
}

/// A record of an operation that begins now, under the next id.
pub(crate) fn begin(
    state: &ClusterState,
    kind: OperationKind,
    by: &str,
    detail: String,
    signature: &Signature,
) -> Operation {
    Operation {
        id: state.operations().map(|operation| operation.id).max().unwrap_or(0) + 1,
        kind,
        subject: String::new(),
        by: by.to_owned(),
        state: OperationState::Running,
        detail,
        epoch: None,
        leader: signature.leader.clone(),
        started_ms: signature.at_ms,
        ended_ms: None,
    }
}

/// `operation` as ended now.
pub(crate) fn end(operation: &Operation, state: OperationState, detail: String, signature: &Signature) -> Operation {
    let (leader, ended_ms) = (signature.leader.clone(), Some(signature.at_ms));
    Operation { state, detail, leader, ended_ms, ..operation.clone() }
}

/// The next writes that need no planning: serving flips, operations end, what is old is forgotten.
pub(crate) fn next_actions(state: &ClusterState, signature: &Signature) -> Vec<Action> {
    let mut actions = Vec::new();
    if let Some(target) = state.target()
        && state.serving().map(|serving| serving.epoch) != Some(target.epoch)
        && may_serve(state, target)
    {
        actions.push(Action::FlipServing(target.epoch));
    }
    actions
        .extend(state.operations().filter_map(|operation| progress(state, operation, signature)).map(Action::Record));
    actions.extend(forgettable(state).map(Action::ForgetEpoch));
    let surplus = state.operations().count().saturating_sub(OPERATIONS_KEPT);
    let old = state.operations().take(surplus).filter(|operation| operation.state != OperationState::Running);
    actions.extend(old.map(|operation| Action::ForgetOperation(operation.id)));
    actions
}

/// Whether routers may go by `target`: every replica of it is held, and nothing that is served now would be lost.
///
/// A replica that its node cannot load does not count when another one is held. An expert that nobody has room for may only be
/// missing when nobody serves it now either.
fn may_serve(state: &ClusterState, target: &Placement) -> bool {
    missing(state, target).next().is_none()
        && target.unplaced().all(|key| {
            let served = state.serving().map_or(&[][..], |serving| serving.replicas(key));
            !served.iter().any(|node| holds(state, node, key))
        })
}

fn holds(state: &ClusterState, node: &NodeId, key: ExpertKey) -> bool {
    state.holdings(node).is_some_and(|holdings| holdings.contains(key))
}

/// The experts of `placement` that are placed but not yet held by every node they are placed on; see [`may_serve`].
pub(crate) fn missing<'a>(
    state: &'a ClusterState,
    placement: &'a Placement,
) -> impl Iterator<Item = (ExpertKey, &'a [NodeId])> {
    placement.iter().filter(|(key, nodes)| {
        let held = nodes.iter().any(|node| holds(state, node, *key));
        let ready =
            |node: &NodeId| holds(state, node, *key) || (held && refuses(state, node, |refused| refused == *key));
        !nodes.iter().all(ready)
    })
}

/// Whether serving is `epoch` and every live router goes by it or a later one.
pub(crate) fn routers_follow(state: &ClusterState, epoch: Epoch) -> bool {
    state.serving().is_some_and(|serving| serving.epoch >= epoch)
        && state.members(Role::Router).filter_map(|router| router.serving_epoch).all(|follows| follows >= epoch)
}

/// What has become of a running operation; none while it goes on.
fn progress(state: &ClusterState, operation: &Operation, signature: &Signature) -> Option<Operation> {
    if operation.state != OperationState::Running {
        return None;
    }
    let ended = |ending: OperationState, detail: String| Some(end(operation, ending, detail, signature));
    if operation.kind == OperationKind::Drain {
        let node = NodeId::new(&operation.subject).ok()?;
        return match state.cordon(&node) {
            Some(cordon) if cordon.drain => {
                let detail = "its experts are served elsewhere".to_owned();
                if is_free(state, &node) { ended(OperationState::Done, detail) } else { None }
            }
            _ => ended(OperationState::Failed, "the node was uncordoned before it was drained".to_owned()),
        };
    }
    let Some(epoch) = operation.epoch else { return ended(OperationState::Done, operation.detail.clone()) };
    if state.serving().is_some_and(|serving| serving.epoch == epoch) {
        return if routers_follow(state, epoch) { ended(OperationState::Done, operation.detail.clone()) } else { None };
    }
    let target = state.target().map(|target| target.epoch)?;
    let detail = || format!("{}; superseded by epoch {target} before it served", operation.detail);
    if target > epoch { ended(OperationState::Failed, detail()) } else { None }
}

/// Whether nothing depends on `node`: neither serving nor any live router's placement has an expert on it.
pub(crate) fn is_free(state: &ClusterState, node: &NodeId) -> bool {
    let followed = state.members(Role::Router).filter_map(|router| state.epoch(router.serving_epoch?));
    state.serving().into_iter().chain(followed).all(|placement| placement.experts_on(node).next().is_none())
}

/// The epoch of the next placement.
fn next_epoch(state: &ClusterState) -> Epoch {
    state.epochs().max().unwrap_or_default().next()
}

/// Old epochs that are neither target nor serving nor used by a live router, beyond those kept for people.
fn forgettable(state: &ClusterState) -> impl Iterator<Item = Epoch> {
    let epoch_of = |placement: Option<&Placement>| placement.map(|p| p.epoch);
    let used: Vec<Epoch> = state
        .members(Role::Router)
        .filter_map(|router| router.serving_epoch)
        .chain(epoch_of(state.target()))
        .chain(epoch_of(state.serving()))
        .collect();
    let epochs: Vec<Epoch> = state.epochs().collect();
    let old = epochs.len().saturating_sub(EPOCHS_KEPT);
    epochs.into_iter().take(old).filter(move |epoch| !used.contains(epoch))
}

/// Whether a placement could be made at all.
pub(crate) fn has_usable_nodes(state: &ClusterState) -> bool {
    state.model().is_some_and(|model| usable(state, model).next().is_some())
}

#[cfg(test)]
mod tests;
