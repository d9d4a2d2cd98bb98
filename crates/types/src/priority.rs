//! How urgent a request is beside others.

use serde::{Deserialize, Serialize};

/// How urgent a request is; later variants go first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Priority {
    /// Work that can wait.
    Low,
    /// What a request has unless it says otherwise.
    #[default]
    Normal,
    /// Before all others.
    High,
}
