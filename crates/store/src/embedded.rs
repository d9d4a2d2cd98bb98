//! The store that lives in this process, for a cluster of one process.
//!
//! One mutex, held only for map operations, guards everything. Watchers hold no queues: each remembers the next revision it
//! wants, is woken by the current one, and reads from a bounded history, so a slow watcher costs nothing and learns of what
//! it missed by `Compacted`, as with etcd. Nothing is written to disk.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use async_trait::async_trait;
use futures::{StreamExt, stream};
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::{
    Compare, Entry, Event, Grant, LeaseId, Listing, Op, Result, Revision, Store, StoreError, Txn, TxnOutcome,
    WatchBatch, WatchStream,
};

/// Changes kept for watchers unless [`EmbeddedStore::with_history`] says otherwise.
const HISTORY: usize = 10_000;

/// See the module.
#[derive(Debug)]
pub struct EmbeddedStore {
    shared: Arc<Shared>,
    _expiry: JoinSet<()>,
}

impl EmbeddedStore {
    /// An empty store. Must be called within a tokio runtime, which runs its expiry timer until the store is dropped.
    pub fn new() -> Self {
        Self::with_history(HISTORY)
    }

    /// An empty store that keeps the last `history` changes for watchers.
    pub fn with_history(history: usize) -> Self {
        let shared = Arc::new(Shared {
            state: Mutex::new(State { history_limit: history, ..State::default() }),
            revision: watch::Sender::default(),
            leases_changed: Notify::new(),
        });
        let mut expiry = JoinSet::new();
        expiry.spawn(expire_leases(Arc::clone(&shared)));
        Self { shared, _expiry: expiry }
    }
}

impl Default for EmbeddedStore {
    fn default() -> Self {
        Self::new()
    }
}

#[async_trait]
impl Store for EmbeddedStore {
    async fn get(&self, key: &str) -> Result<Option<Arc<Entry>>> {
        Ok(self.shared.lock().entries.get(key).cloned())
    }

    async fn list(&self, prefix: &str) -> Result<Listing> {
        let state = self.shared.lock();
        Ok(Listing { entries: state.under(prefix).cloned().collect(), revision: state.revision })
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome> {
        txn.check()?;
        self.shared.change(|state| state.txn(&txn))
    }

    async fn grant_lease(&self, ttl: Duration) -> Result<Grant> {
        let grant = self.shared.lock().grant(ttl);
        self.shared.leases_changed.notify_one();
        Ok(grant)
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<()> {
        self.shared.change(|state| {
            state.expire();
            let lease = state.leases.get_mut(&lease).ok_or(StoreError::LeaseExpired(lease))?;
            lease.expires = Instant::now() + lease.ttl;
            Ok(())
        })
    }

    async fn revoke(&self, lease: LeaseId) -> Result<()> {
        self.shared.change(|state| state.end_lease(lease));
        Ok(())
    }

    async fn watch(&self, prefix: &str, from: Revision) -> Result<WatchStream> {
        let watcher = Watcher {
            shared: Arc::clone(&self.shared),
            current: self.shared.revision.subscribe(),
            prefix: prefix.to_owned(),
            next: from,
        };
        Ok(stream::try_unfold(watcher, |mut watcher| async {
            Ok(watcher.next_batch().await?.map(|batch| (batch, watcher)))
        })
        .boxed())
    }
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// The current revision, for watchers to wait on.
    revision: watch::Sender<Revision>,
    /// A lease was granted: the earliest expiry may be another.
    leases_changed: Notify,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no code panics while it holds this lock")
    }

    /// Runs `change` and wakes the watchers if it changed anything.
    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let (result, revision) = {
            let mut state = self.lock();
            (change(&mut state), state.revision)
        };
        self.revision.send_if_modified(|current| {
            let newer = revision > *current;
            *current = revision.max(*current);
            newer
        });
        result
    }
}

/// Ends leases when their time is up.
async fn expire_leases(shared: Arc<Shared>) {
    loop {
        let earliest = shared.change(|state| {
            state.expire();
            state.leases.values().map(|lease| lease.expires).min()
        });
        match earliest {
            None => shared.leases_changed.notified().await,
            Some(earliest) => tokio::select! {
                () = tokio::time::sleep_until(earliest) => {}
                () = shared.leases_changed.notified() => {}
            },
        }
    }
}

#[derive(Debug, Default)]
struct State {
    entries: BTreeMap<String, Arc<Entry>>,
    revision: Revision,
    /// Oldest first; several of one revision lie together.
    history: VecDeque<(Revision, Event)>,
    history_limit: usize,
    /// Changes up to and including this revision are no longer in `history`.
    compacted: Revision,
    leases: BTreeMap<LeaseId, HeldLease>,
    last_lease: i64,
}

#[derive(Debug)]
struct HeldLease {
    ttl: Duration,
    expires: Instant,
    keys: BTreeSet<String>,
}

