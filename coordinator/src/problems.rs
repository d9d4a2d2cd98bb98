//! What keeps a cluster from its best, a sentence each: what an operator reads first.

use std::collections::BTreeSet;

use sirocco_store::ClusterState;
use sirocco_types::{Bytes, ExpertKey, ModelIdentity, NodeId, Role};

use crate::reconcile::{has_usable_nodes, missing};

/// The problems of a cluster; empty when all is well.
pub(crate) fn problems(state: &ClusterState) -> Vec<String> {
    let mut problems = Vec::new();
    if state.leader().is_none() {
        problems.push("no coordinator leads, so the placement does not change".to_owned());
    }
    let Some(model) = state.model() else {
        problems.push("no node with a model has joined".to_owned());
        return problems;
    };
    for member in [Role::Router, Role::Expert].into_iter().flat_map(|role| state.members(role)) {
        if let Some(other) = member.model.as_ref().filter(|other| other.fingerprint != model.fingerprint) {
            let (theirs, ours) = (other.fingerprint.short(), model.fingerprint.short());
            problems.push(format!(
                "{} node {} reads checkpoint {theirs}, the cluster serves {ours}",
                member.role, member.id
            ));
        }
    }
    for member in state.members(Role::Expert) {
        let ours = |theirs: &&ModelIdentity| theirs.fingerprint == model.fingerprint;
        let theirs = member.model.as_ref().filter(ours).map(|theirs| theirs.expert_dtype);
        if let Some(theirs) = theirs.filter(|theirs| *theirs != model.expert_dtype) {
            let ours = model.expert_dtype;
            problems.push(format!("expert node {} keeps experts as {theirs}, the cluster serves {ours}", member.id));
        }
    }
    if state.members(Role::Router).next().is_none() {
        problems.push("no router node has joined".to_owned());
    }
    if !has_usable_nodes(state) {
        problems.push("no expert node with the cluster's checkpoint has joined".to_owned());
    }
    for member in state.members(Role::Expert) {
        let refused = state.holdings(&member.id).map(|holdings| holdings.refused.as_slice()).unwrap_or_default();
        if let Some(first) = refused.first() {
            problems.push(format!(
                "expert node {} cannot load {}{}: {}",
                member.id,
                first.key,
                more(refused.len()),
                first.reason
            ));
        }
    }
    if let Some(target) = state.target() {
        let unplaced: Vec<ExpertKey> = target.unplaced().collect();
        if let Some(first) = unplaced.first() {
            let bytes = Bytes(unplaced.len() as u64 * model.expert_bytes());
            let count = more(unplaced.len());
            problems.push(format!("no expert node has memory for {first}{count}: {bytes} of capacity are missing"));
        }
        let total = model.spec.num_hidden_layers * model.spec.num_local_experts;
        let loading = missing(state, target).count();
        if loading > 0 {
            problems.push(format!("{} of {total} experts of epoch {} are loaded", total - loading, target.epoch));
        }
    }
    if let Some(target) = state.target() {
        let few = |(key, nodes): &(ExpertKey, &[NodeId])| {
            !nodes.is_empty() && nodes.len() < state.min_replicas().of(*key) as usize
        };
        let mut few = target.iter().filter(few);
        if let Some((key, nodes)) = few.next() {
            let (count, least) = (more(few.count() + 1), state.min_replicas().of(key));
            problems.push(format!("{key}{count} has {} of {least} replicas: no other node has room", nodes.len()));
        }
    }
    if let Some(serving) = state.serving() {
        let gone: BTreeSet<_> = serving
            .iter()
            .flat_map(|(_, nodes)| nodes)
            .filter(|node| state.member(Role::Expert, node).is_none())
            .collect();
        problems.extend(gone.into_iter().map(|node| format!("expert node {node} serves by the placement but is gone")));
    }
    problems
        .extend(state.unreadable().iter().map(|(key, problem)| format!("the store's {key} is unreadable: {problem}")));
    problems
}

/// ` (and N more)` for lists of which only the first is shown.
fn more(count: usize) -> String {
    if count > 1 { format!(" (and {} more)", count - 1) } else { String::new() }
}
