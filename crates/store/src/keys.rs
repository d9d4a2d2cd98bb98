//! Where everything lies under `/sirocco/<cluster>/`, and how values are written there.
//!
//! Numbers in keys are zero-padded, so that `etcdctl get --prefix` lists them in order. Values are JSON of the domain types.

use serde::Serialize;
use serde::de::DeserializeOwned;
use sirocco_types::{Epoch, LayerId, NodeId, PlacementKind, Role};

use crate::{Result, StoreError};

/// The keys of one cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keys {
    prefix: String,
}

impl Keys {
    /// The keys of the cluster called `cluster`, which must be spelled like a [`NodeId`]. Errors: `ClusterName`.
    pub fn new(cluster: &str) -> Result<Self> {
        NodeId::new(cluster).map_err(|_| StoreError::ClusterName(cluster.to_owned()))?;
        Ok(Self { prefix: format!("/sirocco/{cluster}/") })
    }

    /// What all of them start with; ends in `/`.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// A node's record, a [`Member`](sirocco_types::Member).
    pub fn member(&self, role: Role, id: &NodeId) -> String {
        format!("{}members/{role}/{id}", self.prefix)
    }

    /// What an expert node holds, [`ExpertHoldings`](sirocco_types::ExpertHoldings).
    pub fn holdings(&self, id: &NodeId) -> String {
        format!("{}holdings/{id}", self.prefix)
    }

    /// What all layers of one placement start with; ends in `/`.
    pub fn epoch(&self, epoch: Epoch) -> String {
        format!("{}placement/epochs/{:08}/", self.prefix, epoch.0)
    }

    /// One layer of a placement, a [`LayerPlacement`](sirocco_types::LayerPlacement).
    pub fn layer(&self, epoch: Epoch, layer: LayerId) -> String {
        format!("{}{:04}", self.epoch(epoch), layer.0)
    }

    /// Why a placement was made, an [`EpochAbout`](sirocco_types::EpochAbout).
    pub fn about(&self, epoch: Epoch) -> String {
        format!("{}about", self.epoch(epoch))
    }

    /// Which epoch is the target or is served, an [`EpochRef`](sirocco_types::EpochRef).
    pub fn placement(&self, kind: PlacementKind) -> String {
        let name = match kind {
            PlacementKind::Target => "target",
            PlacementKind::Serving => "serving",
        };
        format!("{}placement/{name}", self.prefix)
    }

    /// One layer's load, a [`LayerLoad`](sirocco_types::LayerLoad).
    pub fn layer_load(&self, layer: LayerId) -> String {
        format!("{}load/{:04}", self.prefix, layer.0)
    }

    /// An expert node's load, a [`NodeLoad`](sirocco_types::NodeLoad).
    pub fn node_load(&self, id: &NodeId) -> String {
        format!("{}load/nodes/{id}", self.prefix)
    }

    /// What was done, an [`Operation`](sirocco_types::Operation).
    pub fn operation(&self, id: u64) -> String {
        format!("{}operations/{id:08}", self.prefix)
    }

    /// An operator's word on an expert node, a [`Cordon`](sirocco_types::Cordon).
    pub fn cordon(&self, id: &NodeId) -> String {
        format!("{}cordons/{id}", self.prefix)
    }

    /// The least number of replicas, [`MinReplicas`](sirocco_types::MinReplicas).
    pub fn min_replicas(&self) -> String {
        format!("{}settings/min-replicas", self.prefix)
    }

    /// The model the cluster serves, a [`ModelIdentity`](sirocco_types::ModelIdentity).
    pub fn model(&self) -> String {
        format!("{}model", self.prefix)
    }

    /// What the keys of all candidates for coordinator start with; see [`campaign`](crate::campaign).
    pub fn election(&self) -> String {
        format!("{}election/coordinator", self.prefix)
    }
}

/// `value` as it is stored.
pub fn to_json<T: Serialize>(value: &T) -> String {
    serde_json::to_string(value).expect("domain types have string or integer map keys and derive Serialize")
}

/// Reads a stored value back. Errors: `Malformed`, naming `key`.
pub fn parse<T: DeserializeOwned>(key: &str, value: &str) -> Result<T> {
    serde_json::from_str(value)
        .map_err(|error| StoreError::Malformed { key: key.to_owned(), reason: error.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_sort_and_read_well() {
        let keys = Keys::new("demo").unwrap();
        let node = NodeId::new("expert-0").unwrap();
        assert_eq!(keys.member(Role::Expert, &node), "/sirocco/demo/members/expert/expert-0");
        assert_eq!(keys.holdings(&node), "/sirocco/demo/holdings/expert-0");
        assert_eq!(keys.layer(Epoch(7), LayerId(3)), "/sirocco/demo/placement/epochs/00000007/0003");
        assert_eq!(keys.placement(PlacementKind::Target), "/sirocco/demo/placement/target");
        assert!(keys.layer(Epoch(9), LayerId(9)) < keys.layer(Epoch(10), LayerId(0)));
    }

    #[test]
    fn a_cluster_name_that_breaks_keys_is_refused_by_name() {
        for name in ["", "a/b", "Demo", "a b"] {
            let error = Keys::new(name).unwrap_err().to_string();
            assert!(error.contains(&format!("{name:?}")), "{error}");
        }
    }

    #[test]
    fn a_malformed_value_is_reported_with_its_key() {
        let error = parse::<Epoch>("/sirocco/demo/x", "[").unwrap_err().to_string();
        assert!(error.contains("/sirocco/demo/x"), "{error}");
    }
}
