//! The real store with what networks do to its callers: watches that come late, answers that never do.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use sirocco_store::{Compare, Entry, Grant, LeaseId, Listing, Result, Revision, Store, Txn, TxnOutcome, WatchStream};

pub(crate) struct Meddled {
    store: Arc<dyn Store>,
    /// How many watches were made.
    pub(crate) watches: AtomicUsize,
    /// The first watch begins at the first revision, whatever it asks for.
    pub(crate) first_watch_is_late: AtomicBool,
    /// Transactions that create something absent are made, but never answered.
    pub(crate) creations_get_no_answer: AtomicBool,
}

impl Meddled {
    pub(crate) fn new(store: &Arc<dyn Store>) -> Self {
        Self {
            store: Arc::clone(store),
            watches: AtomicUsize::default(),
            first_watch_is_late: AtomicBool::default(),
            creations_get_no_answer: AtomicBool::default(),
        }
    }
}

#[async_trait]
impl Store for Meddled {
    async fn get(&self, key: &str) -> Result<Option<Arc<Entry>>> {
        self.store.get(key).await
    }

    async fn list(&self, prefix: &str) -> Result<Listing> {
        self.store.list(prefix).await
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome> {
        let creates = txn.compares.iter().any(|compare| matches!(compare, Compare::Absent(_)));
        let outcome = self.store.txn(txn).await;
        if creates && self.creations_get_no_answer.load(Ordering::Relaxed) {
            std::future::pending::<()>().await;
        }
        outcome
    }

    async fn grant_lease(&self, ttl: Duration) -> Result<Grant> {
        self.store.grant_lease(ttl).await
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<()> {
        self.store.keep_alive(lease).await
    }

    async fn revoke(&self, lease: LeaseId) -> Result<()> {
        self.store.revoke(lease).await
    }

    async fn watch(&self, prefix: &str, from: Revision) -> Result<WatchStream> {
        let first = self.watches.fetch_add(1, Ordering::Relaxed) == 0;
        let late = first && self.first_watch_is_late.load(Ordering::Relaxed);
        self.store.watch(prefix, if late { Revision(1) } else { from }).await
    }
}
