//! A live copy of everything under a prefix, published as immutable snapshots.
//!
//! It lists, then watches from the next revision, so nothing falls between. When the watch breaks for any reason (a lost
//! connection, compacted history, an etcd restored from a backup) it starts again with a list; meanwhile, however long, the
//! last snapshot stands and [`Mirror::stale_since`] says so. Intermediate states may be skipped, the newest never is, so
//! readers must go by what is there and not by what changed. It never writes.

use std::collections::BTreeMap;
use std::sync::Arc;

use futures::StreamExt;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::backoff::Backoff;
use crate::{Entry, Event, Listing, Result, Revision, Store, StoreError, WatchBatch, WatchStream};

/// Most batches that become one snapshot.
const BATCHES_AT_ONCE: usize = 64;

/// Everything under a prefix at one revision.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// By whole key.
    pub entries: BTreeMap<String, Arc<Entry>>,
    /// As of when.
    pub revision: Revision,
}

/// See the module. Dropping it stops its task.
#[derive(Debug)]
pub struct Mirror {
    snapshots: watch::Receiver<Arc<Snapshot>>,
    stale_since: watch::Receiver<Option<Instant>>,
    task: JoinSet<()>,
}

impl Mirror {
    /// Starts a mirror of `prefix`; returns with its first snapshot, however long the store takes to be there.
    ///
    /// Errors: only those that waiting does not mend, such as `Refused`.
    pub async fn start(store: Arc<dyn Store>, prefix: &str) -> Result<Self> {
        let mut backoff = Backoff::new();
        let (first, changes) = loop {
            match list_and_watch(store.as_ref(), prefix).await {
                Ok(connected) => break connected,
                Err(error) if error.is_transient() => {
                    tracing::warn!(prefix, %error, "waiting for the store");
                    backoff.wait().await;
                }
                Err(error) => return Err(error),
            }
        };
        let (snapshot_sender, snapshots) = watch::channel(Arc::new(first));
        let (stale_sender, stale_since) = watch::channel(None);
        let mirroring =
            Mirroring { store, prefix: prefix.to_owned(), snapshots: snapshot_sender, stale_since: stale_sender };
        let mut task = JoinSet::new();
        task.spawn(mirroring.run(changes));
        Ok(Self { snapshots, stale_since, task })
    }

    /// The newest snapshot.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        Arc::clone(&self.snapshots.borrow())
    }

    /// The newest snapshot, and word of newer ones. Ends with the mirror.
    pub fn subscribe(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.snapshots.clone()
    }

    /// Since when the store has been out of reach; none while snapshots are live.
    pub fn stale_since(&self) -> watch::Receiver<Option<Instant>> {
        self.stale_since.clone()
    }

    /// Stops the mirror and waits until its task has ended.
    pub async fn close(mut self) {
        self.task.shutdown().await;
    }
}

async fn list_and_watch(store: &dyn Store, prefix: &str) -> Result<(Snapshot, WatchStream)> {
    let Listing { entries, revision } = store.list(prefix).await?;
    let changes = store.watch(prefix, revision.next()).await?;
    let entries = entries.into_iter().map(|entry| (entry.key.clone(), entry)).collect();
    Ok((Snapshot { entries, revision }, changes))
}

struct Mirroring {
    store: Arc<dyn Store>,
    prefix: String,
    snapshots: watch::Sender<Arc<Snapshot>>,
    stale_since: watch::Sender<Option<Instant>>,
}

impl Mirroring {
    async fn run(self, mut changes: WatchStream) {
        loop {
            let error = self.follow(changes).await;
            changes = self.reconnect(error).await;
        }
    }

    /// Publishes `changes` until they break off.
    async fn follow(&self, changes: WatchStream) -> Option<StoreError> {
        let mut chunks = changes.ready_chunks(BATCHES_AT_ONCE);
        while let Some(chunk) = chunks.next().await {
            let mut snapshot = Snapshot::clone(&self.snapshots.borrow());
            let before = snapshot.revision;
            let mut failure = None;
            for batch in chunk {
                match batch {
                    Ok(batch) => snapshot.apply(batch),
                    Err(error) => failure = Some(error),
                }
            }
            if snapshot.revision != before {
                self.snapshots.send_replace(Arc::new(snapshot));
            }
            if failure.is_some() {
                return failure;
            }
        }
        None
    }

    async fn reconnect(&self, mut cause: Option<StoreError>) -> WatchStream {
        let mut backoff = Backoff::new();
        loop {
            match &cause {
                // Compaction only means that this reader was slow: the store is there.
                Some(StoreError::Compacted { .. }) => {
                    tracing::debug!(prefix = self.prefix, "history compacted; listing");
                }
                Some(error) => self.say_stale(&error.to_string()),
                None => self.say_stale("the watch ended"),
            }
            match list_and_watch(self.store.as_ref(), &self.prefix).await {
                Ok((snapshot, changes)) => {
                    self.snapshots.send_replace(Arc::new(snapshot));
                    if let Some(since) = self.stale_since.send_replace(None) {
                        tracing::info!(prefix = self.prefix, outage = ?since.elapsed(), "the store is back");
                    }
                    return changes;
                }
                Err(error) => cause = Some(error),
            }
            backoff.wait().await;
        }
    }

    fn say_stale(&self, error: &str) {
        let now = Instant::now();
        self.stale_since.send_if_modified(|since| since.replace(since.unwrap_or(now)).is_none());
        tracing::warn!(prefix = self.prefix, error, "going on with the last known state of the store");
    }
}

impl Snapshot {
    fn apply(&mut self, batch: WatchBatch) {
        self.revision = batch.revision;
        for event in batch.events {
            match event {
                Event::Put(entry) => {
                    self.entries.insert(entry.key.clone(), entry);
                }
                Event::Delete { key } => {
                    self.entries.remove(&key);
                }
            }
        }
    }
}
