//! Transactions: conditions on keys, and changes that are made together when all of them hold.

use crate::{LeaseId, Result, Revision, StoreError};

/// Most compares, and most ops, of one transaction: etcd's default limit.
pub const MAX_TXN_OPS: usize = 128;

/// A condition on one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Compare {
    /// The key exists.
    Exists(String),
    /// The key does not exist.
    Absent(String),
    /// The key exists and has existed since this revision: what fences a leader's writes.
    CreatedAt(String, Revision),
    /// The key exists and was last put at this revision.
    ModifiedAt(String, Revision),
    /// The key exists with this value.
    Value(String, String),
    /// The key exists and is deleted with this lease.
    Lease(String, LeaseId),
}

/// A change of one key or prefix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Sets a key.
    Put {
        /// Which.
        key: String,
        /// To what.
        value: String,
        /// Delete it with this lease; none detaches it from one it had.
        lease: Option<LeaseId>,
    },
    /// Deletes a key.
    Delete(String),
    /// Deletes every key that starts with this.
    DeletePrefix(String),
}

/// See [`Store::txn`](crate::Store::txn). No key may be put twice, nor both put and deleted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Txn {
    /// All must hold.
    pub compares: Vec<Compare>,
    /// Made together, at one revision.
    pub ops: Vec<Op>,
}

/// What became of a transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TxnOutcome {
    /// Whether all compares held, and so the ops were made.
    pub succeeded: bool,
    /// The store's revision after it.
    pub revision: Revision,
}

impl Txn {
    /// No conditions, no changes.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a condition.
    #[must_use]
    pub fn when(mut self, compare: Compare) -> Self {
        self.compares.push(compare);
        self
    }

    /// Adds a change.
    #[must_use]
    pub fn then(mut self, op: Op) -> Self {
        self.ops.push(op);
        self
    }

    /// Adds a put without a lease.
    #[must_use]
    pub fn put(self, key: &str, value: &str) -> Self {
        self.then(Op::Put { key: key.to_owned(), value: value.to_owned(), lease: None })
    }

    /// Adds a put under `lease`.
    #[must_use]
    pub fn put_leased(self, key: &str, value: &str, lease: LeaseId) -> Self {
        self.then(Op::Put { key: key.to_owned(), value: value.to_owned(), lease: Some(lease) })
    }

    /// Adds a delete.
    #[must_use]
    pub fn delete(self, key: &str) -> Self {
        self.then(Op::Delete(key.to_owned()))
    }

    /// Adds a delete of every key that starts with `prefix`.
    #[must_use]
    pub fn delete_prefix(self, prefix: &str) -> Self {
        self.then(Op::DeletePrefix(prefix.to_owned()))
    }

    /// Refuses what etcd would refuse, so that the embedded store does too.
    pub(crate) fn check(&self) -> Result<()> {
        let refuse = |problem: String| Err(StoreError::InvalidTxn { problem });
        if self.ops.len().max(self.compares.len()) > MAX_TXN_OPS {
            let (compares, ops) = (self.compares.len(), self.ops.len());
            return refuse(format!("has {compares} compares and {ops} ops, at most {MAX_TXN_OPS} of each are allowed"));
        }
        let compared = self.compares.iter().map(Compare::key);
        if compared.chain(self.ops.iter().filter_map(Op::key)).any(str::is_empty) {
            return refuse("names an empty key".to_owned());
        }
        let mut put: Vec<&str> = self.ops.iter().filter_map(Op::put_key).collect();
        put.sort_unstable();
        if let Some([twice, ..]) = put.windows(2).find(|pair| pair[0] == pair[1]) {
            return refuse(format!("puts {twice} twice"));
        }
        match put.iter().find(|key| self.ops.iter().any(|op| op.deletes(key))) {
            Some(both) => refuse(format!("both puts and deletes {both}")),
            None => Ok(()),
        }
    }
}

impl Compare {
    /// The key it is about.
    pub(crate) fn key(&self) -> &str {
        match self {
            Self::Exists(key)
            | Self::Absent(key)
            | Self::CreatedAt(key, _)
            | Self::ModifiedAt(key, _)
            | Self::Value(key, _)
            | Self::Lease(key, _) => key,
        }
    }
}

impl Op {
    fn key(&self) -> Option<&str> {
        match self {
            Self::Put { key, .. } | Self::Delete(key) => Some(key),
            Self::DeletePrefix(_) => None,
        }
    }

    fn put_key(&self) -> Option<&str> {
        match self {
            Self::Put { key, .. } => Some(key),
            Self::Delete(_) | Self::DeletePrefix(_) => None,
        }
    }

    fn deletes(&self, key: &str) -> bool {
        match self {
            Self::Put { .. } => false,
            Self::Delete(deleted) => deleted == key,
            Self::DeletePrefix(prefix) => key.starts_with(prefix.as_str()),
        }
    }
}
