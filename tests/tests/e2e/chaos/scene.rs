//! A cluster under load, into which faults can be put and which is seen to come to rest again.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use sirocco_testkit::cluster::{Cluster, Node, Setup};
use sirocco_testkit::etcd::{EtcdCluster, ctl};
use sirocco_testkit::faults::Rig;
use sirocco_testkit::faults::network::State;
use sirocco_testkit::repository;

use super::load::{Load, Tally, Window};
use crate::control::operator::{Operator, min_replicas};
use crate::control::{POLL, Size};
use crate::openai::client::until_idle;

/// Longest time until a cluster has what it is to have again: a lease ends, what was lost is placed and loaded elsewhere.
const PATIENCE: Duration = Duration::from_mins(2);

/// How long the streams are watched before a fault.
const BEFORE: Duration = Duration::from_secs(3);

/// What a scene starts with.
#[derive(Clone, Copy)]
pub(super) struct Start<'a> {
    pub(super) name: &'a str,
    pub(super) size: Size,
    pub(super) etcd_members: usize,
    /// Of each expert.
    pub(super) replicas: u32,
    pub(super) streams: usize,
    pub(super) envs: &'a [(&'a str, &'a str)],
    /// Each node has a clock of its own.
    pub(super) clocks: bool,
}

/// See the module.
pub(super) struct Scene {
    pub(super) rig: Arc<Rig>,
    pub(super) etcd: EtcdCluster,
    pub(super) cluster: Cluster,
    pub(super) load: Load,
    pub(super) model: PathBuf,
    pub(super) name: String,
    replicas: u32,
}

/// A fault that was, and how the streams fared.
pub(super) struct Seen {
    pub(super) before: Window,
    pub(super) began: Instant,
    /// When it was no longer watched; it may have lasted.
    pub(super) ended: Instant,
    /// Requests that failed or whose completion was another, from its begin until all had ended that were under way.
    pub(super) wrong: usize,
    pub(super) completed: usize,
}

impl Scene {
    /// Starts a cluster of the bundled model, waits until it has its replicas, and puts it under load.
    pub(super) async fn start(start: Start<'_>) -> Self {
        let Start { name, size, replicas, .. } = start;
        let etcd = EtcdCluster::start(start.etcd_members).unwrap();
        let rig = if start.clocks { Rig::links_and_clocks(1) } else { Rig::links(1) };
        let (rig, model) = (Arc::new(rig.unwrap()), repository("models/demo"));
        let setup = Setup {
            name,
            router_model: &model,
            models: &vec![model.clone(); size.experts],
            coordinators: size.coordinators,
            routers: size.routers,
            envs: &[&[("SIROCCO_THREADS", "1")], start.envs].concat(),
        };
        let cluster = Cluster::start_rigged(&etcd.endpoints(), &setup, Some(Arc::clone(&rig))).unwrap();
        let operator = Operator::of(&cluster);
        if replicas > 1 {
            operator.complete(min_replicas(replicas)).await;
        }
        operator.settled().await;
        let way = |node: &Node| rig.network.link(&node.id).way("grpc").unwrap().to_string();
        let routers: Vec<String> = cluster.routers.iter().map(way).collect();
        let load = Load::start(&routers, start.streams).await;
        load.progress(0).await;
        Self { rig, etcd, cluster, load, model, name: name.to_owned(), replicas }
    }

    /// Lets `fault` happen and sees how the streams fare for `watch`, and until each has ended what it was at.
    pub(super) async fn suffer(&mut self, watch: Duration, fault: impl AsyncFnOnce(&mut Self)) -> Seen {
        let already = self.load.tally();
        let before = self.load.during(watch.min(BEFORE)).await;
        let began = Instant::now();
        fault(self).await;
        self.load.during(watch.saturating_sub(began.elapsed())).await;
        let ended = Instant::now();
        self.load.progress(0).await;
        let tally = self.load.tally();
        for wrong in &tally.wrong[already.wrong.len()..] {
            eprintln!("{}: {wrong}", self.name);
        }
        let wrong = tally.wrong.len() - already.wrong.len();
        Seen { before, began, ended, wrong, completed: tally.completed - already.completed }
    }

    /// Puts the link to expert node `index` into `state`.
    pub(super) fn link(&self, index: usize, state: State) {
        self.rig.network.link(&self.cluster.experts[index].id).put(state);
    }

    /// Starts expert node `index` again, which was killed, and waits until it is a member.
    pub(super) fn revive_expert(&mut self, index: usize) {
        let model = self.model.clone();
        self.cluster.restart_expert(index, &model).unwrap();
    }

    /// Starts router `index` again and waits until it is ready.
    pub(super) fn revive_router(&mut self, index: usize) {
        let mut router = self.cluster.begin_router(index, &self.model).unwrap().listening().unwrap();
        router.process.wait_for_line("ready").unwrap();
        self.cluster.routers[index] = router;
    }

