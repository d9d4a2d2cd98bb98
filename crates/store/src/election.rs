//! Leadership among candidates, by etcd's own recipe, so that etcd's tools can read it.
//!
//! Each candidate puts `<prefix>/<its lease>` and the one created first leads; the others each wait for the one before them
//! to go, so that a handover wakes one process and not all. A leader adds [`Leadership::fence`] to every write: a write of a
//! leader whose time has passed then changes nothing, however late it arrives.

use std::sync::Arc;

use futures::StreamExt;

use crate::backoff::Backoff;
use crate::{Compare, Entry, Event, Lease, Result, Revision, Store, StoreError, Txn};

/// Proof of having been elected, good for as long as its key exists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leadership {
    key: String,
    revision: Revision,
}

impl Leadership {
    /// The candidate's key in the store.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// When the candidate entered; later leaders have higher ones.
    pub fn revision(&self) -> Revision {
        self.revision
    }

    /// Holds while this leadership lasts; a part of every transaction of the leader.
    pub fn fence(&self) -> Compare {
        Compare::CreatedAt(self.key.clone(), self.revision)
    }

    /// Hands leadership to the next candidate now.
    pub async fn resign(self, store: &Arc<dyn Store>) -> Result<()> {
        store.txn(Txn::new().when(self.fence()).delete(&self.key)).await.map(|_| ())
    }
}

/// Enters the election at `prefix` with `value`, which names the candidate, and returns once elected.
///
/// Outages of the store are waited out. Errors: `LeaseExpired` when `lease` ends before that. Dropping the future leaves the
/// candidate's key behind until its lease ends.
pub async fn campaign(store: &Arc<dyn Store>, prefix: &str, value: &str, lease: &Lease) -> Result<Leadership> {
    let mut backoff = Backoff::new();
    loop {
        tokio::select! {
            () = lease.lost().cancelled() => return Err(StoreError::LeaseExpired(lease.id())),
            result = enter_and_wait(store.as_ref(), prefix, value, lease) => match result {
                Err(error) if error.is_transient() => {
                    tracing::warn!(%error, "election interrupted; trying again");
                }
                result => return result,
            },
        }
        backoff.wait().await;
    }
}

/// The candidate that leads now, if any. Its value is what it entered with.
pub async fn leader(store: &dyn Store, prefix: &str) -> Result<Option<Arc<Entry>>> {
    let candidates = store.list(&format!("{prefix}/")).await?.entries;
    Ok(candidates.into_iter().min_by_key(|entry| entry.create_revision))
}

async fn enter_and_wait(store: &dyn Store, prefix: &str, value: &str, lease: &Lease) -> Result<Leadership> {
    let key = format!("{prefix}/{}", lease.id());
    // Fails harmlessly when an earlier try, whose answer was lost, has put it.
    store.txn(Txn::new().when(Compare::Absent(key.clone())).put_leased(&key, value, lease.id())).await?;
    loop {
        let listing = store.list(&format!("{prefix}/")).await?;
        let Some(own) = listing.entries.iter().find(|entry| entry.key == key) else {
            return Err(StoreError::LeaseExpired(lease.id()));
        };
        let before = listing.entries.iter().filter(|entry| entry.create_revision < own.create_revision);
        match before.max_by_key(|entry| entry.create_revision) {
            None => return Ok(Leadership { key, revision: own.create_revision }),
            Some(predecessor) => until_deleted(store, &predecessor.key, listing.revision).await?,
        }
    }
}

/// Returns once `key`, which existed at revision `seen`, has been deleted, or may have been.
pub(crate) async fn until_deleted(store: &dyn Store, key: &str, seen: Revision) -> Result<()> {
    let mut changes = store.watch(key, seen.next()).await?;
    while let Some(batch) = changes.next().await {
        match batch {
            Ok(batch) if batch.events.iter().any(|e| matches!(e, Event::Delete { key: gone } if gone == key)) => break,
            Ok(_) => {}
            Err(StoreError::Compacted { .. }) => break,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
