//! Makes what the node holds what the placement gives it: loads first, says what it holds, drops last.
//!
//! It works from the cluster's state alone and looks at it anew after each expert, so a placement that changes in the middle is
//! followed at once. An expert is dropped only when neither target nor serving placement nor any live router's wants it here.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use sirocco_compute::ExpertBackend;
use sirocco_model::Checkpoint;
use sirocco_process::http::Health;
use sirocco_store::{ClusterState, Keys, Registration, to_json};
use sirocco_types::{ExpertHoldings, ExpertKey, NodeId, RefusedExpert};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::batch::Held;
use crate::metrics::Metrics;
use crate::progress::Progress;

/// Wait before an expert that could not be loaded is tried again.
const RETRY: Duration = Duration::from_secs(30);

pub(crate) struct Loader {
    pub(crate) id: NodeId,
    pub(crate) keys: Keys,
    pub(crate) checkpoint: Arc<Checkpoint>,
    /// Keeps the experts.
    pub(crate) backend: Arc<dyn ExpertBackend>,
    pub(crate) held: Arc<ArcSwap<Held>>,
    pub(crate) registration: Arc<Registration>,
    pub(crate) health: Health,
    pub(crate) metrics: Arc<Metrics>,
    /// Experts that are loaded at once by a node that serves none, each by a thread. One that serves loads one at a time.
    pub(crate) at_once: usize,
    /// Whether to show progress on a terminal.
    pub(crate) progress: bool,
}

impl Loader {
    /// Follows `states` until `shutdown`.
    pub(crate) async fn run(self, mut states: watch::Receiver<Arc<ClusterState>>, shutdown: CancellationToken) {
        let (mut refused, mut retry) = (BTreeMap::new(), None);
        loop {
            let state = Arc::clone(&states.borrow_and_update());
            let wanted = state.needed_on(&self.id);
            let complete = tokio::select! {
                complete = self.load(&state, &wanted, &mut refused, &mut states) => complete,
                () = shutdown.cancelled() => return,
            };
            if !complete {
                continue;
            }
            // Said before it is done, so that nobody counts on what is about to go.
            self.announce(&wanted, &refused);
            if state.target().is_some() {
                self.drop_all_but(&wanted);
            }
            if !refused.is_empty() {
                retry.get_or_insert_with(|| tokio::time::Instant::now() + RETRY);
            }
            let due = retry.unwrap_or_else(tokio::time::Instant::now);
            tokio::select! {
                changed = states.changed() => if changed.is_err() { return },
                () = tokio::time::sleep_until(due), if retry.is_some() => {
                    refused.clear();
                    retry = None;
                }
                () = shutdown.cancelled() => return,
            }
        }
    }

    /// Loads what is `wanted` in `state` and not held. Returns false when something else is wanted before all was done.
    ///
    /// A node that serves its part of the serving placement stays ready meanwhile. What was refused stays so when nobody wants it
    /// any more, so that the node is not given something else at once that it cannot read either.
    async fn load(
        &self,
        state: &ClusterState,
        wanted: &BTreeSet<ExpertKey>,
        refused: &mut BTreeMap<ExpertKey, String>,
        states: &mut watch::Receiver<Arc<ClusterState>>,
    ) -> bool {
        let held = self.held.load();
        let missing: Vec<ExpertKey> =
            wanted.iter().copied().filter(|key| !held.contains_key(key) && !refused.contains_key(key)).collect();
        if missing.is_empty() {
            return true;
        }
        let serves = serves(state, &self.id, &held);
        let bytes = self.checkpoint.spec().expert_bytes();
        let mut progress = Progress::start(self.progress, missing.len(), bytes * missing.len() as u64);
        let mut waiting = missing.iter().copied();
        let mut loads = JoinSet::new();
        let mut changed = false;
        for loaded in 1.. {
            while !changed && loads.len() < if serves { 1 } else { self.at_once } {
                let Some(key) = waiting.next() else { break };
                let (checkpoint, backend) = (Arc::clone(&self.checkpoint), Arc::clone(&self.backend));
                loads.spawn_blocking(move || {
                    let began = Instant::now();
                    let load = || checkpoint.load_expert_into(key, backend.packer()?);
                    (key, load(), began.elapsed())
                });
            }
            if !serves && !loads.is_empty() {
                self.health.not_ready(format!("loading expert {loaded} of {}", missing.len()));
            }
            match loads.join_next().await {
                None => break,
                Some(Ok((key, Ok(weights), took))) => {
                    self.metrics.loaded(took);
                    let weights = Arc::new(weights);
                    self.held.rcu(|held| {
                        let mut held = Held::clone(held);
                        held.insert(key, Arc::clone(&weights));
                        held
                    });
                }
                Some(Ok((key, Err(error), _))) => {
                    tracing::error!(%key, %error, "an expert cannot be loaded");
                    self.metrics.not_loaded();
                    refused.insert(key, error.to_string());
                }
                Some(Err(_)) => return false,
            }
            progress.step(bytes);
            // The state changes with every report of load, the placement seldom.
            let news = waiting.len() > 0 && states.has_changed().unwrap_or(false);
            changed |= news && states.borrow_and_update().needed_on(&self.id) != *wanted;
        }
        progress.finish();
        !changed
    }

