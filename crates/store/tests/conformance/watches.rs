//! Watches: order, completeness, compaction.

use std::sync::Arc;

use sirocco_store::{Event, Revision, StoreError, Txn};
use tokio::task::JoinSet;

use crate::fixture::{Fixture, Kind, next};

pub(crate) async fn a_watch_from_an_old_revision_has_no_gaps_while_writes_go_on(kind: Kind) {
    const BEFORE: usize = 50;
    const ALL: usize = 200;
    let fixture = Fixture::shared(kind).await;
    let store = &fixture.store;
    let key = fixture.key("watched/key");
    let first = store.put(&key, "0").await.unwrap();
    for n in 1..BEFORE {
        store.put(&key, &n.to_string()).await.unwrap();
    }
    let mut writer = JoinSet::new();
    let (writing, other) = (Arc::clone(store), fixture.key("elsewhere"));
    writer.spawn(async move {
        for n in BEFORE..ALL {
            writing.put(&key, &n.to_string()).await.unwrap();
            writing.put(&other, "noise").await.unwrap();
        }
    });
    let mut changes = store.watch(&fixture.key("watched/"), first).await.unwrap();
    let mut seen = Vec::new();
    let mut revision = Revision(0);
    while seen.len() < ALL {
        let batch = next(&mut changes).await.unwrap();
        assert!(!batch.events.is_empty() && batch.revision > revision);
        for event in &batch.events {
            let Event::Put(entry) = event else { panic!("{event:?}") };
            assert!(entry.mod_revision > revision && entry.mod_revision <= batch.revision);
            revision = entry.mod_revision;
            seen.push(entry.value.parse::<usize>().unwrap());
        }
        tokio::task::yield_now().await;
    }
    assert_eq!(seen, (0..ALL).collect::<Vec<_>>());
    writer.join_all().await;
}

pub(crate) async fn a_transaction_reaches_watchers_whole(kind: Kind) {
    let fixture = Fixture::shared(kind).await;
    let store = &fixture.store;
    let start = store.put(&fixture.key("a"), "old").await.unwrap();
    let mut changes = store.watch(&fixture.key(""), start.next()).await.unwrap();
    let txn = Txn::new().put(&fixture.key("c"), "1").delete(&fixture.key("a")).put(&fixture.key("b"), "2");
    let revision = store.txn(txn).await.unwrap().revision;
    let batch = next(&mut changes).await.unwrap();
    assert_eq!(batch.revision, revision);
    let mut keys: Vec<&str> = batch.events.iter().map(Event::key).collect();
    keys.sort_unstable();
    assert_eq!(keys, [fixture.key("a"), fixture.key("b"), fixture.key("c")]);
}

pub(crate) async fn a_watch_from_forgotten_history_says_so(kind: Kind) {
    let fixture = Fixture::alone(kind).await;
    let first = fixture.store.put(&fixture.key("a"), "1").await.unwrap();
    fixture.store.put(&fixture.key("a"), "2").await.unwrap();
    fixture.forget_history().await;
    let mut changes = fixture.store.watch(&fixture.key(""), first).await.unwrap();
    let error = next(&mut changes).await.unwrap_err();
    let StoreError::Compacted { from, oldest } = error else { panic!("{error}") };
    assert!(from == first && oldest > first, "{from} {oldest}");

    let latest = fixture.store.put(&fixture.key("a"), "3").await.unwrap();
    let mut changes = fixture.store.watch(&fixture.key(""), latest).await.unwrap();
    assert_eq!(next(&mut changes).await.unwrap().revision, latest, "what is kept can still be had");
}
