//! Leases: time, expiry, revocation.

use std::sync::Arc;
use std::time::Duration;

use sirocco_store::{Event, Lease, StoreError, Txn};
use tokio::time::Instant;

use crate::fixture::{Fixture, Kind, TTL, next, within};

pub(crate) async fn a_lease_kept_alive_outlives_its_time(kind: Kind) {
    let fixture = Fixture::shared(kind).await;
    let (store, key) = (&fixture.store, fixture.key("kept"));
    let lease = Lease::grant(store, TTL).await.unwrap();
    store.txn(Txn::new().put_leased(&key, "x", lease.id())).await.unwrap();
    let long_after = Instant::now() + lease.ttl() * 3;
    while Instant::now() < long_after {
        assert!(store.get(&key).await.unwrap().is_some());
        assert!(!lease.lost().is_cancelled());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    lease.revoke(store).await.unwrap();
    assert_eq!(store.get(&key).await.unwrap(), None);
}

pub(crate) async fn an_expired_lease_takes_its_keys_and_watchers_see_it(kind: Kind) {
    let fixture = Fixture::shared(kind).await;
    let (store, a, b) = (&fixture.store, fixture.key("a"), fixture.key("b"));
    let start = Instant::now();
    let grant = store.grant_lease(TTL).await.unwrap();
    assert!(grant.ttl >= TTL);
    let put = Txn::new().put_leased(&a, "1", grant.lease).put_leased(&b, "2", grant.lease);
    let put = store.txn(put).await.unwrap().revision;
    assert_eq!(store.get(&a).await.unwrap().unwrap().lease, Some(grant.lease));

    let mut changes = store.watch(&fixture.key(""), put.next()).await.unwrap();
    let batch = next(&mut changes).await.unwrap();
    assert_eq!(batch.events, [Event::Delete { key: a.clone() }, Event::Delete { key: b.clone() }]);
    assert!(start.elapsed() >= grant.ttl, "gone after {:?}, granted {:?}", start.elapsed(), grant.ttl);
    assert_eq!(store.get(&a).await.unwrap(), None);
    assert_eq!(store.keep_alive(grant.lease).await, Err(StoreError::LeaseExpired(grant.lease)));
}

pub(crate) async fn a_revoked_lease_takes_its_keys_at_once(kind: Kind) {
    let fixture = Fixture::shared(kind).await;
    let (store, key) = (&fixture.store, fixture.key("held"));
    let lease = store.grant_lease(TTL * 60).await.unwrap().lease;
    store.txn(Txn::new().put_leased(&key, "x", lease)).await.unwrap();
    store.keep_alive(lease).await.unwrap();
    store.revoke(lease).await.unwrap();
    assert_eq!(store.get(&key).await.unwrap(), None);

    store.revoke(lease).await.unwrap();
    let late = Txn::new().put(&fixture.key("other"), "x").put_leased(&key, "x", lease);
    assert_eq!(store.txn(late).await, Err(StoreError::LeaseExpired(lease)));
    assert!(store.list(&fixture.key("")).await.unwrap().entries.is_empty());
}

pub(crate) async fn a_put_without_a_lease_frees_the_key_of_it(kind: Kind) {
    let fixture = Fixture::shared(kind).await;
    let (store, freed, moved) = (&fixture.store, fixture.key("freed"), fixture.key("moved"));
    let first = store.grant_lease(TTL * 60).await.unwrap().lease;
    let second = store.grant_lease(TTL * 60).await.unwrap().lease;
    store.txn(Txn::new().put_leased(&freed, "x", first).put_leased(&moved, "x", first)).await.unwrap();
    store.txn(Txn::new().put(&freed, "y").put_leased(&moved, "y", second)).await.unwrap();
    store.revoke(first).await.unwrap();
    assert_eq!(store.get(&freed).await.unwrap().unwrap().lease, None);
    assert_eq!(store.get(&moved).await.unwrap().unwrap().lease, Some(second));
    store.revoke(second).await.unwrap();
    assert!(store.get(&freed).await.unwrap().is_some());
    assert_eq!(store.get(&moved).await.unwrap(), None);
}

pub(crate) async fn a_lost_lease_is_told(kind: Kind) {
    let fixture = Fixture::shared(kind).await;
    let lease = Lease::grant(&fixture.store, TTL).await.unwrap();
    let lost = lease.lost().clone();
    Arc::clone(&fixture.store).revoke(lease.id()).await.unwrap();
    within("word of the lost lease", lost.cancelled()).await;
}
