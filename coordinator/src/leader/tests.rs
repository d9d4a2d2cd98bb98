//! Leaders that die after any of their writes, on a real (embedded) store in paused time.

use std::future::pending;
use std::sync::atomic::{AtomicUsize, Ordering};

use async_trait::async_trait;
use sirocco_store::{EmbeddedStore, Grant, LeaseId, Listing, Mirror, Result, TxnOutcome, WatchStream, to_json};
use sirocco_types::{Epoch, ExpertHoldings, OperationState, Role};
use tokio::task::JoinSet;
use tokio_util::task::TaskTracker;

use super::*;
use crate::testing::{self, Entries};

/// A store whose leader can make only so many writes: the next one is never answered, as if the process had died before it.
struct Mortal {
    store: Arc<dyn Store>,
    writes: AtomicUsize,
    died: CancellationToken,
}

#[async_trait]
impl Store for Mortal {
    async fn get(&self, key: &str) -> Result<Option<Arc<sirocco_store::Entry>>> {
        self.store.get(key).await
    }

    async fn list(&self, prefix: &str) -> Result<Listing> {
        self.store.list(prefix).await
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome> {
        let left = self.writes.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
        if left.is_err() {
            self.died.cancel();
            return pending().await;
        }
        self.store.txn(txn).await
    }

    async fn grant_lease(&self, ttl: Duration) -> Result<Grant> {
        self.store.grant_lease(ttl).await
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<()> {
        self.store.keep_alive(lease).await
    }

    async fn revoke(&self, lease: LeaseId) -> Result<()> {
        self.store.revoke(lease).await
    }

    async fn watch(&self, prefix: &str, from: Revision) -> Result<WatchStream> {
        self.store.watch(prefix, from).await
    }
}

/// A cluster of three expert nodes and a router that do what real ones do, and whoever leads it.
struct Cluster {
    store: Arc<dyn Store>,
    keys: Keys,
    states: watch::Receiver<Arc<ClusterState>>,
    _mirror: Mirror,
    _members: JoinSet<()>,
}

/// A running candidate.
struct Coordinator {
    task: JoinSet<()>,
    commands: mpsc::Sender<Command>,
    died: CancellationToken,
    shutdown: CancellationToken,
    mortal: Arc<Mortal>,
}

impl Cluster {
    async fn start() -> Self {
        let store: Arc<dyn Store> = Arc::new(EmbeddedStore::new());
        let keys = Keys::new("t").unwrap();
        let mut entries = Entries::default();
        for node in ["a", "b", "c"] {
            entries.join(node, 7);
        }
        entries.put("members/router/r", &testing::router("r", None));
        for (key, value) in &entries.0 {
            store.put(&format!("{}{key}", keys.prefix()), value).await.unwrap();
        }
        let mirror = Mirror::start(Arc::clone(&store), keys.prefix()).await.unwrap();
        let states = ClusterState::follow(&mirror, &keys, &TaskTracker::new());
        let mut members = JoinSet::new();
        members.spawn(behave(Arc::clone(&store), keys.clone(), states.clone()));
        Self { store, keys, states, _mirror: mirror, _members: members }
    }

    /// Starts a candidate that can make `writes` writes.
    fn coordinator(&self, id: &str, writes: usize) -> Coordinator {
        let died = CancellationToken::new();
        let mortal =
            Arc::new(Mortal { store: Arc::clone(&self.store), writes: AtomicUsize::new(writes), died: died.clone() });
        let (commands, asked) = mpsc::channel(4);
        let (loads, snapshots) = watch::channel(Arc::default());
        let candidate = Candidate {
            id: NodeId::new(id).unwrap(),
            store: Arc::clone(&mortal) as Arc<dyn Store>,
            keys: self.keys.clone(),
            states: self.states.clone(),
            loads: snapshots,
            commands: asked,
            settle: Duration::ZERO,
            policy: None,
            metrics: crate::metrics::tests::metrics().0,
        };
        let mut task = JoinSet::new();
        let shutdown = CancellationToken::new();
        let leave = shutdown.clone();
        task.spawn(async move {
            candidate.run(leave).await;
            drop(loads);
        });
        Coordinator { task, commands, died, shutdown, mortal }
    }

    async fn wait(&self, condition: impl Fn(&ClusterState) -> bool) {
        self.states.clone().wait_for(|state| condition(state)).await.unwrap();
    }
}

impl Coordinator {
    async fn ask(&self, request: Request) -> std::result::Result<Decision, CommandError> {
        let (answer, answered) = oneshot::channel();
        let _ = self.commands.send(Command { request, by: "me@here".to_owned(), answer }).await;
        answered.await.unwrap_or(Err(CommandError::Deposed))
    }
}

/// Expert nodes hold what they must, the router follows what serves.
async fn behave(store: Arc<dyn Store>, keys: Keys, mut states: watch::Receiver<Arc<ClusterState>>) {
    loop {
        let state = Arc::clone(&states.borrow_and_update());
        for id in state.members(Role::Expert).map(|member| member.id.clone()) {
            let needed = ExpertHoldings::new(state.needed_on(&id), 0);
            if state.holdings(&id) != Some(&needed) {
                store.put(&keys.holdings(&id), &to_json(&needed)).await.unwrap();
            }
        }
        let serving = state.serving().map(|serving| serving.epoch);
        let router = NodeId::new("r").unwrap();
        if state.member(Role::Router, &router).is_some_and(|router| router.serving_epoch != serving) {
            let record = to_json(&testing::router("r", serving.map(|epoch| epoch.0)));
            store.put(&keys.member(Role::Router, &router), &record).await.unwrap();
        }
        if states.changed().await.is_err() {
            return;
        }
    }
}

fn at_rest(state: &ClusterState) -> bool {
    let epoch = |placement: Option<&sirocco_types::Placement>| placement.map(|placement| placement.epoch);
    let running = state.operations().any(|operation| operation.state == OperationState::Running);
    state.serving().is_some() && epoch(state.serving()) == epoch(state.target()) && !running
}

/// A first placement and a drain by a leader that dies after `writes` writes, gone on with by another. Returns how many
/// writes the first leader made.
async fn scenario(writes: usize) -> usize {
    let cluster = Cluster::start().await;
    let b = NodeId::new("b").unwrap();
    let mut first = cluster.coordinator("first", writes);
    let whole = async {
        cluster.wait(at_rest).await;
        // A leader that dies in between cannot answer; what it wrote goes on.
        let _ = first.ask(Request::Drain(b.clone())).await;
        cluster.wait(at_rest).await;
    };
    tokio::select! {
        () = whole => {}
        () = first.died.cancelled() => {}
    }
    let made = writes - first.mortal.writes.load(Ordering::SeqCst);
    first.task.shutdown().await;

    let second = cluster.coordinator("second", usize::MAX);
    cluster.wait(|state| state.leader() == Some("second") && at_rest(state)).await;
    let drained = cluster.states.borrow().cordon(&b).is_some();
    if !drained {
        second.ask(Request::Drain(b.clone())).await.unwrap();
        cluster.wait(at_rest).await;
    }
    let state = Arc::clone(&cluster.states.borrow());
    let serving = state.serving().unwrap();
    assert_eq!(serving.unplaced().count(), 0, "after {writes} writes");
    assert_eq!(serving.experts_on(&b).count(), 0, "after {writes} writes");
    assert!(serving.epoch <= Epoch(3), "after {writes} writes");
    let drains = state.operations().filter(|operation| operation.kind == OperationKind::Drain);
    assert!(drains.into_iter().all(|operation| operation.state == OperationState::Done), "after {writes} writes");
    made
}

#[tokio::test(start_paused = true)]
async fn whichever_write_a_leader_dies_after_the_next_one_goes_on_from_there() {
    const PLENTY: usize = 1000;
    let undisturbed = scenario(PLENTY).await;
    assert!((6..PLENTY).contains(&undisturbed), "{undisturbed} writes");
    for writes in 0..undisturbed {
        scenario(writes).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_deposed_leader_writes_nothing_more() {
    let cluster = Cluster::start().await;
    let first = cluster.coordinator("first", usize::MAX);
    cluster.wait(at_rest).await;
    // Its candidacy is gone, as after a lease that ended while the process stood still.
    let election = cluster.store.list(&cluster.keys.election()).await.unwrap();
    cluster.store.delete(&election.entries[0].key).await.unwrap();
    let _second = cluster.coordinator("second", usize::MAX);
    cluster.wait(|state| state.leader() == Some("second")).await;
    let before = cluster.states.borrow().operations().count();
    let refused = first.ask(Request::Cordon(NodeId::new("a").unwrap())).await;
    assert!(matches!(refused, Err(CommandError::Deposed)), "{refused:?}");
    cluster.wait(|state| state.operations().any(|operation| operation.leader == "second")).await;
    let state = Arc::clone(&cluster.states.borrow());
    assert!(state.operations().skip(before).all(|operation| operation.leader == "second"));
    assert!(state.cordon(&NodeId::new("a").unwrap()).is_none());
}

#[tokio::test(start_paused = true)]
async fn a_candidate_that_leaves_keeps_nobody_waiting_behind_it() {
    let cluster = Cluster::start().await;
    let _leader = cluster.coordinator("first", usize::MAX);
    cluster.wait(at_rest).await;
    let candidates = async || cluster.store.list(&cluster.keys.election()).await.unwrap().entries.len();
    let mut second = cluster.coordinator("second", usize::MAX);
    while candidates().await < 2 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    second.shutdown.cancel();
    second.task.join_next().await.unwrap().unwrap();
    assert_eq!(candidates().await, 1);
}
