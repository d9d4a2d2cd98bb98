//! What was done to a cluster, by whom, and what came of it: the records behind `sirocco events`.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{Epoch, ExpertId, ExpertKey, LayerId, NodeId};

/// One operation, asked for by a person or begun by the leader itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Operation {
    /// Ascending; later operations have higher ones.
    pub id: u64,
    /// What was done.
    pub kind: OperationKind,
    /// To what: a node, an epoch, an expert; empty when to the cluster.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub subject: String,
    /// Who asked: `user@host`, or the coordinator that began it by itself.
    pub by: String,
    /// How far it is.
    pub state: OperationState,
    /// What is being done, or what came of it, a sentence.
    pub detail: String,
    /// The placement it made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epoch: Option<Epoch>,
    /// The coordinator that wrote this record.
    pub leader: String,
    /// When it began, in milliseconds since 1970, by the leader's clock.
    pub started_ms: u64,
    /// When it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_ms: Option<u64>,
}

/// What an [`Operation`] does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OperationKind {
    /// A coordinator began to lead.
    Lead,
    /// Experts were placed because nodes, their settings or the model changed.
    Place,
    /// Experts were placed anew because of their load.
    Rebalance,
    /// An earlier placement was brought back.
    Rollback,
    /// A node's experts move elsewhere.
    Drain,
    /// A node gets no new experts.
    Cordon,
    /// A node may get experts again.
    Uncordon,
    /// The least number of replicas was changed.
    MinReplicas,
}

impl OperationKind {
    /// Every kind.
    pub const ALL: [Self; 8] = [
        Self::Lead,
        Self::Place,
        Self::Rebalance,
        Self::Rollback,
        Self::Drain,
        Self::Cordon,
        Self::Uncordon,
        Self::MinReplicas,
    ];

    /// The lower-case name, as it is stored.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Lead => "lead",
            Self::Place => "place",
            Self::Rebalance => "rebalance",
            Self::Rollback => "rollback",
            Self::Drain => "drain",
            Self::Cordon => "cordon",
            Self::Uncordon => "uncordon",
            Self::MinReplicas => "min-replicas",
        }
    }
}

impl fmt::Display for OperationKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// How far an [`Operation`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OperationState {
    /// Under way.
    Running,
    /// Done.
    Done,
    /// It did not come to its end.
    Failed,
}

impl OperationState {
    /// The lower-case name, as it is stored.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Done => "done",
            Self::Failed => "failed",
        }
    }
}

impl fmt::Display for OperationState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// Why and when a placement was made, kept beside its layers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EpochAbout {
    /// The operation that made it.
    pub operation: u64,
    /// Its kind.
    pub kind: OperationKind,
    /// Why, a sentence.
    pub reason: String,
    /// Digest of what it was planned for: the nodes with their settings, and the least numbers of replicas.
    pub inputs: String,
    /// Experts that nodes load for it.
    pub moves: u64,
    /// Bytes of them.
    pub moved_bytes: u64,
    /// Predicted imbalance of the placement before it under the load at the time, the mean over layers; 0 when there was none.
    pub imbalance_before: f64,
    /// Predicted imbalance of this placement under the same load.
    pub imbalance_after: f64,
    /// The coordinator that made it.
    pub leader: String,
    /// When, in milliseconds since 1970, by the leader's clock.
    pub at_ms: u64,
}

/// An operator's word on a node; absent for nodes that may be used freely.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cordon {
    /// Its experts move elsewhere too; otherwise it keeps them and only gets no new ones.
    pub drain: bool,
    /// The operation that put it.
    pub operation: u64,
}

/// The least number of replicas that experts must have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MinReplicas {
    /// Of experts not named below.
    pub default: u32,
    /// Of single experts, by layer and expert.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub experts: BTreeMap<LayerId, BTreeMap<ExpertId, u32>>,
}

impl MinReplicas {
    /// The least number of replicas of `key`.
    pub fn of(&self, key: ExpertKey) -> u32 {
        self.experts.get(&key.layer).and_then(|layer| layer.get(&key.expert)).copied().unwrap_or(self.default)
    }
}

impl Default for MinReplicas {
    fn default() -> Self {
        Self { default: 1, experts: BTreeMap::new() }
    }
}

/// One expert that a node loads for a placement.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Move {
    /// Which.
    pub key: ExpertKey,
    /// A node that gives it up; none when this is one more replica.
    pub from: Option<NodeId>,
    /// The node that loads it.
    pub to: NodeId,
}