impl State {
    fn under<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = &'a Arc<Entry>> {
        self.entries
            .range::<str, _>((Bound::Included(prefix), Bound::Unbounded))
            .take_while(move |(key, _)| key.starts_with(prefix))
            .map(|(_, entry)| entry)
    }

    fn txn(&mut self, txn: &Txn) -> Result<TxnOutcome> {
        self.expire();
        if !txn.compares.iter().all(|compare| self.holds(compare)) {
            return Ok(TxnOutcome { succeeded: false, revision: self.revision });
        }
        for op in &txn.ops {
            if let Op::Put { lease: Some(lease), .. } = op
                && !self.leases.contains_key(lease)
            {
                return Err(StoreError::LeaseExpired(*lease));
            }
        }
        let revision = self.revision.next();
        let events = txn.ops.iter().flat_map(|op| self.apply(op, revision)).collect();
        self.record(revision, events);
        Ok(TxnOutcome { succeeded: true, revision: self.revision })
    }

    fn holds(&self, compare: &Compare) -> bool {
        let entry = self.entries.get(compare.key());
        let matches = |test: &dyn Fn(&Entry) -> bool| entry.is_some_and(|entry| test(entry));
        match compare {
            Compare::Exists(_) => entry.is_some(),
            Compare::Absent(_) => entry.is_none(),
            Compare::CreatedAt(_, revision) => matches(&|entry| entry.create_revision == *revision),
            Compare::ModifiedAt(_, revision) => matches(&|entry| entry.mod_revision == *revision),
            Compare::Value(_, value) => matches(&|entry| entry.value == *value),
            Compare::Lease(_, lease) => matches(&|entry| entry.lease == Some(*lease)),
        }
    }

    fn apply(&mut self, op: &Op, revision: Revision) -> Vec<Event> {
        match op {
            Op::Put { key, value, lease } => vec![self.put(key, value, *lease, revision)],
            Op::Delete(key) => self.remove(key).into_iter().collect(),
            Op::DeletePrefix(prefix) => {
                let keys: Vec<String> = self.under(prefix).map(|entry| entry.key.clone()).collect();
                keys.iter().filter_map(|key| self.remove(key)).collect()
            }
        }
    }

    fn put(&mut self, key: &str, value: &str, lease: Option<LeaseId>, revision: Revision) -> Event {
        let before = self.entries.get(key);
        let create_revision = before.map_or(revision, |entry| entry.create_revision);
        if let Some(held) = before.and_then(|entry| entry.lease).and_then(|lease| self.leases.get_mut(&lease)) {
            held.keys.remove(key);
        }
        if let Some(held) = lease.and_then(|lease| self.leases.get_mut(&lease)) {
            held.keys.insert(key.to_owned());
        }
        let (key, value) = (key.to_owned(), value.to_owned());
        let entry = Arc::new(Entry { key, value, create_revision, mod_revision: revision, lease });
        self.entries.insert(entry.key.clone(), Arc::clone(&entry));
        Event::Put(entry)
    }

    fn remove(&mut self, key: &str) -> Option<Event> {
        let entry = self.entries.remove(key)?;
        if let Some(held) = entry.lease.and_then(|lease| self.leases.get_mut(&lease)) {
            held.keys.remove(key);
        }
        Some(Event::Delete { key: key.to_owned() })
    }

    /// Makes `events` the changes of `revision`, and forgets the oldest revisions beyond the limit.
    fn record(&mut self, revision: Revision, events: Vec<Event>) {
        if events.is_empty() {
            return;
        }
        self.revision = revision;
        self.history.extend(events.into_iter().map(|event| (revision, event)));
        while self.history.len() > self.history_limit {
            self.compacted = self.history[0].0;
            while self.history.front().is_some_and(|(oldest, _)| *oldest == self.compacted) {
                self.history.pop_front();
            }
        }
    }

    fn grant(&mut self, ttl: Duration) -> Grant {
        self.last_lease += 1;
        let ttl = whole_seconds(ttl);
        let lease = HeldLease { ttl, expires: Instant::now() + ttl, keys: BTreeSet::new() };
        self.leases.insert(LeaseId(self.last_lease), lease);
        Grant { lease: LeaseId(self.last_lease), ttl }
    }

    fn expire(&mut self) {
        let now = Instant::now();
        let over = |(id, lease): (&LeaseId, &HeldLease)| (lease.expires <= now).then_some(*id);
        let expired: Vec<LeaseId> = self.leases.iter().filter_map(over).collect();
        for lease in expired {
            self.end_lease(lease);
        }
    }

    fn end_lease(&mut self, lease: LeaseId) {
        let Some(lease) = self.leases.remove(&lease) else { return };
        let events = lease.keys.iter().filter_map(|key| self.remove(key)).collect();
        self.record(self.revision.next(), events);
    }

    /// The changes under `prefix` from revision `from` on; none when there are none yet.
    fn since(&self, prefix: &str, from: Revision) -> Result<Option<WatchBatch>> {
        if from <= self.compacted {
            return Err(StoreError::Compacted { from, oldest: self.compacted.next() });
        }
        let start = self.history.partition_point(|(revision, _)| *revision < from);
        let events: Vec<Event> =
            self.history.range(start..).filter(|(_, e)| e.key().starts_with(prefix)).map(|(_, e)| e.clone()).collect();
        Ok((!events.is_empty()).then_some(WatchBatch { revision: self.revision, events }))
    }
}

/// Leases are counted in whole seconds, at least one, as etcd does.
pub(crate) fn whole_seconds(ttl: Duration) -> Duration {
    Duration::from_secs(ttl.as_secs() + u64::from(ttl.subsec_nanos() > 0)).max(Duration::from_secs(1))
}

struct Watcher {
    shared: Arc<Shared>,
    current: watch::Receiver<Revision>,
    prefix: String,
    next: Revision,
}

impl Watcher {
    async fn next_batch(&mut self) -> Result<Option<WatchBatch>> {
        loop {
            self.current.borrow_and_update();
            let (batch, revision) = {
                let state = self.shared.lock();
                (state.since(&self.prefix, self.next)?, state.revision)
            };
            self.next = self.next.max(revision.next());
            if batch.is_some() {
                return Ok(batch);
            }
            if self.current.changed().await.is_err() {
                return Ok(None);
            }
        }
    }
}
