//! Tells the coordinator that leads what the compute thread does.
//!
//! Counters only go up, so that a report that is lost loses nothing. Never counts itself: [`Metrics`] does.

use std::sync::Arc;
use std::time::Instant;

use sirocco_proto::load;
use sirocco_store::ClusterState;
use sirocco_types::{LoadReport, NodeId};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::batch::Batcher;
use crate::metrics::Metrics;

/// Reports an expert node's counters.
#[derive(Debug)]
pub(crate) struct Reporter {
    pub(crate) node: NodeId,
    /// As in the member record.
    pub(crate) incarnation: u64,
    /// When the process started.
    pub(crate) started: Instant,
    pub(crate) metrics: Arc<Metrics>,
    /// Has the queue.
    pub(crate) batcher: Batcher,
}

impl Reporter {
    /// Reports to whoever leads, until `shutdown`.
    pub(crate) async fn run(self, states: watch::Receiver<Arc<ClusterState>>, shutdown: CancellationToken) {
        let leader = |state: &ClusterState| state.leader_address().map(str::to_owned);
        let sample = || LoadReport {
            node: self.node.clone(),
            incarnation: self.incarnation,
            uptime_us: self.started.elapsed().as_micros() as u64,
            counters: self.metrics.load(self.batcher.queued()),
        };
        load::report(states, leader, sample, shutdown).await;
    }
}
