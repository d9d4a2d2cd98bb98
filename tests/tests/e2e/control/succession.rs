//! Kills leaders, each in the middle of something, and sees that another takes over.

use std::collections::VecDeque;
use std::time::Duration;

use rustix::process::Signal;
use sirocco_proto::wire::cluster as wire;
use sirocco_testkit::cluster::{Cluster, Starting};
use tokio::time::Instant;

use super::operator::Operator;
use super::until;

/// The coordinators that were killed and are on their way back, and how long each takeover took.
#[derive(Default)]
pub(crate) struct Succession {
    returning: VecDeque<(usize, Starting)>,
    pub(crate) takeovers: Vec<Duration>,
}

impl Succession {
    /// Does `begin`, kills the leader while what it began runs, starts it again under its id, and returns the record of what
    /// ran, which another leader has ended.
    ///
    /// The first router stands still meanwhile, so that nothing can be over before the leader is dead. Of several operations
    /// that run, it is the latest.
    pub(crate) async fn interrupt(
        &mut self,
        cluster: &mut Cluster,
        begin: impl AsyncFnOnce(&mut Cluster, &Operator),
    ) -> wire::Operation {
        let operator = Operator::of(cluster);
        operator.settled().await;
        let newest = newest(&operator).await;
        cluster.routers[0].process.signal(Signal::STOP).unwrap();
        begin(cluster, &operator).await;
        let running = until("something to run", async || {
            let operations = operator.operations().await;
            operations.into_iter().find(|operation| operation.id > newest && operation.state == "running")
        })
        .await;
        let dead = self.kill_leader(cluster).await;
        cluster.routers[0].process.signal(Signal::CONT).unwrap();
        // Those that are back listen elsewhere.
        let operator = Operator::of(cluster);
        self.takeovers.push(dead.replaced(&operator).await);
        let ended = operator.ended(running.id).await;
        assert_ne!(ended.leader, dead.id, "it was over before its leader was killed: {ended:?}");
        operator.settled().await;
        ended
    }

    /// Kills the leader and begins to start it again.
    pub(crate) async fn kill_leader(&mut self, cluster: &mut Cluster) -> Dead {
        // Two must live: the leader and the one to follow it.
        if self.returning.len() + 2 > cluster.coordinators.len() {
            self.bring_back(cluster);
        }
        let operator = Operator::of(cluster);
        let newest = newest(&operator).await;
        let id = until("a leader", async || Some(operator.cluster().await.leader).filter(|id| !id.is_empty())).await;
        let index = cluster.coordinators.iter().position(|node| node.id == id).expect("it leads this cluster");
        cluster.coordinators[index].process.kill().unwrap();
        let at = Instant::now();
        self.returning.push_back((index, cluster.begin_coordinator(index).unwrap()));
        Dead { id, at, newest }
    }

    /// Waits for the first of those that are on their way back.
    fn bring_back(&mut self, cluster: &mut Cluster) {
        if let Some((index, starting)) = self.returning.pop_front() {
            cluster.coordinators[index] = starting.listening().unwrap();
        }
    }

    /// Waits until all that were killed are back.
    pub(crate) fn complete(&mut self, cluster: &mut Cluster) {
        while !self.returning.is_empty() {
            self.bring_back(cluster);
        }
    }
}

/// A leader that was killed.
pub(crate) struct Dead {
    pub(crate) id: String,
    pub(crate) at: Instant,
    /// The newest operation when it was killed.
    newest: u64,
}

impl Dead {
    /// Waits until another leader has written something, and says how long after the death that was.
    pub(crate) async fn replaced(&self, operator: &Operator) -> Duration {
        until("a new leader to act", async || {
            let operations = operator.operations().await;
            let leads = |operation: &wire::Operation| operation.id > self.newest && operation.kind == "lead";
            operations.iter().any(|operation| leads(operation) && operation.leader != self.id).then_some(())
        })
        .await;
        self.at.elapsed()
    }
}

async fn newest(operator: &Operator) -> u64 {
    operator.operations().await.first().map_or(0, |operation| operation.id)
}
