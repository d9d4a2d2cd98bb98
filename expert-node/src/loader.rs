//! Makes what the node holds what the placement gives it: loads first, says what it holds, drops last.
//!
//! It works from the cluster's state alone and looks at it anew after each expert, so a placement that changes in the middle is
//! followed at once. An expert is dropped only when neither target nor serving placement nor any live router's wants it here.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use sirocco_model::Checkpoint;
use sirocco_process::http::Health;
use sirocco_store::{ClusterState, Keys, Registration, to_json};
use sirocco_types::{ExpertHoldings, ExpertKey, NodeId, RefusedExpert, Role};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::batch::Held;
use crate::progress::Progress;

/// Wait before an expert that could not be loaded is tried again.
const RETRY: Duration = Duration::from_secs(30);

pub(crate) struct Loader {
    pub(crate) id: NodeId,
    pub(crate) keys: Keys,
    pub(crate) checkpoint: Arc<Checkpoint>,
    pub(crate) held: Arc<ArcSwap<Held>>,
    pub(crate) registration: Arc<Registration>,
    pub(crate) health: Health,
    /// Whether to show progress on a terminal.
    pub(crate) progress: bool,
}

impl Loader {
    /// Follows `states` until `shutdown`.
    pub(crate) async fn run(self, mut states: watch::Receiver<Arc<ClusterState>>, shutdown: CancellationToken) {
        let mut refused = BTreeMap::new();
        loop {
            let state = Arc::clone(&states.borrow_and_update());
            let wanted = wanted(&state, &self.id);
            let complete = tokio::select! {
                complete = self.load(&wanted, &mut refused, &mut states) => complete,
                () = shutdown.cancelled() => return,
            };
            if !complete {
                continue;
            }
            if state.target().is_some() {
                self.drop_all_but(&wanted);
            }
            self.announce(&wanted, &refused);
            tokio::select! {
                changed = states.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(RETRY), if !refused.is_empty() => refused.clear(),
                () = shutdown.cancelled() => return,
            }
        }
    }

    /// Loads what is wanted and not held. Returns false when the cluster's state changed before all was done.
    async fn load(
        &self,
        wanted: &BTreeSet<ExpertKey>,
        refused: &mut BTreeMap<ExpertKey, String>,
        states: &mut watch::Receiver<Arc<ClusterState>>,
    ) -> bool {
        refused.retain(|key, _| wanted.contains(key));
        let held = self.held.load();
        let missing: Vec<ExpertKey> =
            wanted.iter().copied().filter(|key| !held.contains_key(key) && !refused.contains_key(key)).collect();
        if missing.is_empty() {
            return true;
        }
        let bytes = self.checkpoint.spec().expert_bytes();
        let mut progress = Progress::start(self.progress, missing.len(), bytes * missing.len() as u64);
        for (index, key) in missing.iter().copied().enumerate() {
            self.health.not_ready(format!("loading expert {} of {}", index + 1, missing.len()));
            let checkpoint = Arc::clone(&self.checkpoint);
            match tokio::task::spawn_blocking(move || checkpoint.load_expert(key)).await {
                Ok(Ok(weights)) => {
                    let weights = Arc::new(weights);
                    self.held.rcu(|held| {
                        let mut held = Held::clone(held);
                        held.insert(key, Arc::clone(&weights));
                        held
                    });
                }
                Ok(Err(error)) => {
                    tracing::error!(%key, %error, "an expert cannot be loaded");
                    refused.insert(key, error.to_string());
                }
                Err(_) => return false,
            }
            progress.step(bytes);
            if index + 1 < missing.len() && states.has_changed().unwrap_or(false) {
                progress.finish();
                return false;
            }
        }
        progress.finish();
        true
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
        let bytes = held.values().map(|weights| weights.bytes() as u64).sum();
        let mut holdings = ExpertHoldings::new(held.keys().copied(), bytes);
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

/// What this node must hold: its part of the target, of the serving placement, and of what live routers still go by.
fn wanted(state: &ClusterState, id: &NodeId) -> BTreeSet<ExpertKey> {
    let followed = state.members(Role::Router).filter_map(|router| state.epoch(router.serving_epoch?));
    let placements = state.target().into_iter().chain(state.serving()).chain(followed);
    placements.flat_map(|placement| placement.experts_on(id)).collect()
}
