//! Who is in the cluster: the records that nodes keep in the store under their lease.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{Epoch, ExpertId, ExpertKey, LayerId, ModelIdentity, NodeId};

/// What a process does in the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Places experts.
    Coordinator,
    /// Runs all that is not an expert and serves clients.
    Router,
    /// Holds and runs experts.
    Expert,
}

impl Role {
    /// Every role.
    pub const ALL: [Self; 3] = [Self::Coordinator, Self::Router, Self::Expert];

    /// The lower-case name, as in store keys.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Coordinator => "coordinator",
            Self::Router => "router",
            Self::Expert => "expert",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// How far a node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MemberState {
    /// Registered, not yet able to do its work.
    Starting,
    /// Doing its work.
    Ready,
    /// Leaving: finishes what it has, takes nothing new.
    Draining,
}

impl fmt::Display for MemberState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Draining => "draining",
        })
    }
}

/// What a node computes with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// `cpu` or `cuda`.
    pub kind: String,
    /// A person's description, e.g. `AMD EPYC, AVX2, 2 threads`.
    pub name: String,
}

/// A node's record, kept in the store for as long as its lease lives.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Member {
    /// Unique within the role, the same after a restart.
    pub id: NodeId,
    /// What it does.
    pub role: Role,
    /// How far it is.
    pub state: MemberState,
    /// Where its gRPC services answer, `host:port`.
    pub grpc: String,
    /// Where its health endpoints answer, `host:port`.
    pub http: String,
    /// Its software version.
    pub version: String,
    /// Changes with every start of the process, so that a restart can be told from a reconnect.
    pub incarnation: u64,
    /// Failure domain; replicas of one expert go to different ones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zone: Option<String>,
    /// What it computes with; absent for coordinators.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<Device>,
    /// Bytes of expert weights it may hold; only expert nodes have one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capacity_bytes: Option<u64>,
    /// How fast it runs experts, in percent of an ordinary node; only expert nodes have one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub speed: Option<u32>,
    /// Most experts of one layer it may hold; any number when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_experts_per_layer: Option<u32>,
    /// The placement epoch it dispatches by; only routers have one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serving_epoch: Option<Epoch>,
    /// The checkpoint it reads; absent for coordinators.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelIdentity>,
}

/// The experts an expert node has loaded and answers for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExpertHoldings {
    /// By layer, ascending experts.
    pub layers: BTreeMap<LayerId, Vec<ExpertId>>,
    /// Memory its weights take, in bytes.
    pub weight_bytes: u64,
    /// What it was asked to hold and cannot, with the reason.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub refused: Vec<RefusedExpert>,
}

/// An expert that a node was asked to hold and cannot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefusedExpert {
    /// Which.
    #[serde(flatten)]
    pub key: ExpertKey,
    /// Why, naming file and tensor.
    pub reason: String,
}

impl ExpertHoldings {
    /// Collects `experts` in any order; `refused` starts empty.
    pub fn new(experts: impl IntoIterator<Item = ExpertKey>, weight_bytes: u64) -> Self {
        let mut layers = BTreeMap::<LayerId, Vec<ExpertId>>::new();
        for key in experts {
            layers.entry(key.layer).or_default().push(key.expert);
        }
        for experts in layers.values_mut() {
            experts.sort_unstable();
            experts.dedup();
        }
        Self { layers, weight_bytes, refused: Vec::new() }
    }

    /// Whether `key` is among them.
    pub fn contains(&self, key: ExpertKey) -> bool {
        self.layers.get(&key.layer).is_some_and(|experts| experts.binary_search(&key.expert).is_ok())
    }

    /// How many there are, over all layers.
    pub fn count(&self) -> usize {
        self.layers.values().map(Vec::len).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holdings_read_well_as_json() {
        let key = |layer, expert| ExpertKey { layer: LayerId(layer), expert: ExpertId(expert) };
        let holdings = ExpertHoldings::new([key(1, 3), key(0, 2), key(1, 0), key(1, 3)], 4096);
        let json = serde_json::to_string(&holdings).unwrap();
        assert_eq!(json, r#"{"layers":{"0":[2],"1":[0,3]},"weight_bytes":4096}"#);
        assert_eq!(serde_json::from_str::<ExpertHoldings>(&json).unwrap(), holdings);
        assert!(holdings.contains(key(1, 0)) && !holdings.contains(key(0, 0)));
        assert_eq!(holdings.count(), 3);
    }
}