    /// Starts coordinator `index` again and waits until it listens.
    pub(super) fn revive_coordinator(&mut self, index: usize) {
        self.cluster.coordinators[index] = self.cluster.begin_coordinator(index).unwrap().listening().unwrap();
    }

    /// Has every process end as it is asked to and start again, one at a time, the cluster at rest before the next.
    pub(super) async fn roll(&mut self) {
        for member in &mut self.etcd.members {
            member.restart().unwrap();
        }
        for index in 0..self.cluster.coordinators.len() {
            leave(&mut self.cluster.coordinators[index]);
            self.revive_coordinator(index);
            self.rest().await;
        }
        for index in 0..self.cluster.routers.len() {
            leave(&mut self.cluster.routers[index]);
            self.revive_router(index);
            self.rest().await;
        }
        for index in 0..self.cluster.experts.len() {
            leave(&mut self.cluster.experts[index]);
            self.revive_expert(index);
            self.rest().await;
        }
    }

    /// Waits until every node is a member and ready, what is to be serves, and every expert has its replicas on living nodes.
    /// Says how long that took.
    pub(super) async fn rest(&self) -> Duration {
        let (began, operator) = (Instant::now(), Operator::of(&self.cluster));
        loop {
            let unrest = self.unrest(&operator).await;
            if unrest.is_empty() {
                return began.elapsed();
            }
            assert!(began.elapsed() < PATIENCE, "{}: no rest after {PATIENCE:?}: {unrest:#?}", self.name);
            tokio::time::sleep(POLL).await;
        }
    }

    /// What keeps the cluster from rest.
    async fn unrest(&self, operator: &Operator) -> Vec<String> {
        let (cluster, nodes) = (operator.cluster().await, operator.nodes().await);
        let mut unrest = cluster.problems;
        if !cluster.serving || cluster.serving_epoch != cluster.target_epoch {
            unrest.push(format!("epoch {} serves, {} is to", cluster.serving_epoch, cluster.target_epoch));
        }
        let ready: BTreeSet<&str> = nodes.iter().filter(|n| n.state == "ready").map(|n| n.id.as_str()).collect();
        let all: BTreeSet<&str> = self.nodes().map(|node| node.id.as_str()).collect();
        if ready != all {
            unrest.push(format!("members that are ready: {ready:?}"));
        }
        let routers = nodes.iter().filter(|node| node.id.starts_with("router"));
        for router in routers.filter(|router| router.serving_epoch != cluster.serving_epoch) {
            unrest.push(format!("{} is at epoch {}", router.id, router.serving_epoch));
        }
        for expert in operator.experts().await {
            let well = expert.serving.iter().filter(|node| ready.contains(node.as_str())).count();
            if well < self.replicas as usize {
                unrest.push(format!("expert {} of layer {} is served by {well}", expert.expert, expert.layer));
            }
        }
        let running = operator.operations().await.into_iter().filter(|operation| operation.state == "running");
        unrest.extend(running.map(|operation| format!("{} {} runs", operation.kind, operation.subject)));
        unrest
    }

    fn nodes(&self) -> impl Iterator<Item = &Node> {
        self.cluster.coordinators.iter().chain(&self.cluster.routers).chain(&self.cluster.experts)
    }

    /// Lets the streams end, asks every node to leave, and sees that none fails and nothing of them is left. Returns what came
    /// of the streams.
    pub(super) async fn end(mut self) -> Tally {
        self.rig.network.heal();
        let tally = self.load.stop().await;
        let Cluster { coordinators, routers, experts, .. } = &mut self.cluster;
        for router in routers.iter() {
            until_idle(router);
        }
        for node in routers.iter_mut().chain(coordinators).chain(experts) {
            leave(node);
        }
        let endpoints = self.etcd.endpoints();
        let left = ctl::entries(&endpoints, &self.name).unwrap();
        let leased = |key: &str| ["members", "holdings", "election"].iter().any(|part| key.contains(part));
        let left: Vec<&String> = left.iter().map(|(key, _)| key).filter(|key| leased(key)).collect();
        let logs: Vec<String> = self.cluster.coordinators.iter().map(|node| node.process.stderr()).collect();
        assert!(left.is_empty(), "keys of nodes that have left: {left:?}; coordinators:\n{}", logs.join("\n"));
        tally
    }
}

/// Asks `node` to leave and waits until it has, without complaint.
pub(super) fn leave(node: &mut Node) {
    node.process.signal(Signal::TERM).unwrap();
    let status = node.process.wait().unwrap();
    assert!(status.success(), "{}: {status}\n{}", node.id, node.process.stderr());
}
