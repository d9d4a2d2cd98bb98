//! What the leader should write next, decided from the cluster's state alone.
//!
//! A change never has a gap: a new target is published, nodes load towards it, their holdings appear, and only when every
//! expert of the target is held does serving flip. Each step is derived from what the store says, so a leader that takes
//! over between any two steps goes on where the last one stopped. Pure: it never writes and never reads a clock.

use std::collections::BTreeMap;

use sirocco_store::ClusterState;
use sirocco_types::{
    Epoch, ExpertKey, Fingerprint, LayerPlacement, Member, MemberState, ModelIdentity, NodeId, Placement, Role,
};

use crate::plan::placement::place;

/// Epochs kept behind the serving one, for people to look back on.
const HISTORY: usize = 16;

/// One write of the leader.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Action {
    /// The cluster serves this model from now on.
    AdoptModel(ModelIdentity),
    /// Nodes load towards this placement, whose epoch is new.
    PublishTarget(Placement),
    /// Routers dispatch by this epoch.
    FlipServing(Epoch),
    /// Nobody needs this epoch any more.
    Forget(Epoch),
}

/// The next writes towards a cluster in which every expert is served; empty when there is nothing to do.
pub(crate) fn next_actions(state: &ClusterState) -> Vec<Action> {
    if let Some(model) = model_to_adopt(state) {
        return vec![Action::AdoptModel(model)];
    }
    let Some(model) = state.model() else { return Vec::new() };
    let nodes = nodes_to_plan_for(state, model.fingerprint);
    if nodes.is_empty() {
        return Vec::new();
    }
    let layers = place(&model.spec, &nodes, state.target());
    if state.target().is_none_or(|target| target.layers != layers) {
        return vec![Action::PublishTarget(Placement { epoch: next_epoch(state), layers })];
    }
    let mut actions = Vec::new();
    if let Some(target) = state.target()
        && state.serving().map(|serving| serving.epoch) != Some(target.epoch)
        && missing(state, target).next().is_none()
    {
        actions.push(Action::FlipServing(target.epoch));
    }
    actions.extend(forgettable(state).map(Action::Forget));
    actions
}

/// The experts of `placement` that are not placed, or not held by every node they are placed on.
pub(crate) fn missing<'a>(
    state: &'a ClusterState,
    placement: &'a Placement,
) -> impl Iterator<Item = (ExpertKey, &'a [NodeId])> {
    placement.iter().filter(|(key, nodes)| {
        let held = |node: &NodeId| state.holdings(node).is_some_and(|holdings| holdings.contains(*key));
        nodes.is_empty() || !nodes.iter().all(held)
    })
}

/// The expert nodes that a placement may use now and how many bytes of experts each may hold: those that read the cluster's checkpoint and are not leaving.
pub(crate) fn nodes_to_plan_for(state: &ClusterState, fingerprint: Fingerprint) -> Vec<(NodeId, u64)> {
    let usable = |member: &&Member| {
        member.state != MemberState::Draining && member.model.as_ref().is_some_and(|m| m.fingerprint == fingerprint)
    };
    state
        .members(Role::Expert)
        .filter(usable)
        .map(|member| (member.id.clone(), member.capacity_bytes.unwrap_or(0)))
        .collect()
}

/// The model most members read, once no live member reads the cluster's present one. Ties go to the lowest fingerprint.
fn model_to_adopt(state: &ClusterState) -> Option<ModelIdentity> {
    let mut readers = BTreeMap::<Fingerprint, (usize, &ModelIdentity)>::new();
    for model in state.members(Role::Router).chain(state.members(Role::Expert)).filter_map(|m| m.model.as_ref()) {
        readers.entry(model.fingerprint).or_insert((0, model)).0 += 1;
    }
    if state.model().is_some_and(|model| readers.contains_key(&model.fingerprint)) {
        return None;
    }
    let most = readers.into_values().rev().max_by_key(|(count, _)| *count)?;
    Some(most.1.clone())
}

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
    let old = epochs.len().saturating_sub(HISTORY);
    epochs.into_iter().take(old).filter(move |epoch| !used.contains(epoch))
}

