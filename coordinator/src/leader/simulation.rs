//! Coordinators, expert nodes and a router around one store in virtual time, each behind a line of its own that is slow, breaks
//! off, and loses writes or the answers to them, by seeds that replay alone. Leaders, elections, leases, mirrors and the store
//! are those that serve; of nodes and the router there is what they say in the store.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;

use async_trait::async_trait;
use futures::StreamExt as _;
use futures::stream;
use sirocco_store::{EmbeddedStore, Entry, Grant, LeaseId, Listing, Mirror, Result, TxnOutcome, WatchStream, to_json};
use sirocco_types::{Epoch, ExpertHoldings, ExpertKey, Placement, Role};
use tokio::task::JoinSet;
use tokio_util::task::TaskTracker;

use super::*;
use crate::simulate::random::Random;
use crate::testing::{self, Entries};

/// Those that every run tries; `SIROCCO_SEEDS=1000..3000` tries others.
const SEEDS: std::ops::Range<u64> = 0..60;
const NODES: [&str; 4] = ["a", "b", "c", "d"];
const S: Duration = Duration::from_secs(1);

/// How a line is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Weather {
    /// It takes up to 20 ms.
    Fair,
    /// It takes up to 2 s, and one write in four is lost, or comes much later, or its answer is lost.
    Rough,
    /// Nothing passes.
    Down,
}

/// A store at the end of a line.
#[derive(Clone)]
struct Line {
    store: Arc<dyn Store>,
    weather: watch::Receiver<Weather>,
    random: Arc<Mutex<Random>>,
}

impl Line {
    fn below(&self, end: u64) -> u64 {
        self.random.lock().unwrap().next() % end
    }

    fn broken() -> StoreError {
        StoreError::Unavailable { operation: "call", endpoint: "line".into(), reason: "broken".into() }
    }

    /// The way there, or back.
    async fn pass(&self) -> Result<()> {
        let weather = *self.weather.borrow();
        let most = match weather {
            Weather::Fair => 20,
            Weather::Rough => 2000,
            Weather::Down => 1,
        };
        tokio::time::sleep(Duration::from_millis(self.below(most))).await;
        if weather == Weather::Down || *self.weather.borrow() == Weather::Down {
            tokio::time::sleep(S).await;
            return Err(Self::broken());
        }
        Ok(())
    }
}

#[async_trait]
impl Store for Line {
    async fn get(&self, key: &str) -> Result<Option<Arc<Entry>>> {
        self.pass().await?;
        self.store.get(key).await
    }

