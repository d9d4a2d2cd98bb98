//! What an operator may ask for: whether the cluster's state allows it, and what is written if so.
//!
//! Pure but for planning, which takes time. What is under way goes on by `reconcile`, whoever leads.

use sirocco_store::ClusterState;
use sirocco_types::{
    Bytes, Cordon, Epoch, ExpertId, ExpertKey, LayerId, LayerPlacement, MinReplicas, NodeId, Operation, OperationKind,
    OperationState, Placement, Role,
};

use crate::inputs::{Inputs, Planned, WhatIf};
use crate::load::LoadSnapshot;
use crate::reconcile::{self, Action, Signature, begin, end, publish};

/// Most replicas that may be asked for.
pub(crate) const MAX_MIN_REPLICAS: u32 = 64;

/// Longest name of who asks, in bytes.
pub(crate) const MAX_BY_BYTES: usize = 128;

/// What an operator asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    Cordon(NodeId),
    Uncordon(NodeId),
    Drain(NodeId),
    Rebalance { max_moved_bytes: Option<u64> },
    Rollback(Epoch),
    SetMinReplicas { replicas: u32, layer: Option<LayerId>, expert: Option<ExpertId> },
}

/// What comes of a request.
#[derive(Debug)]
pub(crate) struct Decision {
    pub(crate) operation: Operation,
    pub(crate) actions: Vec<Action>,
    /// What a rebalance does.
    pub(crate) planned: Option<Planned>,
}

/// Why a request is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    /// Its field, what is wrong with the value, and the limit.
    #[error("{0}: {1}")]
    Invalid(&'static str, String),
    /// It names something that is not there.
    #[error("{0}: {1}")]
    NotFound(&'static str, String),
    /// The cluster's state does not allow it.
    #[error("{0}")]
    NotNow(String),
}

/// Decides on `request`, asked for by `by`.
pub(crate) fn decide(
    state: &ClusterState,
    loads: &LoadSnapshot,
    request: &Request,
    by: &str,
    signature: &Signature,
) -> Result<Decision, Refusal> {
    let asker = Asker { state, loads, by, signature };
    match request {
        Request::Cordon(node) => asker.cordon(node),
        Request::Uncordon(node) => asker.uncordon(node),
        Request::Drain(node) => asker.drain(node),
        Request::Rebalance { max_moved_bytes } => asker.rebalance(*max_moved_bytes),
        Request::Rollback(epoch) => asker.rollback(*epoch),
        Request::SetMinReplicas { replicas, layer, expert } => asker.set_min_replicas(*replicas, *layer, *expert),
    }
}

/// What every decision is made from.
struct Asker<'a> {
    state: &'a ClusterState,
    loads: &'a LoadSnapshot,
    by: &'a str,
    signature: &'a Signature,
}

