//! Mirrors: convergence, whole transactions, recovery.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use sirocco_store::{Mirror, Revision, Txn};
use tokio::task::JoinSet;

use crate::fixture::{Fixture, Kind, until};
use crate::meddled::Meddled;

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
    let late = Arc::new(Meddled::new(&fixture.store));
    late.first_watch_is_late.store(true, Ordering::Relaxed);
    let mirror = Mirror::start(Arc::<Meddled>::clone(&late), &fixture.key("")).await.unwrap();
    fixture.store.put(&fixture.key("late"), "2").await.unwrap();
    let snapshot = until("the late entry", &mirror, |s| s.entries.contains_key(&fixture.key("late"))).await;
    assert_eq!(snapshot.entries.len(), 2);
    assert!(late.watches.load(Ordering::Relaxed) >= 2, "the first watch began in forgotten history");
    assert_eq!(*mirror.stale_since().borrow(), None, "the store was there all the time");
    mirror.close().await;
}
