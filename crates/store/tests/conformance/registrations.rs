//! Registrations: presence, restarts, rivals.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use sirocco_store::{Event, Registration, StoreError, Txn};

use crate::fixture::{Fixture, Kind, TTL, next, until, within};
use crate::meddled::Meddled;

async fn register(fixture: &Fixture, value: &str) -> sirocco_store::Result<Registration> {
    let claim = fixture.key("members/a");
    within("registration", Registration::open(Arc::clone(&fixture.store), &claim, value, TTL)).await
}

pub(crate) async fn records_follow_their_owner_and_vanish_on_close(kind: Kind) {
    let fixture = Fixture::shared(kind).await;
    let (member, holdings) = (fixture.key("members/a"), fixture.key("holdings/a"));
    let mirror = fixture.mirror().await;
    let registration = register(&fixture, "starting").await.unwrap();
    let entry = fixture.store.get(&member).await.unwrap().unwrap();
    assert_eq!(entry.value, "starting");
    let lease = entry.lease.expect("a record hangs on a lease");

    registration.set([(member.clone(), "ready".to_owned()), (holdings.clone(), "{}".to_owned())]);
    let both = until("both records", &mirror, |snapshot| snapshot.entries.len() == 2).await;
    assert_eq!(both.entries[&member].value, "ready", "what is set together arrives together");
    assert!(both.entries.values().all(|entry| entry.lease == Some(lease)));

    registration.close().await;
    let left = fixture.store.list(&fixture.key("")).await.unwrap();
    assert!(left.entries.is_empty(), "gone at once, not with the lease's time");
}

pub(crate) async fn a_restart_after_a_kill_has_the_same_id_and_no_double_entry(kind: Kind) {
    let fixture = Fixture::shared(kind).await;
    let start = fixture.store.put(&fixture.key("z"), "").await.unwrap();
    let killed = register(&fixture, "first life").await.unwrap();
    drop(killed);
    let restarted = register(&fixture, "second life").await.unwrap();
    let members = fixture.store.list(&fixture.key("members/")).await.unwrap().entries;
    assert_eq!(members.iter().map(|entry| entry.value.as_str()).collect::<Vec<_>>(), ["second life"]);

    let mut changes = fixture.store.watch(&fixture.key("members/"), start.next()).await.unwrap();
    let mut lives = Vec::new();
    while lives.last().is_none_or(|life| life != "second life") {
        for event in next(&mut changes).await.unwrap().events {
            lives.push(match event {
                Event::Put(entry) => entry.value.clone(),
                Event::Delete { .. } => "gone".to_owned(),
            });
        }
    }
    lives.dedup();
    assert_eq!(lives, ["first life", "gone", "second life"]);
    restarted.close().await;
}

/// As those of all dead processes do when etcd changes its own leader.
pub(crate) async fn a_dead_process_is_waited_for_though_its_lease_starts_anew(kind: Kind) {
    let fixture = Fixture::shared(kind).await;
    let key = fixture.key("members/a");
    let dead = fixture.store.grant_lease(TTL * 4).await.unwrap();
    fixture.store.txn(Txn::new().put_leased(&key, "first life", dead.lease)).await.unwrap();
    let opening = Registration::open(Arc::clone(&fixture.store), &key, "second life", dead.ttl);
    let starts_anew = async {
        tokio::time::sleep(dead.ttl * 7 / 8).await;
        fixture.store.keep_alive(dead.lease).await.unwrap();
    };
    let (restarted, ()) = within("registration", async { tokio::join!(opening, starts_anew) }).await;
    let restarted = restarted.unwrap();
    assert_eq!(fixture.store.get(&key).await.unwrap().unwrap().value, "second life");
    restarted.close().await;
}

pub(crate) async fn a_second_live_process_with_the_same_id_is_refused(kind: Kind) {
    let fixture = Fixture::shared(kind).await;
    let key = fixture.key("members/a");
    let first = register(&fixture, "first").await.unwrap();
    let before = fixture.store.get(&key).await.unwrap().unwrap();
    let error = register(&fixture, "second").await.unwrap_err();
    assert!(matches!(error, StoreError::Held { .. }), "{error}");
    assert!(error.to_string().contains(&format!("{key} is held by another live process")), "{error}");
    assert_eq!(fixture.store.get(&key).await.unwrap(), Some(before), "the first did not notice");
    first.close().await;
    let third = register(&fixture, "third").await.unwrap();
    assert_eq!(fixture.store.get(&key).await.unwrap().unwrap().value, "third");
    third.close().await;
}

pub(crate) async fn a_registration_comes_back_after_losing_its_lease(kind: Kind) {
    let fixture = Fixture::shared(kind).await;
    let (member, holdings) = (fixture.key("members/a"), fixture.key("holdings/a"));
    let registration = register(&fixture, "ready").await.unwrap();
    registration.set([(holdings.clone(), "{}".to_owned())]);
    let mirror = fixture.mirror().await;
    let before = until("both records", &mirror, |snapshot| snapshot.entries.len() == 2).await;
    let lease = before.entries[&member].lease.unwrap();
    fixture.store.revoke(lease).await.unwrap();
    let after = until("both records again", &mirror, |snapshot| {
        snapshot.entries.len() == 2 && snapshot.entries.values().all(|entry| entry.lease != Some(lease))
    })
    .await;
    let values = after.entries.values().map(|entry| entry.value.as_str());
    assert_eq!(values.collect::<Vec<_>>(), ["{}", "ready"]);
    registration.close().await;
    assert!(fixture.store.list(&fixture.key("")).await.unwrap().entries.is_empty());
}

pub(crate) async fn closing_while_registering_again_leaves_nothing_behind(kind: Kind) {
    let fixture = Fixture::shared(kind).await;
    let key = fixture.key("members/a");
    let meddled = Arc::new(Meddled::new(&fixture.store));
    // Long enough that what is left behind would still be there.
    let opening = Registration::open(Arc::<Meddled>::clone(&meddled), &key, "ready", TTL * 2);
    let registration = within("registration", opening).await.unwrap();
    let lease = fixture.store.get(&key).await.unwrap().unwrap().lease.unwrap();
    let mirror = fixture.mirror().await;

    meddled.creations_get_no_answer.store(true, Ordering::Relaxed);
    fixture.store.revoke(lease).await.unwrap();
    until("the new record", &mirror, |s| s.entries.get(&key).is_some_and(|entry| entry.lease != Some(lease))).await;
    within("closing", registration.close()).await;
    assert_eq!(fixture.store.get(&key).await.unwrap(), None);
}

pub(crate) async fn a_deleted_claim_is_put_back(kind: Kind) {
    let fixture = Fixture::shared(kind).await;
    let member = fixture.key("members/a");
    let registration = register(&fixture, "ready").await.unwrap();
    let deleted = fixture.store.delete(&member).await.unwrap();
    let mut changes = fixture.store.watch(&member, deleted.next()).await.unwrap();
    let events = next(&mut changes).await.unwrap().events;
    assert!(matches!(&events[..], [Event::Put(entry)] if entry.value == "ready"), "{events:?}");
    registration.close().await;
}