impl Asker<'_> {
    fn cordon(&self, node: &NodeId) -> Result<Decision, Refusal> {
        self.known(node)?;
        match self.state.cordon(node) {
            Some(cordon) if cordon.drain => {
                let reason = format!("{node} is drained; uncordon it first to give it back its place");
                Err(Refusal::NotNow(reason))
            }
            Some(_) => Ok(self.done(OperationKind::Cordon, node.as_str(), "it was cordoned already", Vec::new())),
            None => {
                let done = self.done(OperationKind::Cordon, node.as_str(), "it gets no new experts", Vec::new());
                let cordon = Cordon { drain: false, operation: done.operation.id };
                Ok(done.with(Action::Cordon(node.clone(), Some(cordon))))
            }
        }
    }

    fn uncordon(&self, node: &NodeId) -> Result<Decision, Refusal> {
        if self.state.cordon(node).is_none() {
            self.known(node)?;
            return Ok(self.done(OperationKind::Uncordon, node.as_str(), "it was not cordoned", Vec::new()));
        }
        let actions = vec![Action::Cordon(node.clone(), None)];
        Ok(self.done(OperationKind::Uncordon, node.as_str(), "it may get experts", actions))
    }

    fn drain(&self, node: &NodeId) -> Result<Decision, Refusal> {
        self.known(node)?;
        let running = |operation: &&Operation| {
            operation.kind == OperationKind::Drain
                && operation.subject == node.as_str()
                && operation.state == OperationState::Running
        };
        if let Some(running) = self.state.operations().rfind(running) {
            return Ok(Decision { operation: running.clone(), actions: Vec::new(), planned: None });
        }
        let mut without = WhatIf::default();
        without.remove.insert(node.clone());
        let inputs = self.inputs(&without)?;
        if !inputs.has_nodes() {
            return Err(Refusal::NotNow(format!("{node} is the only expert node; add another before it is drained")));
        }
        let planned = inputs.plan(Some(0));
        let target = self.state.target();
        let lost = |key: ExpertKey| target.is_some_and(|target| !target.replicas(key).is_empty());
        let lost: Vec<&(ExpertKey, String)> = planned.unserved.iter().filter(|(key, _)| lost(*key)).collect();
        if let Some((key, why)) = lost.first() {
            let others = if lost.len() > 1 { format!(" (and {} more)", lost.len() - 1) } else { String::new() };
            return Err(Refusal::NotNow(format!("without {node} nobody could hold {key}{others}: {why}")));
        }
        let experts = target.map_or(0, |target| target.experts_on(node).count());
        let operation = self.begin(OperationKind::Drain, node.as_str(), format!("{experts} experts move elsewhere"));
        let cordon = Cordon { drain: true, operation: operation.id };
        let actions = vec![Action::Cordon(node.clone(), Some(cordon)), Action::Record(operation.clone())];
        Ok(Decision { operation, actions, planned: None })
    }

    fn rebalance(&self, max_moved_bytes: Option<u64>) -> Result<Decision, Refusal> {
        let target = self.state.target().map(|target| target.epoch);
        if let Some(target) = target.filter(|target| !reconcile::routers_follow(self.state, *target)) {
            return Err(Refusal::NotNow(format!(
                "epoch {target} is still on its way to the routers; wait until it serves"
            )));
        }
        let inputs = self.inputs(&WhatIf::default())?;
        if !inputs.has_nodes() {
            return Err(Refusal::NotNow("no expert node with the cluster's checkpoint has joined".to_owned()));
        }
        let planned = inputs.plan(max_moved_bytes);
        let known = if inputs.knows_load() { "by the measured load" } else { "the load is not known yet" };
        if self.state.target().is_some_and(|target| target.layers == planned.layers) {
            let imbalance = planned.imbalance_after;
            let detail = format!("nothing is better elsewhere, {known}; imbalance {imbalance:.2}");
            let done = self.done(OperationKind::Rebalance, "", &detail, Vec::new());
            return Ok(Decision { planned: Some(planned), ..done });
        }
        let operation = self.begin(OperationKind::Rebalance, "", summary(&planned, known));
        let actions = publish(self.state, &inputs, planned.clone(), operation.clone(), self.signature);
        Ok(Decision { operation, actions, planned: Some(planned) }.published())
    }

    fn rollback(&self, epoch: Epoch) -> Result<Decision, Refusal> {
        let Some(placement) = self.state.epoch(epoch) else {
            let kept: Vec<String> = self.state.epochs().map(|epoch| epoch.to_string()).collect();
            return Err(Refusal::NotFound("epoch", format!("{epoch} is not kept; kept are {}", kept.join(", "))));
        };
        let target = self.state.target();
        if target.is_some_and(|target| target.layers == placement.layers) {
            let detail = "it is the target already";
            return Ok(self.done(OperationKind::Rollback, &epoch.to_string(), detail, Vec::new()));
        }
        let inputs = self.inputs(&WhatIf::default())?;
        let here = |node: &NodeId| inputs.ids().binary_search(node).is_ok();
        let layers = placement.layers.iter().map(|layer| LayerPlacement {
            experts: layer.experts.iter().map(|nodes| nodes.iter().filter(|n| here(n)).cloned().collect()).collect(),
        });
        let back = Placement { epoch, layers: layers.collect() };
        let lost = placement.iter().filter(|(_, nodes)| !nodes.is_empty());
        if let Some((key, nodes)) = lost.into_iter().find(|(key, _)| back.replicas(*key).is_empty()) {
            let nodes: Vec<String> = nodes.iter().map(ToString::to_string).collect();
            let nodes = nodes.join(", ");
            return Err(Refusal::NotNow(format!("epoch {epoch} has {key} on {nodes}, which cannot take it now")));
        }
        let planned = inputs.brought_back(&back);
        let detail = format!(
            "{}; automatic rebalancing rests until a rebalance is asked for or nodes change",
            summary(&planned, "brought back")
        );
        let operation = self.begin(OperationKind::Rollback, &epoch.to_string(), detail);
        let actions = publish(self.state, &inputs, planned, operation.clone(), self.signature);
        Ok(Decision { operation, actions, planned: None }.published())
    }

    fn set_min_replicas(
        &self,
        replicas: u32,
        layer: Option<LayerId>,
        expert: Option<ExpertId>,
    ) -> Result<Decision, Refusal> {
        let model = self.state.model().ok_or_else(no_model)?;
        let (layers, experts) = (model.spec.num_hidden_layers, model.spec.num_local_experts);
        if !(1..=MAX_MIN_REPLICAS).contains(&replicas) {
            return Err(Refusal::Invalid("replicas", format!("{replicas}, must be from 1 to {MAX_MIN_REPLICAS}")));
        }
        if let Some(layer) = layer.filter(|layer| layer.index() >= layers) {
            return Err(Refusal::Invalid("layer", format!("{layer}, the model has {layers}")));
        }
        if let Some(expert) = expert.filter(|expert| expert.index() >= experts) {
            return Err(Refusal::Invalid("expert", format!("{expert}, a layer has {experts}")));
        }
        let mut least = self.state.min_replicas().clone();
        let subject = match (layer, expert) {
            (None, Some(_)) => return Err(Refusal::Invalid("expert", "needs a layer".to_owned())),
            (None, None) => {
                least = MinReplicas { default: replicas, ..MinReplicas::default() };
                "all experts".to_owned()
            }
            (Some(layer), expert) => {
                let all = 0..experts as u32;
                let named = all.map(ExpertId).filter(|id| expert.is_none_or(|expert| expert == *id));
                let entry = least.experts.entry(layer).or_default();
                entry.extend(named.map(|id| (id, replicas)));
                expert.map_or_else(|| format!("layer {layer}"), |expert| ExpertKey { layer, expert }.to_string())
            }
        };
        let detail = format!("at least {replicas} replicas; the placement follows");
        Ok(self.done(OperationKind::MinReplicas, &subject, &detail, vec![Action::SetMinReplicas(least)]))
    }

    fn known(&self, node: &NodeId) -> Result<(), Refusal> {
        known(self.state, "node", node)
    }

    fn inputs(&self, what_if: &WhatIf) -> Result<Inputs, Refusal> {
        Inputs::what_if(self.state, self.loads, what_if).ok_or_else(no_model)
    }

    fn begin(&self, kind: OperationKind, subject: &str, detail: String) -> Operation {
        Operation { subject: subject.to_owned(), ..begin(self.state, kind, self.by, detail, self.signature) }
    }

    /// An operation that is over as soon as `actions` are written.
    fn done(&self, kind: OperationKind, subject: &str, detail: &str, mut actions: Vec<Action>) -> Decision {
        let operation = self.begin(kind, subject, detail.to_owned());
        let operation = end(&operation, OperationState::Done, detail.to_owned(), self.signature);
        actions.push(Action::Record(operation.clone()));
        Decision { operation, actions, planned: None }
    }
}