    fn drop_all_but(&self, wanted: &BTreeSet<ExpertKey>) {
        let surplus = self.held.load().keys().filter(|key| !wanted.contains(key)).count();
        if surplus > 0 {
            self.held.rcu(|held| {
                let kept = held.iter().filter(|(key, _)| wanted.contains(key));
                kept.map(|(key, weights)| (*key, Arc::clone(weights))).collect::<Held>()
            });
            tracing::info!(experts = surplus, "experts dropped");
        }
    }

    /// Says in the store and in the health endpoints what is held.
    fn announce(&self, wanted: &BTreeSet<ExpertKey>, refused: &BTreeMap<ExpertKey, String>) {
        let held = self.held.load();
        let kept = || held.iter().filter(|(key, _)| wanted.contains(key));
        let bytes = kept().map(|(_, weights)| weights.bytes() as u64).sum();
        let mut holdings = ExpertHoldings::new(kept().map(|(key, _)| *key), bytes);
        holdings.refused =
            refused.iter().map(|(key, reason)| RefusedExpert { key: *key, reason: reason.clone() }).collect();
        self.registration.set([(self.keys.holdings(&self.id), to_json(&holdings))]);
        match (wanted.is_empty(), refused.len()) {
            (true, _) => self.health.not_ready("no experts are placed here"),
            (false, 0) => self.health.ready(),
            (false, count) => self.health.not_ready(format!("{count} experts cannot be loaded")),
        }
    }
}