/// The layers of a placement as they are stored, one entry each.
pub(crate) fn layers(placement: &Placement) -> impl Iterator<Item = (sirocco_types::LayerId, &LayerPlacement)> {
    (0..).map(sirocco_types::LayerId).zip(&placement.layers)
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;

    use super::*;

    /// A store's entries, built up as a cluster would.
    #[derive(Default)]
    struct Entries(BTreeMap<String, String>);

    impl Entries {
        fn state(&self) -> ClusterState {
            ClusterState::read(self.0.iter().map(|(key, value)| (key.as_str(), value.as_str(), 1)))
        }

        fn model(fingerprint: u8) -> String {
            format!(
                r#"{{"name":"m","fingerprint":"{}","spec":{{"model_type":"mixtral","hidden_size":2,"intermediate_size":2,
                "num_hidden_layers":2,"num_local_experts":4,"num_experts_per_tok":2,"num_attention_heads":1,
                "num_key_value_heads":1,"head_dim":2,"vocab_size":8,"max_position_embeddings":8,"sliding_window":null,
                "rms_norm_eps":1e-5,"rope_theta":1e4,"tie_word_embeddings":false,"bos_token_id":null,"eos_token_ids":[],
                "dtype":"bf16"}}}}"#,
                format!("{fingerprint:02x}").repeat(32)
            )
        }

        fn join(&mut self, id: &str, fingerprint: u8) {
            let member = format!(
                r#"{{"id":"{id}","role":"expert","state":"ready","grpc":"a:1","http":"a:2","version":"0","incarnation":1,
                "capacity_bytes":1000,"model":{}}}"#,
                Self::model(fingerprint)
            );
            self.0.insert(format!("members/expert/{id}"), member);
        }

        /// The node holds what the target gives it.
        fn load(&mut self, id: &str) {
            let state = self.state();
            let node = NodeId::new(id).unwrap();
            let holdings = sirocco_types::ExpertHoldings::new(state.target().unwrap().experts_on(&node), 0);
            self.0.insert(format!("holdings/{id}"), serde_json::to_string(&holdings).unwrap());
        }

        fn apply(&mut self, actions: Vec<Action>) -> String {
            let mut done = String::new();
            for action in actions {
                match action {
                    Action::AdoptModel(model) => {
                        self.0.insert("model".into(), serde_json::to_string(&model).unwrap());
                        done += "adopt ";
                    }
                    Action::PublishTarget(placement) => {
                        let epoch = placement.epoch;
                        for (layer, placed) in layers(&placement) {
                            let key = format!("placement/epochs/{epoch:08}/{layer:04}");
                            self.0.insert(key, serde_json::to_string(placed).unwrap());
                        }
                        self.0.insert("placement/target".into(), format!(r#"{{"epoch":{epoch}}}"#));
                        write!(done, "target{epoch} ").unwrap();
                    }
                    Action::FlipServing(epoch) => {
                        self.0.insert("placement/serving".into(), format!(r#"{{"epoch":{epoch}}}"#));
                        write!(done, "serving{epoch} ").unwrap();
                    }
                    Action::Forget(epoch) => {
                        self.0.retain(|key, _| !key.starts_with(&format!("placement/epochs/{epoch:08}/")));
                        write!(done, "forget{epoch} ").unwrap();
                    }
                }
            }
            done
        }

        fn step(&mut self) -> String {
            let actions = next_actions(&self.state());
            self.apply(actions).trim_end().to_owned()
        }
    }

    #[test]
    fn serving_flips_only_when_every_expert_of_the_target_is_held() {
        let mut cluster = Entries::default();
        assert_eq!(cluster.step(), "");
        cluster.join("a", 7);
        cluster.join("b", 7);
        assert_eq!(cluster.step(), "adopt");
        assert_eq!(cluster.step(), "target1");
        assert_eq!(cluster.step(), "");
        cluster.load("a");
        assert_eq!(cluster.step(), "");
        cluster.load("b");
        assert_eq!(cluster.step(), "serving1");
        assert_eq!(cluster.step(), "");
    }

    #[test]
    fn a_lost_node_is_replaced_while_the_old_placement_serves() {
        let mut cluster = Entries::default();
        for id in ["a", "b"] {
            cluster.join(id, 7);
        }
        assert_eq!([cluster.step(), cluster.step()], ["adopt", "target1"]);
        cluster.load("a");
        cluster.load("b");
        assert_eq!(cluster.step(), "serving1");
        cluster.0.remove("members/expert/b");
        cluster.0.remove("holdings/b");
        assert_eq!(cluster.step(), "target2");
        assert_eq!(cluster.state().serving().unwrap().epoch, Epoch(1));
        cluster.load("a");
        assert_eq!(cluster.step(), "serving2");
    }

    #[test]
    fn a_node_with_another_checkpoint_gets_no_expert() {
        let mut cluster = Entries::default();
        cluster.join("a", 7);
        cluster.join("b", 7);
        cluster.join("c", 8);
        assert_eq!([cluster.step(), cluster.step()], ["adopt", "target1"]);
        let state = cluster.state();
        assert_eq!(state.target().unwrap().experts_on(&NodeId::new("c").unwrap()).count(), 0);
    }

    #[test]
    fn another_model_is_adopted_when_nobody_reads_the_old_one() {
        let mut cluster = Entries::default();
        cluster.join("a", 7);
        assert_eq!(cluster.step(), "adopt");
        cluster.join("b", 8);
        assert_eq!(cluster.step(), "target1");
        cluster.0.remove("members/expert/a");
        assert_eq!(cluster.step(), "adopt");
    }

    #[test]
    fn old_epochs_are_forgotten_but_not_those_in_use() {
        let mut cluster = Entries::default();
        cluster.join("a", 7);
        cluster.step();
        for round in 0..40 {
            cluster.join(if round % 2 == 0 { "b" } else { "c" }, 7);
            cluster.0.remove(if round % 2 == 0 { "members/expert/c" } else { "members/expert/b" });
            cluster.step();
            cluster.step();
        }
        let state = cluster.state();
        assert!(state.epochs().count() <= HISTORY + 1);
        assert!(state.target().is_some());
    }
}
