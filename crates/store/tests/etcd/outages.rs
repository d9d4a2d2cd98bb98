//! etcd that is killed, late, or not there at all.

use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use sirocco_store::{EtcdOptions, EtcdStore, Lease, Mirror, Registration, Store, StoreError, campaign};
use sirocco_testkit::etcd::Etcd;

use crate::within;

const TTL: Duration = Duration::from_secs(1);

async fn connect(options: EtcdOptions) -> Arc<dyn Store> {
    within("connect", EtcdStore::connect(options)).await.unwrap()
}

/// An address that nothing listens on.
fn dead_endpoint() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_goes_on_after_etcd_was_killed_and_restarted() {
    let mut etcd = Etcd::start().unwrap();
    let store = connect(EtcdOptions::new([etcd.endpoint()])).await;
    store.put("/app/before", "1").await.unwrap();
    let mirror = Mirror::start(Arc::clone(&store), "/app/").await.unwrap();
    let registration = Registration::open(Arc::clone(&store), "/app/member", "ready", TTL).await.unwrap();
    let lease = Lease::grant(&store, TTL).await.unwrap();
    let leadership = campaign(&store, "/app/election", "leader", &lease).await.unwrap();
    let mut snapshots = mirror.subscribe();
    within("three keys", snapshots.wait_for(|s| s.entries.len() == 3)).await.unwrap();

    etcd.kill();
    let mut stale = mirror.stale_since();
    let since = *within("word that it is stale", stale.wait_for(Option::is_some)).await.unwrap();
    assert_eq!(mirror.snapshot().entries.len(), 3, "the last snapshot stands");
    let error = store.put("/app/lost", "x").await.unwrap_err();
    assert!(error.is_transient() && error.to_string().contains(&etcd.endpoint()), "{error}");
    registration.set([("/app/member".to_owned(), "draining".to_owned())]);
    // Longer than the leases live without etcd.
    let outage = tokio::time::Instant::now() - since.unwrap();
    tokio::time::sleep((TTL * 2).saturating_sub(outage)).await;

    etcd.restart().unwrap();
    let other = connect(EtcdOptions::new([etcd.endpoint()])).await;
    other.put("/app/after", "2").await.unwrap();
    let recovered = snapshots.wait_for(|snapshot| {
        let value = |key: &str| snapshot.entries.get(key).map(|entry| entry.value.as_str());
        value("/app/before") == Some("1")
            && value("/app/after") == Some("2")
            && value("/app/member") == Some("draining")
    });
    drop(within("recovery", recovered).await.unwrap());
    within("no longer stale", stale.wait_for(Option::is_none)).await.unwrap();
    // The leader still leads, or knows that it does not: never a live lease without its key.
    let led = store.get(leadership.key()).await.unwrap();
    if led.is_none() {
        within("word of the lost lease", lease.lost().cancelled()).await;
    }
    registration.close().await;
    assert_eq!(store.get("/app/member").await.unwrap(), None);
    mirror.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hung_etcd_is_noticed_by_calls_and_by_silent_watches() {
    let mut etcd = Etcd::start().unwrap();
    let quick = EtcdOptions { timeout: Duration::from_millis(300), ..EtcdOptions::new([etcd.endpoint()]) };
    let store = connect(quick).await;
    let mirror = Mirror::start(Arc::clone(&store), "/app/").await.unwrap();
    etcd.hang().unwrap();
    // Its threads stop one by one, so it may answer once more.
    let failed = async {
        loop {
            if let Err(error) = store.get("/app/key").await {
                return error;
            }
        }
    };
    let error = within("a failed call", failed).await;
    assert!(error.is_transient() && error.to_string().contains("no answer within 300ms"), "{error}");
    let mut stale = mirror.stale_since();
    drop(within("word that it is stale", stale.wait_for(Option::is_some)).await.unwrap());

    etcd.restart().unwrap();
    let patient = connect(EtcdOptions::new([etcd.endpoint()])).await;
    patient.put("/app/key", "x").await.unwrap();
    let mut snapshots = mirror.subscribe();
    drop(within("recovery", snapshots.wait_for(|s| s.entries.len() == 1)).await.unwrap());
}

#[tokio::test]
async fn a_dead_endpoint_among_several_fails_no_call() {
    let etcd = Etcd::start().unwrap();
    for endpoints in [[dead_endpoint(), etcd.endpoint()], [etcd.endpoint(), dead_endpoint()]] {
        let store = connect(EtcdOptions::new(endpoints)).await;
        for n in 0..20 {
            store.put("/app/key", &n.to_string()).await.unwrap();
        }
        let lease = store.grant_lease(TTL).await.unwrap().lease;
        store.keep_alive(lease).await.unwrap();
        assert_eq!(store.get("/app/key").await.unwrap().unwrap().value, "19");
        let mirror = Mirror::start(store, "/app/").await.unwrap();
        assert_eq!(mirror.snapshot().entries.len(), 1);
    }
}

#[tokio::test]
async fn calls_move_on_when_the_endpoint_in_use_dies() {
    // Two etcds that know nothing of each other, so that an answer shows which of them gave it.
    let mut first = Etcd::start().unwrap();
    let mut second = Etcd::start().unwrap();
    let store = connect(EtcdOptions::new([first.endpoint(), second.endpoint()])).await;
    store.put("/app/key", "here").await.unwrap();
    let only_first = connect(EtcdOptions::new([first.endpoint()])).await;
    let used_first = only_first.get("/app/key").await.unwrap().is_some();
    if used_first {
        first.kill();
    } else {
        second.kill();
    }
    assert_eq!(within("failover", store.get("/app/key")).await.unwrap(), None, "answered by the other");
    store.put("/app/key", "there").await.unwrap();
}

#[tokio::test]
async fn connecting_waits_for_an_etcd_that_comes_late() {
    let mut etcd = Etcd::start().unwrap();
    etcd.kill();
    let connecting = EtcdStore::connect(EtcdOptions::new([etcd.endpoint()]));
    let restarting = tokio::task::spawn_blocking(move || etcd.restart().map(|()| etcd));
    let (store, etcd) = within("both", futures::future::join(connecting, restarting)).await;
    store.unwrap().put("/app/key", "x").await.unwrap();
    drop(etcd);
}

#[tokio::test]
async fn an_unreachable_etcd_is_named_with_the_reason() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (dead, silent) = (dead_endpoint(), format!("http://{}", listener.local_addr().unwrap()));
    let options = EtcdOptions {
        timeout: Duration::from_millis(300),
        connect_timeout: Some(Duration::from_millis(500)),
        ..EtcdOptions::new([dead.clone(), silent.clone()])
    };
    let Err(error) = within("giving up", EtcdStore::connect(options)).await else { panic!("connected") };
    assert!(matches!(error, StoreError::Unreachable { .. }), "{error}");
    let text = error.to_string();
    assert!(text.contains(&format!("connect failed at {dead}: ")) && text.contains("refused"), "{text}");
    assert!(text.contains(&format!("connect failed at {silent}: no answer within 300ms")), "{text}");
}
