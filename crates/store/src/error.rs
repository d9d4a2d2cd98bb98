//! What can go wrong between a node and the store.

use std::time::Duration;

use crate::{LeaseId, Revision};

/// The result of a store call.
pub type Result<T> = std::result::Result<T, StoreError>;

/// Why a store call failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// The store could not be reached or did not answer in time. A transaction may or may not have been applied.
    #[error("{operation} failed at {endpoint}: {reason}")]
    Unavailable {
        /// What was tried.
        operation: &'static str,
        /// The endpoint tried last.
        endpoint: String,
        /// What went wrong there.
        reason: String,
    },
    /// No endpoint became usable within the time given to [`EtcdStore::connect`](crate::EtcdStore::connect).
    #[error("no etcd endpoint answered within {waited:?}: {reasons}")]
    Unreachable {
        /// How long was tried.
        waited: Duration,
        /// Each endpoint with its last problem.
        reasons: String,
    },
    /// The store answered and refused: wrong credentials, no permission, too large.
    #[error("etcd at {endpoint} refuses {operation}: {reason}")]
    Refused {
        /// What was refused.
        operation: &'static str,
        /// Who refused.
        endpoint: String,
        /// Why.
        reason: String,
    },
    /// An option for the connection is wrong; trying again would not help.
    #[error("{option} {value:?} {problem}")]
    Options {
        /// The option's name.
        option: &'static str,
        /// What was given; never a secret.
        value: String,
        /// What is wrong with it and what is allowed.
        problem: String,
    },
    /// The lease has ended, and its keys with it.
    #[error("lease {0} has expired or was revoked")]
    LeaseExpired(LeaseId),
    /// Changes from this revision on are no longer kept: list again.
    #[error("changes from revision {from} are no longer kept, the oldest kept is {oldest}")]
    Compacted {
        /// The first revision that was wanted.
        from: Revision,
        /// The first revision that can be had.
        oldest: Revision,
    },
    /// The transaction contradicts itself or is too large.
    #[error("the transaction {problem}")]
    InvalidTxn {
        /// What is wrong.
        problem: String,
    },
    /// The key that names this process is kept by another one that is alive.
    #[error(
        "{key} is held by another live process (lease {lease}, still there after {waited:?}): give this one another id"
    )]
    Held {
        /// The key both claim.
        key: String,
        /// The lease of the other process.
        lease: LeaseId,
        /// How long its key was given to expire.
        waited: Duration,
    },
    /// The cluster's name cannot be a part of a key.
    #[error("cluster name {0:?} must be 1 to 63 of a-z, 0-9, '-' and '.', starting and ending with a letter or digit")]
    ClusterName(String),
    /// A stored value is not what its key says.
    #[error("the value of {key} does not parse: {reason}")]
    Malformed {
        /// Which.
        key: String,
        /// What the parser said.
        reason: String,
    },
}

impl StoreError {
    /// Whether the same call may succeed later.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Unavailable { .. })
    }
}
