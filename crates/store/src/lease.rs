//! A lease that is kept alive for as long as it is wanted.
//!
//! Whether it still lives is for the store alone to say: while the store cannot be reached the keeper goes on trying, because
//! etcd gives leases their full time again after an outage. No clock of this process decides anything.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::backoff::Backoff;
use crate::{Grant, LeaseId, Result, Store, StoreError};

/// A lease and the task that keeps it alive. Dropping it stops the task, and the lease ends when its time is up.
#[derive(Debug)]
pub struct Lease {
    grant: Grant,
    lost: CancellationToken,
    keeper: JoinSet<()>,
}

impl Lease {
    /// Grants a lease and keeps it alive every third of its time.
    pub async fn grant(store: &Arc<dyn Store>, ttl: Duration) -> Result<Self> {
        let grant = store.grant_lease(ttl).await?;
        let lost = CancellationToken::new();
        let mut keeper = JoinSet::new();
        keeper.spawn(keep_alive(Arc::clone(store), grant, lost.clone()));
        Ok(Self { grant, lost, keeper })
    }

    /// Its name.
    pub fn id(&self) -> LeaseId {
        self.grant.lease
    }

    /// How long it outlives this process.
    pub fn ttl(&self) -> Duration {
        self.grant.ttl
    }

    /// Cancelled once the store says that the lease has ended.
    pub fn lost(&self) -> &CancellationToken {
        &self.lost
    }

    /// Ends the lease, and deletes its keys, now.
    pub async fn revoke(mut self, store: &Arc<dyn Store>) -> Result<()> {
        self.keeper.shutdown().await;
        store.revoke(self.grant.lease).await
    }
}

async fn keep_alive(store: Arc<dyn Store>, grant: Grant, lost: CancellationToken) {
    let mut backoff = Backoff::new();
    tokio::time::sleep(grant.ttl / 3).await;
    loop {
        match store.keep_alive(grant.lease).await {
            Ok(()) => {
                backoff = Backoff::new();
                tokio::time::sleep(grant.ttl / 3).await;
            }
            Err(StoreError::LeaseExpired(_)) => {
                tracing::warn!(lease = %grant.lease, "lease has ended in the store");
                lost.cancel();
                return;
            }
            Err(error) => {
                tracing::warn!(lease = %grant.lease, %error, "lease could not be kept alive; trying again");
                backoff.wait().await;
            }
        }
    }
}
