//! The state of one cluster as its store has it, read from a snapshot of everything under its prefix.
//!
//! Every node decides from this alone, so that it does the same after a missed event or a restart as it does live. An entry
//! that does not parse is left out and said so once: one bad record must not stop a cluster.

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use sirocco_types::{
    Epoch, EpochRef, ExpertHoldings, LayerId, LayerPlacement, Member, ModelIdentity, NodeId, Placement, Role,
};

/// Members, holdings, model and placements of one cluster.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ClusterState {
    members: BTreeMap<(Role, NodeId), Member>,
    holdings: BTreeMap<NodeId, ExpertHoldings>,
    epochs: BTreeMap<Epoch, Placement>,
    target: Epoch,
    serving: Epoch,
    model: Option<ModelIdentity>,
    leader: Option<(u64, String)>,
}

impl ClusterState {
    /// Reads `entries`, whose keys have lost the cluster's prefix (`/sirocco/<cluster>/`); the third part is the revision
    /// at which the key was created.
    pub fn read<'a>(entries: impl IntoIterator<Item = (&'a str, &'a str, u64)>) -> Self {
        let mut state = Self::default();
        let mut layers = BTreeMap::<Epoch, BTreeMap<LayerId, LayerPlacement>>::new();
        for (key, value, created) in entries {
            let path: Vec<&str> = key.split('/').collect();
            match path.as_slice() {
                ["members", _, _] => {
                    if let Some(member) = parse::<Member>(key, value) {
                        state.members.insert((member.role, member.id.clone()), member);
                    }
                }
                ["holdings", id] => {
                    if let (Ok(id), Some(holdings)) = (NodeId::new(id), parse(key, value)) {
                        state.holdings.insert(id, holdings);
                    }
                }
                ["placement", "epochs", epoch, layer] => {
                    if let (Ok(epoch), Ok(layer), Some(placement)) = (epoch.parse(), layer.parse(), parse(key, value)) {
                        layers.entry(Epoch(epoch)).or_default().insert(LayerId(layer), placement);
                    }
                }
                ["placement", "target"] => state.target = epoch(key, value),
                ["placement", "serving"] => state.serving = epoch(key, value),
                ["model"] => state.model = parse(key, value),
                ["election", "coordinator", _] => {
                    if state.leader.as_ref().is_none_or(|(first, _)| created < *first) {
                        state.leader = Some((created, value.to_owned()));
                    }
                }
                _ => {}
            }
        }
        state.epochs = layers
            .into_iter()
            .map(|(epoch, layers)| (epoch, Placement { epoch, layers: layers.into_values().collect() }))
            .collect();
        state
    }

    /// The members of one role, by id.
    pub fn members(&self, role: Role) -> impl Iterator<Item = &Member> {
        self.members.values().filter(move |member| member.role == role)
    }

    /// One member, while its lease lives.
    pub fn member(&self, role: Role, id: &NodeId) -> Option<&Member> {
        self.members.get(&(role, id.clone()))
    }

    /// What an expert node holds; none when it is gone or has not said.
    pub fn holdings(&self, node: &NodeId) -> Option<&ExpertHoldings> {
        self.holdings.get(node)
    }

    /// What expert nodes load towards.
    pub fn target(&self) -> Option<&Placement> {
        self.epoch(self.target)
    }

    /// What routers dispatch by.
    pub fn serving(&self) -> Option<&Placement> {
        self.epoch(self.serving)
    }

    /// The placement of one epoch, when all of its layers are there.
    pub fn epoch(&self, epoch: Epoch) -> Option<&Placement> {
        let layers = self.model.as_ref()?.spec.num_hidden_layers;
        self.epochs.get(&epoch).filter(|placement| placement.layers.len() == layers)
    }

    /// Every epoch the store has, complete or not, ascending.
    pub fn epochs(&self) -> impl Iterator<Item = Epoch> {
        self.epochs.keys().copied()
    }

    /// The model the cluster serves, once a node with one has joined.
    pub fn model(&self) -> Option<&ModelIdentity> {
        self.model.as_ref()
    }

    /// The id of the coordinator that leads.
    pub fn leader(&self) -> Option<&str> {
        self.leader.as_ref().map(|(_, id)| id.as_str())
    }
}

fn epoch(key: &str, value: &str) -> Epoch {
    parse::<EpochRef>(key, value).unwrap_or_default().epoch
}

fn parse<T: DeserializeOwned>(key: &str, value: &str) -> Option<T> {
    match serde_json::from_str(value) {
        Ok(value) => Some(value),
        Err(error) => {
            tracing::warn!(key, %error, "an entry of the store does not parse and is left out");
            None
        }
    }
}
