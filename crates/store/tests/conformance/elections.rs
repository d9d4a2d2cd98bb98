//! Elections: order, handover, fencing.

use std::sync::Arc;

use sirocco_store::{Leadership, Lease, StoreError, Txn, campaign, leader};
use tokio::task::JoinSet;

use crate::fixture::{Fixture, Kind, TTL, until, within};

async fn lead(fixture: &Fixture, prefix: &str, name: &str) -> (Lease, Leadership) {
    let lease = Lease::grant(&fixture.store, TTL).await.unwrap();
    let leadership = within(name, campaign(&fixture.store, prefix, name, &lease)).await.unwrap();
    (lease, leadership)
}

async fn leader_name(fixture: &Fixture, prefix: &str) -> Option<String> {
    leader(fixture.store.as_ref(), prefix).await.unwrap().map(|entry| entry.value.clone())
}

pub(crate) async fn leadership_passes_in_order_of_arrival(kind: Kind) {
    let fixture = Fixture::shared(kind).await;
    let prefix = fixture.key("election");
    let mirror = fixture.mirror().await;
    assert_eq!(leader_name(&fixture, &prefix).await, None);
    let (first_lease, first) = lead(&fixture, &prefix, "first").await;

    let mut candidates = JoinSet::new();
    for (place, name) in (2..).zip(["second", "third"]) {
        let (store, prefix) = (Arc::clone(&fixture.store), prefix.clone());
        candidates.spawn(async move {
            let lease = Lease::grant(&store, TTL).await.unwrap();
            let leadership = campaign(&store, &prefix, name, &lease).await.unwrap();
            (name, lease, leadership)
        });
        until(name, &mirror, |snapshot| snapshot.entries.len() == place).await;
    }
    assert_eq!(leader_name(&fixture, &prefix).await.as_deref(), Some("first"));
    assert!(candidates.try_join_next().is_none());

    first_lease.revoke(&fixture.store).await.unwrap();
    let (name, _second_lease, second) = within("the second", candidates.join_next()).await.unwrap().unwrap();
    assert_eq!((name, leader_name(&fixture, &prefix).await.as_deref()), ("second", Some("second")));
    assert!(second.revision() > first.revision());

    second.resign(&fixture.store).await.unwrap();
    let (name, _third_lease, third) = within("the third", candidates.join_next()).await.unwrap().unwrap();
    assert_eq!((name, leader_name(&fixture, &prefix).await.as_deref()), ("third", Some("third")));
    assert!(third.key().starts_with(&format!("{prefix}/")));
}

pub(crate) async fn leadership_passes_when_the_leaders_lease_expires(kind: Kind) {
    let fixture = Fixture::shared(kind).await;
    let prefix = fixture.key("election");
    let (lease, first) = lead(&fixture, &prefix, "dies").await;
    drop(lease);
    let (_lease, second) = lead(&fixture, &prefix, "follows").await;
    assert!(second.revision() > first.revision());
    assert_eq!(fixture.store.get(first.key()).await.unwrap(), None);
}

pub(crate) async fn a_deposed_leaders_write_changes_nothing(kind: Kind) {
    let fixture = Fixture::shared(kind).await;
    let (store, prefix, key) = (&fixture.store, fixture.key("election"), fixture.key("target"));
    let write = |leadership: &Leadership, value: &str| store.txn(Txn::new().when(leadership.fence()).put(&key, value));
    let (old_lease, old) = lead(&fixture, &prefix, "old").await;
    assert!(write(&old, "by the old").await.unwrap().succeeded);

    store.revoke(old_lease.id()).await.unwrap();
    let (_new_lease, new) = lead(&fixture, &prefix, "new").await;
    assert!(write(&new, "by the new").await.unwrap().succeeded);
    assert!(!write(&old, "too late").await.unwrap().succeeded);
    assert_eq!(store.get(&key).await.unwrap().unwrap().value, "by the new");
    old.resign(store).await.unwrap();
    assert_eq!(leader_name(&fixture, &prefix).await.as_deref(), Some("new"));
}

pub(crate) async fn a_candidate_whose_lease_ends_is_told(kind: Kind) {
    let fixture = Fixture::shared(kind).await;
    let prefix = fixture.key("election");
    let (_lease, _leadership) = lead(&fixture, &prefix, "leads").await;
    let waiting = Lease::grant(&fixture.store, TTL).await.unwrap();
    let id = waiting.id();
    let revoke_once_entered = async {
        let mirror = fixture.mirror().await;
        until("the candidate", &mirror, |snapshot| snapshot.entries.len() == 2).await;
        fixture.store.revoke(id).await.unwrap();
    };
    let campaigning = campaign(&fixture.store, &prefix, "waits", &waiting);
    let (result, ()) = within("the end", futures::future::join(campaigning, revoke_once_entered)).await;
    assert_eq!(result, Err(StoreError::LeaseExpired(id)));
}
