//! The control plane at work: nodes join, leave and are drained, experts move, leaders die, and clients notice nothing.

mod clients;
mod deposed;
mod faults;
mod gpu;
mod measure;
mod members;
mod nodes;
mod operations;
pub(crate) mod operator;
mod skew;
mod store;
pub(crate) mod succession;

use std::time::Duration;

use sirocco_testkit::cluster::{Cluster, Setup};
use sirocco_testkit::{PATIENCE, repository};

/// Time between two looks at a cluster.
pub(crate) const POLL: Duration = Duration::from_millis(50);

/// How many processes of each kind.
#[derive(Clone, Copy)]
pub(crate) struct Size {
    pub(crate) coordinators: usize,
    pub(crate) routers: usize,
    pub(crate) experts: usize,
}

/// A cluster of the bundled model on the etcd at `etcd`, each node with one compute thread.
fn demo_cluster(etcd: &str, name: &str, size: Size, envs: &[(&str, &str)]) -> Cluster {
    let demo = repository("models/demo");
    let envs = [&[("SIROCCO_THREADS", "1")], envs].concat();
    let setup = Setup {
        name,
        router_model: &demo,
        models: &vec![demo.clone(); size.experts],
        coordinators: size.coordinators,
        routers: size.routers,
        envs: &envs,
    };
    Cluster::start_with(etcd, &setup).unwrap()
}

/// Waits, with patience, until `condition` gives something.
pub(crate) async fn until<T>(what: &str, condition: impl AsyncFnMut() -> Option<T>) -> T {
    until_within(PATIENCE, what, condition).await
}

/// As [`until`], for as long as `patience`.
pub(crate) async fn until_within<T>(
    patience: Duration,
    what: &str,
    mut condition: impl AsyncFnMut() -> Option<T>,
) -> T {
    let wait = async {
        loop {
            if let Some(found) = condition().await {
                return found;
            }
            tokio::time::sleep(POLL).await;
        }
    };
    let waited = tokio::time::timeout(patience, wait).await;
    waited.unwrap_or_else(|_| panic!("waited {patience:?} for {what}"))
}
