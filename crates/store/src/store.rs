//! The trait both stores implement, and the values that cross it.
//!
//! The semantics are etcd's: every change gets the next revision of the whole store, a transaction is one revision, and a
//! key put under a lease is deleted when the lease ends.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::stream::BoxStream;

use crate::{Result, Txn, TxnOutcome};

/// The cluster's state. Every call has its own timeout and ends with [`StoreError::Unavailable`](crate::StoreError) when the
/// store cannot be reached; none waits forever.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// The entry at `key`, if there is one.
    async fn get(&self, key: &str) -> Result<Option<Arc<Entry>>>;

    /// The entries whose keys start with `prefix`, by ascending key, as they were together at one revision.
    async fn list(&self, prefix: &str) -> Result<Listing>;

    /// Applies all of `txn.ops` if all of `txn.compares` hold, else none of them.
    ///
    /// After [`StoreError::Unavailable`](crate::StoreError) it is unknown whether it was applied: the caller looks again.
    /// Other errors mean that it was not.
    async fn txn(&self, txn: Txn) -> Result<TxnOutcome>;

    /// Grants a lease that ends `ttl` (at least; whole seconds) after it was last kept alive.
    async fn grant_lease(&self, ttl: Duration) -> Result<Grant>;

    /// Starts `lease`'s time anew. Errors: `LeaseExpired` when it has ended.
    async fn keep_alive(&self, lease: LeaseId) -> Result<()>;

    /// Ends `lease` and deletes its keys now. Ending one that has already ended is no error.
    async fn revoke(&self, lease: LeaseId) -> Result<()>;

    /// All changes under `prefix` from revision `from` on, in order and without gaps.
    ///
    /// The stream yields `Compacted` when changes it has yet to give are no longer kept, `Unavailable` when the connection
    /// is lost; it ends after either.
    async fn watch(&self, prefix: &str, from: Revision) -> Result<WatchStream>;

    /// Sets `key` whatever it was before.
    async fn put(&self, key: &str, value: &str) -> Result<Revision> {
        Ok(self.txn(Txn::new().put(key, value)).await?.revision)
    }

    /// Deletes `key`; deleting one that is absent is no error.
    async fn delete(&self, key: &str) -> Result<Revision> {
        Ok(self.txn(Txn::new().delete(key)).await?.revision)
    }
}

/// A version of the whole store; every change has a higher one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Revision(pub u64);

impl Revision {
    /// The revision after this one.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Names a lease. Shown in hexadecimal, as `etcdctl` does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseId(pub i64);

impl fmt::Display for LeaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}", self.0)
    }
}

/// A lease as the store granted it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// Its name.
    pub lease: LeaseId,
    /// How long it lives without being kept alive; may be more than was asked for.
    pub ttl: Duration,
}

/// A key and its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The whole key.
    pub key: String,
    /// The value; bytes that are not UTF-8, which Sirocco never writes, are shown as U+FFFD.
    pub value: String,
    /// When the key last came into being.
    pub create_revision: Revision,
    /// When the value was last put.
    pub mod_revision: Revision,
    /// The lease it is deleted with.
    pub lease: Option<LeaseId>,
}

/// What [`Store::list`] found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listing {
    /// By ascending key.
    pub entries: Vec<Arc<Entry>>,
    /// The store's revision at that moment; a watch from the next one misses nothing.
    pub revision: Revision,
}

/// One change of one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The key has a new value.
    Put(Arc<Entry>),
    /// The key is gone, by a delete or with its lease.
    Delete {
        /// Which.
        key: String,
    },
}

impl Event {
    /// The key that changed.
    pub fn key(&self) -> &str {
        match self {
            Self::Put(entry) => &entry.key,
            Self::Delete { key } => key,
        }
    }
}

/// The changes of one or more whole revisions, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WatchBatch {
    /// The last revision in it.
    pub revision: Revision,
    /// Never empty.
    pub events: Vec<Event>,
}

/// See [`Store::watch`].
pub type WatchStream = BoxStream<'static, Result<WatchBatch>>;
