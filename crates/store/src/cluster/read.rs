//! Turns a store's entries into a [`ClusterState`], parsing again only those that were put since the last time.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use serde::de::DeserializeOwned;
use sirocco_types::{
    Cordon, Epoch, EpochAbout, EpochRef, ExpertHoldings, LayerId, LayerLoad, LayerPlacement, Member, MinReplicas,
    ModelIdentity, NodeId, NodeLoad, Operation, Placement, SpecError,
};

use super::ClusterState;
use crate::{Keys, Revision, Snapshot, StoreError, parse};

/// One entry: its key without the cluster's prefix, its value, when it was created, and when it was last put (0: unknown).
type Entry<'a> = (&'a str, &'a str, u64, u64);

/// What was parsed before.
#[derive(Debug, Default)]
pub(super) struct Reader {
    records: HashMap<String, (u64, Record)>,
    placements: HashMap<Epoch, (Vec<u64>, Arc<Placement>)>,
}

/// What an entry says. Cheap to clone.
#[derive(Clone, Debug)]
enum Record {
    Member(Arc<Member>),
    Holdings(NodeId, Arc<ExpertHoldings>),
    Layer(Epoch, LayerId, Arc<LayerPlacement>),
    About(Epoch, Arc<EpochAbout>),
    Target(Epoch),
    Serving(Epoch),
    Model(Arc<ModelIdentity>),
    Candidate(Arc<str>),
    LayerLoad(LayerId, Arc<LayerLoad>),
    NodeLoad(NodeId, Arc<NodeLoad>),
    Operation(Arc<Operation>),
    Cordon(NodeId, Arc<Cordon>),
    MinReplicas(Arc<MinReplicas>),
    Unreadable(Arc<str>),
    /// Not one of ours.
    Other,
}

impl Reader {
    /// Reads a snapshot of `keys.prefix()`.
    pub(super) fn read_snapshot(&mut self, snapshot: &Snapshot, keys: &Keys) -> ClusterState {
        let entries = snapshot.entries.values().filter_map(|entry| {
            let key = entry.key.strip_prefix(keys.prefix())?;
            Some((key, entry.value.as_str(), entry.create_revision.0, entry.mod_revision.0))
        });
        ClusterState { revision: Revision(snapshot.revision.0), ..self.read(entries) }
    }

    /// Reads `entries` and forgets what was parsed of others.
    pub(super) fn read<'a>(&mut self, entries: impl Iterator<Item = Entry<'a>>) -> ClusterState {
        let mut known = std::mem::take(&mut self.records);
        let mut state = ClusterState::default();
        let mut layers = BTreeMap::<Epoch, BTreeMap<LayerId, (u64, Arc<LayerPlacement>)>>::new();
        for (key, value, created, modified) in entries {
            let (key, record) = match known.remove_entry(key) {
                Some((key, (revision, record))) if revision == modified && modified > 0 => (key, record),
                _ => (key.to_owned(), Record::parse(key, value)),
            };
            match record.clone() {
                Record::Member(member) => drop(state.members.insert((member.role, member.id.clone()), member)),
                Record::Holdings(id, holdings) => drop(state.holdings.insert(id, holdings)),
                Record::Layer(epoch, layer, placed) => {
                    layers.entry(epoch).or_default().insert(layer, (modified, placed));
                }
                Record::About(epoch, about) => drop(state.abouts.insert(epoch, about)),
                Record::Target(epoch) => state.target = epoch,
                Record::Serving(epoch) => state.serving = epoch,
                Record::Model(model) => state.model = Some(model),
                Record::Candidate(id) => {
                    if state.leader.as_ref().is_none_or(|(first, _)| created < *first) {
                        state.leader = Some((created, id.as_ref().to_owned()));
                    }
                }
                Record::LayerLoad(layer, load) => drop(state.layer_loads.insert(layer, load)),
                Record::NodeLoad(id, load) => drop(state.node_loads.insert(id, load)),
                Record::Operation(operation) => drop(state.operations.insert(operation.id, operation)),
                Record::Cordon(id, cordon) => drop(state.cordons.insert(id, cordon)),
                Record::MinReplicas(least) => state.min_replicas = least,
                Record::Unreadable(problem) => {
                    state.unreadable.insert(key.clone(), problem.as_ref().to_owned());
                }
                Record::Other => {}
            }
            self.records.insert(key, (modified, record));
        }
        state.epochs = layers.into_iter().map(|(epoch, layers)| (epoch, self.placement(epoch, layers))).collect();
        self.placements.retain(|epoch, _| state.epochs.contains_key(epoch));
        state
    }

    /// One epoch's placement, made anew only when a layer of it has changed.
    fn placement(&mut self, epoch: Epoch, layers: BTreeMap<LayerId, (u64, Arc<LayerPlacement>)>) -> Arc<Placement> {
        let revisions: Vec<u64> = layers.values().map(|(revision, _)| *revision).collect();
        match self.placements.get(&epoch) {
            Some((known, placement)) if *known == revisions && !revisions.contains(&0) => Arc::clone(placement),
            _ => {
                // Up to the first that is missing.
                let known = (0..).map(LayerId).zip(layers).take_while(|(place, (layer, _))| place == layer);
                let layers = known.map(|(_, (_, (_, layer)))| LayerPlacement::clone(&layer)).collect();
                let placement = Arc::new(Placement { epoch, layers });
                self.placements.insert(epoch, (revisions, Arc::clone(&placement)));
                placement
            }
        }
    }
}

