//! A store of either kind with a prefix of its own.

use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use sirocco_store::{EmbeddedStore, EtcdOptions, EtcdStore, Mirror, Snapshot, Store, WatchBatch, WatchStream};
use sirocco_testkit::etcd::Etcd;

/// The shortest time a lease may have.
pub(crate) const TTL: Duration = Duration::from_secs(1);
/// How long any condition may take to come true.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
const HISTORY: usize = 1000;

#[derive(Clone, Copy, Debug)]
pub(crate) enum Kind {
    Embedded,
    Etcd,
}

pub(crate) struct Fixture {
    pub(crate) store: Arc<dyn Store>,
    prefix: String,
    etcd: Option<Arc<Etcd>>,
}

impl Fixture {
    /// A prefix of its own; etcd may be shared with other claims that run now.
    pub(crate) async fn shared(kind: Kind) -> Self {
        static RUNNING: Mutex<Weak<Etcd>> = Mutex::new(Weak::new());
        Self::of(kind, || {
            let mut running = RUNNING.lock().unwrap();
            running.upgrade().unwrap_or_else(|| {
                let etcd = Arc::new(Etcd::start().unwrap());
                *running = Arc::downgrade(&etcd);
                etcd
            })
        })
        .await
    }

    /// A store of its own, for claims whose doings others would notice.
    pub(crate) async fn alone(kind: Kind) -> Self {
        Self::of(kind, || Arc::new(Etcd::start().unwrap())).await
    }

    async fn of(kind: Kind, etcd: impl FnOnce() -> Arc<Etcd>) -> Self {
        static PREFIXES: AtomicUsize = AtomicUsize::new(0);
        let prefix = format!("/test/{}/", PREFIXES.fetch_add(1, Ordering::Relaxed));
        match kind {
            Kind::Embedded => Self { store: Arc::new(EmbeddedStore::with_history(HISTORY)), prefix, etcd: None },
            Kind::Etcd => {
                let etcd = etcd();
                let store = within("connect", EtcdStore::connect(EtcdOptions::new([etcd.endpoint()]))).await.unwrap();
                Self { store, prefix, etcd: Some(etcd) }
            }
        }
    }

    pub(crate) fn key(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    pub(crate) async fn mirror(&self) -> Mirror {
        Mirror::start(Arc::clone(&self.store), &self.prefix).await.unwrap()
    }

    /// Makes the store forget every change made so far.
    pub(crate) async fn forget_history(&self) {
        let last = self.store.put("/filler", "last").await.unwrap();
        match &self.etcd {
            Some(etcd) => {
                let mut client = etcd_client::Client::connect([etcd.endpoint()], None).await.unwrap();
                client.compact(last.0.cast_signed(), None).await.unwrap();
            }
            None => {
                for n in 0..HISTORY {
                    self.store.put("/filler", &n.to_string()).await.unwrap();
                }
            }
        }
    }
}

/// Waits for `future`, but not forever.
pub(crate) async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    let waited = tokio::time::timeout(PATIENCE, future).await;
    waited.unwrap_or_else(|_| panic!("{what}: not within {PATIENCE:?}"))
}

/// Waits until a snapshot of `mirror` is as wanted.
pub(crate) async fn until(what: &str, mirror: &Mirror, wanted: impl Fn(&Snapshot) -> bool) -> Arc<Snapshot> {
    let mut snapshots = mirror.subscribe();
    Arc::clone(&*within(what, snapshots.wait_for(|snapshot| wanted(snapshot))).await.unwrap())
}

pub(crate) async fn next(changes: &mut WatchStream) -> sirocco_store::Result<WatchBatch> {
    let next = std::future::poll_fn(|context| futures::Stream::poll_next(Pin::new(&mut *changes), context));
    within("the next change", next).await.expect("a watch ends only with an error")
}