/// Whether the serving placement has experts on node `id` and all of them are held.
fn serves(state: &ClusterState, id: &NodeId, held: &Held) -> bool {
    let mut served = state.serving().into_iter().flat_map(|placement| placement.experts_on(id)).peekable();
    served.peek().is_some() && served.all(|key| held.contains_key(&key))
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::{Condvar, Mutex};

    use sirocco_compute::{CpuBackend, Pool};
    use sirocco_process::metrics::Page;
    use sirocco_store::{EmbeddedStore, LEASE_TTL, Mirror, Store};
    use sirocco_types::{Epoch, EpochRef, ExpertDtype, ExpertId, LayerId, MemberState, PlacementKind};
    use tokio_util::task::TaskTracker;

    use super::*;
    use crate::testing::{self, Cluster, Odd, Way, id};

    /// Node `a` serves expert 0 and is to have expert 1 too once epoch 2 is the target.
    const CLUSTER: Cluster = Cluster {
        experts: &[("a", MemberState::Ready, Cluster::MODEL), ("b", MemberState::Ready, Cluster::MODEL)],
        routers: &[],
        leads: true,
        epochs: &[&["a", "b"], &["a", "a"], &["b", "b"]],
        target: 1,
        serving: 1,
    };

    fn keys(experts: &[u32]) -> BTreeSet<ExpertKey> {
        experts.iter().map(|expert| ExpertKey { layer: LayerId(0), expert: ExpertId(*expert) }).collect()
    }

    #[test]
    fn a_node_holds_what_target_serving_placement_or_a_router_want_here() {
        for (routers, target, serving, expected) in [
            (&[][..], 1, 1, &[0][..]),
            (&[], 2, 1, &[0, 1]),
            (&[], 3, 2, &[0, 1]),
            (&[1], 3, 3, &[0]),
            (&[3, 2], 3, 3, &[0, 1]),
            (&[3], 3, 3, &[]),
            (&[0], 0, 0, &[]),
        ] {
            let state = Cluster { routers, target, serving, ..CLUSTER }.state();
            assert_eq!(state.needed_on(&id("a")), keys(expected), "target {target}, serving {serving}, {routers:?}");
        }
    }

    /// A loader of node `a` at work in `cluster`, and all that it lives in.
    struct Running {
        keys: Keys,
        store: Arc<dyn Store>,
        mirror: Mirror,
        states: watch::Receiver<Arc<ClusterState>>,
        health: Health,
        held: Arc<ArcSwap<Held>>,
        tasks: TaskTracker,
        shutdown: CancellationToken,
    }

    impl Running {
        /// No expert is loaded before so many are `together`.
        async fn start(cluster: Cluster, together: usize) -> Self {
            let cluster_keys = Keys::new("demo").unwrap();
            let store: Arc<dyn Store> = Arc::new(EmbeddedStore::new());
            for (key, value) in cluster.entries(&cluster_keys) {
                store.put(&key, &value).await.unwrap();
            }
            let mirror = Mirror::start(Arc::clone(&store), cluster_keys.prefix()).await.unwrap();
            let (tasks, shutdown) = (TaskTracker::new(), CancellationToken::new());
            let states = ClusterState::follow(&mirror, &cluster_keys, &tasks);
            let registration = Registration::open(Arc::clone(&store), "claim", "", LEASE_TTL).await.unwrap();
            let health = Health::new("expert-node", "a");
            let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo");
            let checkpoint = Checkpoint::open(&demo).unwrap();
            let backend = CpuBackend {
                pool: Pool::new(1).unwrap(),
                dtype: ExpertDtype::Bf16,
                hidden_size: checkpoint.spec().hidden_size,
                intermediate_size: checkpoint.spec().intermediate_size,
            };
            let loader = Loader {
                id: id("a"),
                keys: cluster_keys.clone(),
                checkpoint: Arc::new(checkpoint),
                backend: Arc::new(Odd(backend, Way::Together(together, Mutex::default(), Condvar::default()))),
                held: Arc::default(),
                registration: Arc::new(registration),
                health: health.clone(),
                metrics: Arc::new(Metrics::new(&Page::new(&health), &testing::spec())),
                at_once: 2,
                progress: false,
            };
            let held = Arc::clone(&loader.held);
            tasks.spawn(loader.run(states.clone(), shutdown.clone()));
            Self { keys: cluster_keys, store, mirror, states, health, held, tasks, shutdown }
        }

        fn holds(&self, experts: &[u32]) -> bool {
            self.held.load().keys().copied().collect::<BTreeSet<_>>() == keys(experts)
        }

        async fn stop(self) {
            self.shutdown.cancel();
            self.mirror.close().await;
            self.tasks.close();
            self.tasks.wait().await;
        }
    }

    #[tokio::test]
    async fn a_node_that_serves_nothing_loads_as_many_experts_at_once_as_it_has_threads() {
        let running = Running::start(Cluster { target: 2, serving: 0, ..CLUSTER }, 2).await;
        running.health.until_ready().await;
        assert!(running.holds(&[0, 1]));
        running.stop().await;
    }

    #[tokio::test]
    async fn a_node_that_serves_stays_ready_while_it_loads_more() {
        let mut running = Running::start(CLUSTER, 1).await;
        running.health.until_ready().await;
        assert!(running.holds(&[0]));

        let mut obstacle = running.health.subscribe();
        obstacle.mark_unchanged();
        let target = EpochRef { epoch: Epoch(2), leader: "c".into() };
        running.store.put(&running.keys.placement(PlacementKind::Target), &to_json(&target)).await.unwrap();
        let complete = |state: &Arc<ClusterState>| state.holdings(&id("a")).is_some_and(|held| held.count() == 2);
        running.states.wait_for(complete).await.unwrap();
        assert!(!obstacle.has_changed().unwrap(), "it was not ready for a while");
        running.stop().await;
    }
}