impl Record {
    fn parse(key: &str, value: &str) -> Self {
        Self::try_parse(key, value).unwrap_or_else(|error| Self::Unreadable(error.to_string().into()))
    }

    fn try_parse(key: &str, value: &str) -> crate::Result<Self> {
        fn shared<T: DeserializeOwned>(key: &str, value: &str) -> crate::Result<Arc<T>> {
            Ok(Arc::new(parse(key, value)?))
        }
        /// Much is sized by these numbers.
        fn sized(key: &str, model: &ModelIdentity) -> crate::Result<()> {
            let malformed = |error: SpecError| StoreError::Malformed { key: key.to_owned(), reason: error.to_string() };
            model.spec.check().map_err(malformed)
        }
        let path: Vec<&str> = key.split('/').collect();
        Ok(match path.as_slice() {
            ["members", _, _] => {
                let member: Arc<Member> = shared(key, value)?;
                member.model.as_ref().map_or(Ok(()), |model| sized(key, model))?;
                Self::Member(member)
            }
            ["holdings", id] => match NodeId::new(id) {
                Ok(id) => Self::Holdings(id, shared(key, value)?),
                Err(_) => Self::Other,
            },
            ["placement", "epochs", epoch, "about"] => match epoch.parse() {
                Ok(epoch) => Self::About(Epoch(epoch), shared(key, value)?),
                Err(_) => Self::Other,
            },
            ["placement", "epochs", epoch, layer] => match (epoch.parse(), layer.parse()) {
                (Ok(epoch), Ok(layer)) => Self::Layer(Epoch(epoch), LayerId(layer), shared(key, value)?),
                _ => Self::Other,
            },
            ["placement", "target"] => Self::Target(parse::<EpochRef>(key, value)?.epoch),
            ["placement", "serving"] => Self::Serving(parse::<EpochRef>(key, value)?.epoch),
            ["model"] => {
                let model: Arc<ModelIdentity> = shared(key, value)?;
                sized(key, &model)?;
                Self::Model(model)
            }
            ["election", "coordinator", _] => Self::Candidate(value.into()),
            ["load", "nodes", id] => match NodeId::new(id) {
                Ok(id) => Self::NodeLoad(id, shared(key, value)?),
                Err(_) => Self::Other,
            },
            ["load", layer] => match layer.parse() {
                Ok(layer) => Self::LayerLoad(LayerId(layer), shared(key, value)?),
                Err(_) => Self::Other,
            },
            ["operations", _] => Self::Operation(shared(key, value)?),
            ["cordons", id] => match NodeId::new(id) {
                Ok(id) => Self::Cordon(id, shared(key, value)?),
                Err(_) => Self::Other,
            },
            ["settings", "min-replicas"] => Self::MinReplicas(shared(key, value)?),
            _ => Self::Other,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_never_takes_the_place_of_one_that_is_missing() {
        let layer = |node: &str| format!(r#"{{"experts":[["{node}"]]}}"#);
        let (first, third) = (layer("a"), layer("c"));
        let entries = [("placement/epochs/00000001/0000", &first), ("placement/epochs/00000001/0002", &third)];
        let state = Reader::default().read(entries.iter().map(|(key, value)| (*key, value.as_str(), 1, 1)));
        assert_eq!(state.epochs[&Epoch(1)].layers.len(), 1);
    }

    #[test]
    fn numbers_that_nothing_should_be_sized_by_are_not_read() {
        let spec = |layers: u64, experts: u64| {
            format!(
                r#"{{"name":"m","fingerprint":"{}","spec":{{"model_type":"mixtral","hidden_size":2,"intermediate_size":2,
                "num_hidden_layers":{layers},"num_local_experts":{experts},"num_experts_per_tok":1,"num_attention_heads":1,
                "num_key_value_heads":1,"head_dim":2,"vocab_size":8,"max_position_embeddings":8,"sliding_window":null,
                "rms_norm_eps":1e-5,"rope_theta":1e4,"tie_word_embeddings":false,"bos_token_id":null,"eos_token_ids":[],
                "dtype":"bf16"}}}}"#,
                "07".repeat(32)
            )
        };
        let member = |model: &str| {
            format!(
                r#"{{"id":"a","role":"expert","state":"ready","grpc":"a:1","http":"a:2","version":"0","incarnation":1,
                "model":{model}}}"#
            )
        };
        for (layers, experts, problem) in [
            (1, 4, None),
            (1 << 40, 4, Some("num_hidden_layers is 1099511627776, must be from 1 to 1024")),
            (1, 1 << 40, Some("num_local_experts is 1099511627776, must be from 1 to 4096")),
            (1, 0, Some("num_local_experts is 0")),
        ] {
            let model = spec(layers, experts);
            let entries = [("model", model.clone()), ("members/expert/a", member(&model))];
            let state = Reader::default().read(entries.iter().map(|(key, value)| (*key, value.as_str(), 1, 1)));
            assert_eq!((state.model.is_some(), state.members.len() == 1), (problem.is_none(), problem.is_none()));
            let said = state.unreadable.values().all(|said| problem.is_some_and(|problem| said.contains(problem)));
            assert!(said && state.unreadable.len() == if problem.is_some() { 2 } else { 0 }, "{:?}", state.unreadable);
        }
    }

    #[test]
    fn only_what_was_put_again_is_parsed_again() {
        let layer = r#"{"experts":[["a"]]}"#;
        let member = |state: &str| {
            format!(
                r#"{{"id":"a","role":"router","state":"{state}","grpc":"a:1","http":"a:2","version":"0","incarnation":1}}"#
            )
        };
        let (ready, draining) = (member("ready"), member("draining"));
        let mut reader = Reader::default();
        let entries =
            |member| [("members/router/a", member, 1, 1), ("placement/epochs/00000001/0000", layer, 2, 2)].into_iter();
        let first = reader.read(entries(&ready));
        let second =
            reader.read([("members/router/a", draining.as_str(), 1, 3)].into_iter().chain(entries(&ready).skip(1)));
        assert_ne!(first.members, second.members);
        assert!(Arc::ptr_eq(&first.epochs[&Epoch(1)], &second.epochs[&Epoch(1)]));
        let third = reader.read(entries(&ready).take(1));
        assert!(third.epochs.is_empty() && reader.placements.is_empty() && reader.records.len() == 1);
    }
}
