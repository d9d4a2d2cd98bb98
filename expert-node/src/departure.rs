//! How a node that is asked to stop leaves: it says that it drains, goes on serving, and leaves once nothing depends on it.
//!
//! The coordinator places no experts on a draining node, so they are loaded elsewhere and routers follow there meanwhile.
//! It decides from the cluster's state alone and never waits longer than its patience.

use std::sync::Arc;
use std::time::Duration;

use sirocco_store::{ClusterState, Registration, to_json};
use sirocco_types::{Member, MemberState, NodeId, Role};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// A departure to come.
pub(crate) struct Departure {
    /// This node's record and its key.
    pub(crate) member: (String, Member),
    pub(crate) registration: Arc<Registration>,
    /// Longest wait for the experts to be served elsewhere.
    pub(crate) patience: Duration,
}

impl Departure {
    /// Waits for `shutdown`, then until the node may leave, and cancels `leave`. Ends early when `leave` is cancelled by others.
    pub(crate) async fn run(
        self,
        mut states: watch::Receiver<Arc<ClusterState>>,
        shutdown: CancellationToken,
        leave: CancellationToken,
    ) {
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = leave.cancelled() => return,
        }
        let (key, mut member) = self.member;
        member.state = MemberState::Draining;
        self.registration.set([(key, to_json(&member))]);
        let free = async {
            loop {
                if let Some(reason) = may_leave(&states.borrow_and_update(), &member.id) {
                    return reason;
                }
                if states.changed().await.is_err() {
                    return "the store is not followed any more";
                }
            }
        };
        let waited = tokio::select! {
            waited = tokio::time::timeout(self.patience, free) => waited,
            () = leave.cancelled() => return,
        };
        if let Ok(reason) = waited {
            tracing::info!(reason, "leaves");
        } else {
            let drain_s = self.patience.as_secs();
            tracing::warn!(
                drain_s,
                "leaves though its experts are not served elsewhere yet; requests wait until they are"
            );
        }
        leave.cancel();
    }
}