    async fn list(&self, prefix: &str) -> Result<Listing> {
        self.pass().await?;
        let listing = self.store.list(prefix).await;
        self.pass().await?;
        listing
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome> {
        self.pass().await?;
        let fate = if *self.weather.borrow() == Weather::Rough { self.below(12) } else { u64::MAX };
        match fate {
            0 => return Err(Self::broken()),
            // Nobody waits for it any more when it arrives. Only what is fenced may come so late.
            1 if !txn.compares.is_empty() => {
                let (store, late) = (Arc::clone(&self.store), Duration::from_millis(self.below(30_000)));
                tokio::spawn(async move {
                    tokio::time::sleep(late).await;
                    let _ = store.txn(txn).await;
                });
                return Err(Self::broken());
            }
            _ => {}
        }
        let outcome = self.store.txn(txn).await;
        self.pass().await?;
        if fate == 2 { Err(Self::broken()) } else { outcome }
    }

    async fn grant_lease(&self, ttl: Duration) -> Result<Grant> {
        self.pass().await?;
        self.store.grant_lease(ttl).await
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<()> {
        self.pass().await?;
        self.store.keep_alive(lease).await
    }

    async fn revoke(&self, lease: LeaseId) -> Result<()> {
        self.pass().await?;
        self.store.revoke(lease).await
    }

    async fn watch(&self, prefix: &str, from: Revision) -> Result<WatchStream> {
        self.pass().await?;
        let changes = self.store.watch(prefix, from).await?;
        let late = move |(line, mut changes): (Self, WatchStream)| async move {
            let mut weather = line.weather.clone();
            let down = async move { while weather.wait_for(|now| *now == Weather::Down).await.is_err() {} };
            let next = tokio::select! {
                batch = changes.next() => match line.pass().await {
                    Ok(()) => batch?,
                    Err(error) => Err(error),
                },
                () = down => Err(Self::broken()),
            };
            Some((next, (line, changes)))
        };
        Ok(stream::unfold((self.clone(), changes), late).boxed())
    }
}

/// What is in an expert node's memory.
type Memory = Arc<Mutex<BTreeSet<ExpertKey>>>;

/// Everybody around the store.
struct World {
    store: Arc<dyn Store>,
    keys: Keys,
    random: Random,
    /// By name.
    weather: BTreeMap<String, watch::Sender<Weather>>,
    members: BTreeMap<String, (JoinSet<()>, Memory)>,
    leaders: BTreeMap<String, (JoinSet<()>, mpsc::Sender<Command>)>,
    started: usize,
}

impl World {
    async fn start(seed: u64) -> Self {
        let store: Arc<dyn Store> = Arc::new(EmbeddedStore::new());
        let keys = Keys::new("t").unwrap();
        let mut world = Self {
            store,
            keys,
            random: Random::new(seed),
            weather: BTreeMap::new(),
            members: BTreeMap::new(),
            leaders: BTreeMap::new(),
            started: 0,
        };
        world.put("members/router/r", testing::router("r", None).to_string()).await;
        for name in ["a", "b", "c"] {
            world.join(name).await;
        }
        let (line, keys) = (world.line("r"), world.keys.clone());
        world.members.insert("r".into(), (spawn(router(line, keys)), Memory::default()));
        world
    }

    fn below(&mut self, end: usize) -> usize {
        (self.random.next() % end as u64) as usize
    }

    async fn put(&self, key: &str, value: String) {
        self.store.put(&format!("{}{key}", self.keys.prefix()), &value).await.unwrap();
    }

    fn line(&mut self, name: &str) -> Line {
        let weather = self.weather.entry(name.to_owned()).or_insert_with(|| watch::Sender::new(Weather::Fair));
        let random = Arc::new(Mutex::new(Random::new(self.random.next())));
        Line { store: Arc::clone(&self.store), weather: weather.subscribe(), random }
    }

    async fn join(&mut self, name: &str) {
        let mut entries = Entries::default();
        entries.join(name, 7);
        for (key, value) in entries.0 {
            self.put(&key, value).await;
        }
        let (line, keys, memory) = (self.line(name), self.keys.clone(), Memory::default());
        let task = spawn(expert_node(line, keys, NodeId::new(name).unwrap(), Arc::clone(&memory)));
        self.members.insert(name.to_owned(), (task, memory));
    }

    /// A node is killed, and its lease ends.
    async fn die(&mut self, name: &str) {
        self.members.remove(name);
        for key in [format!("members/expert/{name}"), format!("holdings/{name}")] {
            self.store.delete(&format!("{}{key}", self.keys.prefix())).await.unwrap();
        }
    }

    fn candidate(&mut self) {
        self.started += 1;
        let name = format!("c{}", self.started);
        let (line, keys, id) = (self.line(&name), self.keys.clone(), NodeId::new(&name).unwrap());
        let (commands, asked) = mpsc::channel(4);
        self.leaders.insert(name, (spawn(coordinator(line, keys, id, asked)), commands));
    }

    async fn happen(&mut self) {
        let lines: Vec<String> = self.weather.keys().cloned().collect();
        let line = lines[self.below(lines.len())].clone();
        let node = NODES[self.below(NODES.len())];
        match self.below(10) {
            0..=3 => {
                let weather = [Weather::Fair, Weather::Rough, Weather::Rough, Weather::Down][self.below(4)];
                self.weather[&line].send_replace(weather);
            }
            4 => {
                let leaders: Vec<String> = self.leaders.keys().cloned().collect();
                let killed = self.below(leaders.len());
                self.leaders.remove(&leaders[killed]);
                self.candidate();
            }
            5 if !self.members.contains_key(node) => self.join(node).await,
            6 if self.members.len() > 3 && self.members.contains_key(node) => self.die(node).await,
            _ => {
                let id = NodeId::new(node).unwrap();
                let request = match self.below(5) {
                    0 => Request::Drain(id),
                    1 => Request::Cordon(id),
                    2 => Request::SetMinReplicas { replicas: 1 + self.below(2) as u32, layer: None, expert: None },
                    _ => Request::Uncordon(id),
                };
                for (_, commands) in self.leaders.values() {
                    let (answer, _) = oneshot::channel();
                    let _ = commands.try_send(Command { request: request.clone(), by: "me".into(), answer });
                }
            }
        }
        tokio::time::sleep(Duration::from_millis(self.below(8000) as u64)).await;
    }

    async fn state(&self) -> ClusterState {
        let Listing { entries, revision } = self.store.list(self.keys.prefix()).await.unwrap();
        let entries = entries.into_iter().map(|entry| (entry.key.clone(), entry)).collect();
        ClusterState::of(&sirocco_store::Snapshot { entries, revision }, &self.keys)
    }

    /// Whether all has been done that there is to do: what serves is the target, every node has its part of it in memory and
    /// the router goes by it.
    fn at_rest(&self, state: &ClusterState) -> bool {
        let Some((serving, target)) = state.serving().zip(state.target()) else { return false };
        let held = |key: ExpertKey, node: &NodeId| {
            self.members.get(node.as_str()).is_some_and(|(_, memory)| memory.lock().unwrap().contains(&key))
        };
        let running = state.operations().any(|operation| operation.state == OperationState::Running);
        let follows = state.members(Role::Router).all(|router| router.serving_epoch == Some(serving.epoch));
        serving.epoch == target.epoch
            && serving.unplaced().next().is_none()
            && serving.iter().all(|(key, nodes)| nodes.iter().all(|node| held(key, node)))
            && follows
            && !running
    }
}

fn spawn(task: impl Future<Output = ()> + Send + 'static) -> JoinSet<()> {
    let mut tasks = JoinSet::new();
    tasks.spawn(task);
    tasks
}

/// The state as it is seen over `line`; lasts as long as the mirror.
async fn follow(line: &Line, keys: &Keys) -> (Mirror, watch::Receiver<Arc<ClusterState>>) {
    let mirror = Mirror::start(Arc::new(line.clone()), keys.prefix()).await.unwrap();
    let states = ClusterState::follow(&mirror, keys, &TaskTracker::new());
    (mirror, states)
}

async fn coordinator(line: Line, keys: Keys, id: NodeId, commands: mpsc::Receiver<Command>) {
    let (_mirror, states) = follow(&line, &keys).await;
    let (_loads, snapshots) = watch::channel(Arc::default());
    let candidate = Candidate {
        id,
        store: Arc::new(line),
        keys,
        states,
        loads: snapshots,
        commands,
        settle: S,
        policy: None,
        metrics: crate::metrics::tests::metrics().0,
    };
    candidate.run(CancellationToken::new()).await;
}

/// Loads what is needed, says so, and drops what is not.
async fn expert_node(line: Line, keys: Keys, id: NodeId, memory: Memory) {
    let (_mirror, mut states) = follow(&line, &keys).await;
    loop {
        let needed = states.borrow_and_update().needed_on(&id);
        tokio::time::sleep(Duration::from_millis(line.below(500))).await;
        memory.lock().unwrap().extend(&needed);
        let said = line.put(&keys.holdings(&id), &to_json(&ExpertHoldings::new(needed.iter().copied(), 0))).await;
        memory.lock().unwrap().retain(|key| needed.contains(key));
        if said.is_ok() && states.changed().await.is_err() {
            return;
        }
    }
}

/// Goes by what serves, and says so.
async fn router(line: Line, keys: Keys) {
    let (_mirror, mut states) = follow(&line, &keys).await;
    let key = keys.member(Role::Router, &NodeId::new("r").unwrap());
    loop {
        let state = Arc::clone(&states.borrow_and_update());
        let serving = state.serving().map(|serving| serving.epoch);
        let says = state.members(Role::Router).next().and_then(|router| router.serving_epoch);
        let record = testing::router("r", serving.map(|epoch| epoch.0)).to_string();
        let said = if says == serving { Ok(Revision(0)) } else { line.put(&key, &record).await };
        if said.is_ok() && states.changed().await.is_err() {
            return;
        }
    }
}

/// Looks at every state of the store: epochs never change, and serving never goes back nor ahead of the target.
async fn watch_over(store: Arc<dyn Store>, keys: Keys, seed: u64) {
    let mirror = Mirror::start(store, keys.prefix()).await.unwrap();
    let mut states = ClusterState::follow(&mirror, &keys, &TaskTracker::new());
    let mut epochs = BTreeMap::<Epoch, Placement>::new();
    let mut served = Epoch::default();
    loop {
        let state = Arc::clone(&states.borrow_and_update());
        for epoch in state.epochs() {
            let placement = state.epoch(epoch).unwrap();
            let first = epochs.entry(epoch).or_insert_with(|| placement.clone());
            assert_eq!(first, placement, "seed {seed}: epoch {epoch} was written twice");
        }
        if let Some((serving, target)) = state.serving().zip(state.target()) {
            assert!(served <= serving.epoch && serving.epoch <= target.epoch, "seed {seed}: {served} to {serving:?}");
            served = serving.epoch;
        }
        if states.changed().await.is_err() {
            return;
        }
    }
}

fn seeds() -> std::ops::Range<u64> {
    let Ok(text) = std::env::var("SIROCCO_SEEDS") else { return SEEDS };
    let (from, to) = text.split_once("..").expect("SIROCCO_SEEDS is FROM..TO");
    from.parse().unwrap()..to.parse().unwrap()
}

#[tokio::test(start_paused = true)]
async fn whatever_lines_do_no_epoch_changes_serving_never_goes_back_and_all_comes_to_rest() {
    for seed in seeds() {
        let mut world = World::start(seed).await;
        let mut watcher = spawn(watch_over(Arc::clone(&world.store), world.keys.clone(), seed));
        world.candidate();
        world.candidate();
        for _ in 0..8 {
            world.happen().await;
        }
        for weather in world.weather.values() {
            weather.send_replace(Weather::Fair);
        }
        for node in NODES {
            let id = NodeId::new(node).unwrap();
            world.store.delete(&world.keys.cordon(&id)).await.unwrap();
        }
        let mut waited = Duration::ZERO;
        while !world.at_rest(&world.state().await) {
            assert!(waited < 120 * S, "seed {seed} never comes to rest: {:?}", world.state().await);
            tokio::time::sleep(S).await;
            waited += S;
        }
        assert!(watcher.try_join_next().is_none_or(|ended| ended.is_ok()), "seed {seed}");
    }
}