impl Decision {
    fn with(mut self, action: Action) -> Self {
        self.actions.push(action);
        self
    }

    /// With its operation as [`publish`] recorded it.
    fn published(mut self) -> Self {
        let recorded = self.actions.iter().find_map(|action| match action {
            Action::Record(operation) => Some(operation.clone()),
            _ => None,
        });
        self.operation = recorded.unwrap_or(self.operation);
        self
    }
}

fn no_model() -> Refusal {
    Refusal::NotNow("no node with a model has joined".to_owned())
}

/// What a plan moves and gains, a sentence.
pub(crate) fn summary(planned: &Planned, why: &str) -> String {
    let Planned { moves, moved_bytes, imbalance_before, imbalance_after, .. } = planned;
    let (experts, bytes) = (moves.len(), Bytes(*moved_bytes));
    format!("{experts} experts, {bytes}, imbalance {imbalance_before:.2} -> {imbalance_after:.2}, {why}")
}

/// Errors: `NotFound` when there is no expert node called `node`, which `field` named.
pub(crate) fn known(state: &ClusterState, field: &'static str, node: &NodeId) -> Result<(), Refusal> {
    if state.member(Role::Expert, node).is_some() {
        return Ok(());
    }
    let known: Vec<String> = state.members(Role::Expert).map(|member| member.id.to_string()).collect();
    let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
    Err(Refusal::NotFound(field, format!("no expert node is called {node}; there are {known}")))
}

#[cfg(test)]
mod tests;
