//! Mirrors: convergence, whole transactions, recovery.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use sirocco_store::{Entry, Grant, LeaseId, Listing, Mirror, Result, Revision, Store, Txn, TxnOutcome, WatchStream};
use tokio::task::JoinSet;

use crate::fixture::{Fixture, Kind, until};

pub(crate) async fn a_mirror_converges_and_never_shows_half_a_transaction(kind: Kind) {
    const WRITERS: usize = 4;
    const WRITES: usize = 40;
    let fixture = Fixture::shared(kind).await;
    let mirror = fixture.mirror().await;
    let mut reader = JoinSet::new();
    let mut snapshots = mirror.subscribe();
    let (left, right) = (fixture.key("left"), fixture.key("right"));
    let sides = [left.clone(), right.clone()];
    reader.spawn(async move {
        let mut last = Revision(0);
        let mut seen = 0;
        while snapshots.changed().await.is_ok() {
            let snapshot = Arc::clone(&snapshots.borrow_and_update());
            let [left, right] = sides.each_ref().map(|key| snapshot.entries.get(key).map(|entry| entry.value.clone()));
            assert_eq!(left, right, "half a transaction at revision {}", snapshot.revision);
            assert!(snapshot.revision > last);
            last = snapshot.revision;
            seen += 1;
        }
        seen
    });
    let mut writers = JoinSet::new();
    for writer in 0..WRITERS {
        let (store, left, right) = (Arc::clone(&fixture.store), left.clone(), right.clone());
        let own = fixture.key(&format!("own/{writer}"));
        writers.spawn(async move {
            for n in 0..WRITES {
                let value = format!("{writer}/{n}");
                store.txn(Txn::new().put(&left, &value).put(&right, &value)).await.unwrap();
                match n % 3 {
                    0 => store.delete(&own).await.unwrap(),
                    _ => store.put(&own, &value).await.unwrap(),
                };
                tokio::task::yield_now().await;
            }
        });
    }
    writers.join_all().await;
    let end = fixture.store.list(&fixture.key("")).await.unwrap();
    let snapshot = until("convergence", &mirror, |s| s.entries.values().eq(&end.entries)).await;
    assert_eq!(snapshot.entries.len(), 2 + WRITERS - usize::from(WRITES % 3 == 1) * WRITERS);
    assert_eq!(*mirror.stale_since().borrow(), None);
    mirror.close().await;
    assert!(reader.join_next().await.unwrap().unwrap() > 0);
}

pub(crate) async fn a_mirror_recovers_from_compacted_history(kind: Kind) {
    let fixture = Fixture::alone(kind).await;
    fixture.store.put(&fixture.key("early"), "1").await.unwrap();
    fixture.forget_history().await;
    let late = Arc::new(LateWatch { store: Arc::clone(&fixture.store), watches: AtomicUsize::new(0) });
    let mirror = Mirror::start(Arc::<LateWatch>::clone(&late), &fixture.key("")).await.unwrap();
    fixture.store.put(&fixture.key("late"), "2").await.unwrap();
    let snapshot = until("the late entry", &mirror, |s| s.entries.contains_key(&fixture.key("late"))).await;
    assert_eq!(snapshot.entries.len(), 2);
    assert!(late.watches.load(Ordering::Relaxed) >= 2, "the first watch began in forgotten history");
    assert_eq!(*mirror.stale_since().borrow(), None, "the store was there all the time");
    mirror.close().await;
}

/// The real store, seen by a reader whose first watch comes so late that its history is gone.
struct LateWatch {
    store: Arc<dyn Store>,
    watches: AtomicUsize,
}

#[async_trait]
impl Store for LateWatch {
    async fn get(&self, key: &str) -> Result<Option<Arc<Entry>>> {
        self.store.get(key).await
    }

    async fn list(&self, prefix: &str) -> Result<Listing> {
        self.store.list(prefix).await
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome> {
        self.store.txn(txn).await
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
        self.store.watch(prefix, if first { Revision(1) } else { from }).await
    }
}
