//! Stands for election, and while it leads writes what [`next_actions`] says, one step after the other.
//!
//! Every write carries the leadership's fence, so a coordinator that was deposed without noticing writes nothing. After each
//! write it waits until it sees it in its own copy of the state before it decides again.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use sirocco_store::{
    ClusterState, Keys, LEASE_TTL, Leadership, Lease, MAX_TXN_OPS, Op, Revision, Store, StoreError, Txn, campaign,
    to_json,
};
use sirocco_types::{EpochRef, NodeId, PlacementKind, Role};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::reconcile::{Action, layers, next_actions};

/// Wait before a step that failed is tried again.
const RETRY: Duration = Duration::from_millis(500);

/// A candidate, and the leader once elected.
pub(crate) struct Candidate {
    pub(crate) id: NodeId,
    pub(crate) store: Arc<dyn Store>,
    pub(crate) keys: Keys,
    pub(crate) states: watch::Receiver<Arc<ClusterState>>,
    /// How long the set of expert nodes must have stayed the same before a new placement is made for it.
    pub(crate) settle: Duration,
}

/// Why a leader stopped leading.
enum Deposed {
    /// It was asked to stop.
    Shutdown,
    /// Its lease is gone, or another leads.
    Lost,
}

impl Candidate {
    /// Stands for election again and again until `shutdown`.
    pub(crate) async fn run(mut self, shutdown: CancellationToken) {
        while !shutdown.is_cancelled() {
            let term = async {
                let lease = Lease::grant(&self.store, LEASE_TTL).await?;
                let prefix = self.keys.election();
                let leadership = campaign(&self.store, &prefix, self.id.as_str(), &lease).await?;
                Ok::<_, StoreError>((lease, leadership))
            };
            let elected = tokio::select! {
                elected = term => elected,
                () = shutdown.cancelled() => return,
            };
            match elected {
                Ok((lease, leadership)) => {
                    tracing::info!(id = %self.id, "leads the cluster");
                    let end = self.lead(&lease, &leadership, &shutdown).await;
                    let resigned = lease.revoke(&self.store).await;
                    if let (Deposed::Shutdown, Err(error)) = (end, resigned) {
                        tracing::warn!(%error, "could not resign; the lease will expire");
                    }
                    tracing::info!(id = %self.id, "no longer leads");
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot stand for election, trying again");
                    tokio::select! {
                        () = shutdown.cancelled() => return,
                        () = tokio::time::sleep(RETRY) => {}
                    }
                }
            }
        }
    }

    async fn lead(&mut self, lease: &Lease, leadership: &Leadership, shutdown: &CancellationToken) -> Deposed {
        let mut settling = Settling::new(self.settle);
        loop {
            let state = Arc::clone(&self.states.borrow_and_update());
            let step = self.step(&state, leadership, &mut settling);
            let wait = tokio::select! {
                wait = step => wait,
                () = lease.lost().cancelled() => return Deposed::Lost,
                () = shutdown.cancelled() => return Deposed::Shutdown,
            };
            let wait = match wait {
                Ok(Step::Wrote) => continue,
                Ok(Step::Fenced) => return Deposed::Lost,
                Ok(Step::Wait(wait)) => wait,
                Err(error) => {
                    tracing::warn!(%error, "a step of the leader failed, trying again");
                    Some(RETRY)
                }
            };
            tokio::select! {
                changed = self.states.changed() => if changed.is_err() { return Deposed::Lost },
                () = tokio::time::sleep(wait.unwrap_or_default()), if wait.is_some() => {}
                () = lease.lost().cancelled() => return Deposed::Lost,
                () = shutdown.cancelled() => return Deposed::Shutdown,
            }
        }
    }

    /// Writes the next actions, if there are any.
    async fn step(
        &self,
        state: &ClusterState,
        leadership: &Leadership,
        settling: &mut Settling,
    ) -> Result<Step, StoreError> {
        let unsettled = settling.left(state);
        let mut wrote = None;
        for action in next_actions(state) {
            if matches!(action, Action::PublishTarget(_)) && unsettled.is_some() {
                return Ok(Step::Wait(unsettled));
            }
            match self.write(action, leadership).await? {
                Some(revision) => wrote = Some(revision),
                None => return Ok(Step::Fenced),
            }
        }
        let Some(revision) = wrote else { return Ok(Step::Wait(None)) };
        let seen = self.states.clone().wait_for(|state| state.revision() >= revision).await.is_ok();
        Ok(if seen { Step::Wrote } else { Step::Fenced })
    }

    /// Writes one action, fenced. Returns the revision, or none when another leads.
    async fn write(&self, action: Action, leadership: &Leadership) -> Result<Option<Revision>, StoreError> {
        let keys = &self.keys;
        let put = |key: String, value: String| Op::Put { key, value, lease: None };
        let ops = match action {
            Action::AdoptModel(model) => {
                tracing::info!(model = model.name, fingerprint = model.fingerprint.short(), "the cluster serves");
                vec![put(keys.model(), to_json(&model))]
            }
            Action::PublishTarget(placement) => {
                tracing::info!(epoch = %placement.epoch, unplaced = placement.unplaced().count(), "new target placement");
                let layers = layers(&placement).map(|(id, layer)| put(keys.layer(placement.epoch, id), to_json(layer)));
                let target = EpochRef { epoch: placement.epoch };
                layers.chain([put(keys.placement(PlacementKind::Target), to_json(&target))]).collect()
            }
            Action::FlipServing(epoch) => {
                tracing::info!(%epoch, "placement serves");
                vec![put(keys.placement(PlacementKind::Serving), to_json(&EpochRef { epoch }))]
            }
            Action::Forget(epoch) => vec![Op::DeletePrefix(keys.epoch(epoch))],
        };
        let mut revision = None;
        // The key that makes the others count is the last of them, so a placement cut in two is never half in force.
        for ops in ops.chunks(MAX_TXN_OPS - 1) {
            let txn = Txn { compares: vec![leadership.fence()], ops: ops.to_vec() };
            let outcome = self.store.txn(txn).await?;
            if !outcome.succeeded {
                return Ok(None);
            }
            revision = Some(outcome.revision);
        }
        Ok(revision)
    }
}

/// What came of a step.
enum Step {
    /// Something was written and is visible; there may be more.
    Wrote,
    /// Nothing to do until the state changes, or for this long.
    Wait(Option<Duration>),
    /// Another leads.
    Fenced,
}

/// Waits for the set of expert nodes to stay the same for a while, so that nodes that start together are placed together.
#[derive(Debug)]
struct Settling {
    quiet: Duration,
    nodes: BTreeSet<NodeId>,
    since: Instant,
}

impl Settling {
    fn new(quiet: Duration) -> Self {
        Self { quiet, nodes: BTreeSet::new(), since: Instant::now() }
    }

    /// How much longer to wait; none when settled.
    fn left(&mut self, state: &ClusterState) -> Option<Duration> {
        let nodes: BTreeSet<NodeId> = state.members(Role::Expert).map(|member| member.id.clone()).collect();
        if nodes != self.nodes {
            (self.nodes, self.since) = (nodes, Instant::now());
        }
        self.quiet.checked_sub(self.since.elapsed()).filter(|left| !left.is_zero())
    }
}