/// Why the draining node `id` may leave now; none while something depends on it.
fn may_leave(state: &ClusterState, id: &NodeId) -> Option<&'static str> {
    let takes_over = |member: &Member| {
        member.id != *id
            && member.state != MemberState::Draining
            && member.model.as_ref().zip(state.model()).is_some_and(|(theirs, served)| theirs.has_experts_of(served))
    };
    if state.needed_on(id).is_empty() {
        Some("no expert is served or loaded here")
    } else if state.members(Role::Router).next().is_none() {
        Some("no router is left")
    } else if state.leader().is_none() {
        Some("no coordinator leads, so nobody would place its experts elsewhere")
    } else if !state.members(Role::Expert).any(takes_over) {
        Some("no other expert node stays")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use sirocco_store::{EmbeddedStore, Keys, LEASE_TTL, Mirror, Store};
    use sirocco_types::{Epoch, EpochRef, PlacementKind};
    use tokio_util::task::TaskTracker;

    use super::*;
    use crate::testing::{Cluster, OTHER_MODEL, id};

    /// Node `a` has asked to leave, `b` stays; `a` has an expert of epoch 1, and of epoch 2 no more.
    const CLUSTER: Cluster = Cluster {
        experts: &[("a", MemberState::Draining, Cluster::MODEL), ("b", MemberState::Ready, Cluster::MODEL)],
        routers: &[1],
        leads: true,
        epochs: &[&["a", "b"], &["b", "b"]],
        target: 2,
        serving: 1,
    };

    #[test]
    fn a_node_leaves_when_nothing_depends_on_it_or_waiting_cannot_help() {
        use MemberState::{Draining, Ready};
        const MODEL: u8 = Cluster::MODEL;
        let cases = [
            ("its experts are served", CLUSTER, None),
            ("a router still goes by its epoch", Cluster { serving: 2, ..CLUSTER }, None),
            ("one of two routers does", Cluster { serving: 2, routers: &[2, 1], ..CLUSTER }, None),
            ("its experts are loaded to be served", Cluster { target: 1, serving: 2, routers: &[2], ..CLUSTER }, None),
            ("all have moved", Cluster { serving: 2, routers: &[2, 2], ..CLUSTER }, Some("no expert is served")),
            (
                "a router without an epoch",
                Cluster { serving: 2, routers: &[0], ..CLUSTER },
                Some("no expert is served"),
            ),
            (
                "no placement yet",
                Cluster { routers: &[0], target: 0, serving: 0, ..CLUSTER },
                Some("no expert is served"),
            ),
            ("nobody asks", Cluster { routers: &[], ..CLUSTER }, Some("no router")),
            ("nobody would place", Cluster { leads: false, ..CLUSTER }, Some("no coordinator")),
            ("alone", Cluster { experts: &[("a", Draining, MODEL)], ..CLUSTER }, Some("no other expert node")),
            (
                "all leave",
                Cluster { experts: &[("a", Draining, MODEL), ("b", Draining, MODEL)], ..CLUSTER },
                Some("no other expert node"),
            ),
            (
                "the other reads another checkpoint",
                Cluster { experts: &[("a", Draining, MODEL), ("b", Ready, OTHER_MODEL)], ..CLUSTER },
                Some("no other expert node"),
            ),
        ];
        for (claim, cluster, expected) in cases {
            let reason = may_leave(&cluster.state(), &id("a"));
            let fits = match (reason, expected) {
                (Some(reason), Some(expected)) => reason.starts_with(expected),
                (reason, expected) => reason == expected,
            };
            assert!(fits, "{claim}: {reason:?}, expected {expected:?}");
        }
    }

    #[tokio::test]
    async fn a_node_says_that_it_drains_and_stays_until_its_experts_are_served_elsewhere() {
        let keys = Keys::new("demo").unwrap();
        let store: Arc<dyn Store> = Arc::new(EmbeddedStore::new());
        let (key, mut member) = (keys.member(Role::Expert, &id("a")), Cluster::expert("a", Cluster::MODEL));
        member.state = MemberState::Ready;
        for (key, value) in CLUSTER.entries(&keys).into_iter().filter(|(entry, _)| *entry != key) {
            store.put(&key, &value).await.unwrap();
        }
        let registration = Registration::open(Arc::clone(&store), &key, &to_json(&member), LEASE_TTL).await.unwrap();
        let mirror = Mirror::start(Arc::clone(&store), keys.prefix()).await.unwrap();
        let tasks = TaskTracker::new();
        let mut states = ClusterState::follow(&mirror, &keys, &tasks);
        let (shutdown, leave) = (CancellationToken::new(), CancellationToken::new());
        let patience = Duration::from_mins(10);
        let departure = Departure { member: (key, member), registration: Arc::new(registration), patience };
        tasks.spawn(departure.run(states.clone(), shutdown.clone(), leave.clone()));

        shutdown.cancel();
        let draining = |state: &Arc<ClusterState>| {
            state.member(Role::Expert, &id("a")).is_some_and(|member| member.state == MemberState::Draining)
        };
        states.wait_for(draining).await.unwrap();
        assert!(!leave.is_cancelled());
        store
            .put(&keys.placement(PlacementKind::Serving), &to_json(&EpochRef { epoch: Epoch(2), leader: "c".into() }))
            .await
            .unwrap();
        states.wait_for(|state| state.serving().is_some_and(|serving| serving.epoch == Epoch(2))).await.unwrap();
        assert!(!leave.is_cancelled(), "a router still goes by the first epoch");
        store.put(&keys.member(Role::Router, &id("router-0")), &to_json(&Cluster::router(0, 2))).await.unwrap();
        leave.cancelled().await;
        mirror.close().await;
        tasks.close();
        tasks.wait().await;
    }

    #[tokio::test]
    async fn a_node_whose_patience_is_at_its_end_leaves_all_the_same() {
        let store: Arc<dyn Store> = Arc::new(EmbeddedStore::new());
        let registration = Arc::new(Registration::open(store, "claim", "", LEASE_TTL).await.unwrap());
        let member = ("claim".to_owned(), Cluster::expert("a", Cluster::MODEL));
        let (shutdown, leave) = (CancellationToken::new(), CancellationToken::new());
        let states = watch::Sender::new(Arc::new(CLUSTER.state()));
        shutdown.cancel();
        let departure = Departure { member, registration, patience: Duration::ZERO };
        departure.run(states.subscribe(), shutdown, leave.clone()).await;
        assert!(leave.is_cancelled());
    }
}
