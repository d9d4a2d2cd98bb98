//! How much of an engine a request gets beside others.

use serde::{Deserialize, Serialize};

/// How much of an engine a request gets beside others: each priority has four times the share of the one below. It decides no byte
/// of the answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Priority {
    /// Work that can wait.
    Low,
    /// What a request has unless it says otherwise.
    #[default]
    Normal,
    /// Work that somebody waits for.
    High,
}
