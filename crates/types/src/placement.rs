//! Which expert lives on which node.

use serde::{Deserialize, Serialize};

use crate::{Epoch, ExpertId, ExpertKey, LayerId, NodeId};

/// One layer of a placement: for each expert, by index, the nodes that hold a replica of it, preferred first.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerPlacement {
    /// `experts[e]` are the replicas of expert `e`; empty when no node can hold it.
    pub experts: Vec<Vec<NodeId>>,
}

/// A whole placement. Immutable once it has an epoch.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placement {
    /// Its version; later placements have higher ones.
    pub epoch: Epoch,
    /// By layer index.
    pub layers: Vec<LayerPlacement>,
}

impl Placement {
    /// The nodes that hold `key`, preferred first; empty when it is not placed.
    pub fn replicas(&self, key: ExpertKey) -> &[NodeId] {
        self.layers
            .get(key.layer.index())
            .and_then(|layer| layer.experts.get(key.expert.index()))
            .map_or(&[], Vec::as_slice)
    }

    /// Every expert with its replicas, by layer, then by expert.
    pub fn iter(&self) -> impl Iterator<Item = (ExpertKey, &[NodeId])> {
        self.layers.iter().zip(0..).flat_map(|(layer, l)| {
            layer
                .experts
                .iter()
                .zip(0..)
                .map(move |(nodes, e)| (ExpertKey { layer: LayerId(l), expert: ExpertId(e) }, nodes.as_slice()))
        })
    }

    /// The experts placed on `node`, by layer, then by expert.
    pub fn experts_on<'a>(&'a self, node: &'a NodeId) -> impl Iterator<Item = ExpertKey> + 'a {
        self.iter().filter(move |(_, nodes)| nodes.contains(node)).map(|(key, _)| key)
    }

    /// The experts that no node holds.
    pub fn unplaced(&self) -> impl Iterator<Item = ExpertKey> + '_ {
        self.iter().filter(|(_, nodes)| nodes.is_empty()).map(|(key, _)| key)
    }
}

/// Which of the two placements a cluster keeps is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PlacementKind {
    /// What expert nodes load towards.
    Target,
    /// What routers dispatch by: every expert in it is held.
    Serving,
}

/// The stored value of the target and serving keys.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EpochRef {
    /// The epoch meant.
    pub epoch: Epoch,
    /// The coordinator that chose it.
    #[serde(default)]
    pub leader: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_placement_answers_from_both_sides() {
        let [a, b] = ["a", "b"].map(|n| NodeId::new(n).unwrap());
        let layer = LayerPlacement { experts: vec![vec![a.clone()], vec![b.clone(), a.clone()], vec![]] };
        let placement = Placement { epoch: Epoch(1), layers: vec![layer] };
        let key = |expert| ExpertKey { layer: LayerId(0), expert: ExpertId(expert) };
        assert_eq!(placement.replicas(key(1)), [b, a.clone()]);
        assert!(placement.replicas(ExpertKey { layer: LayerId(9), expert: ExpertId(0) }).is_empty());
        assert_eq!(placement.experts_on(&a).collect::<Vec<_>>(), [key(0), key(1)]);
        assert_eq!(placement.unplaced().collect::<Vec<_>>(), [key(2)]);
    }
}
