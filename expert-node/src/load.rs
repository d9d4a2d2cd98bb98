//! Counts what the compute thread does, and tells the coordinator that leads.
//!
//! Counters only go up, so that a report that is lost loses nothing. Never counts what was refused.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use sirocco_proto::load;
use sirocco_store::ClusterState;
use sirocco_types::{LayerId, LoadCounters, LoadReport, NodeId};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::batch::Batcher;

/// What the compute thread did since the process started.
#[derive(Debug)]
pub(crate) struct Counters {
    busy_ns: AtomicU64,
    batches: AtomicU64,
    /// By layer.
    rows: Vec<AtomicU64>,
}

impl Counters {
    /// Counters of a model with `layers` layers, at zero.
    pub(crate) fn new(layers: usize) -> Self {
        let rows = (0..layers).map(|_| AtomicU64::new(0)).collect();
        Self { busy_ns: AtomicU64::new(0), batches: AtomicU64::new(0), rows }
    }

    /// An expert of `layer`, a layer of the model, was run on `rows` rows at once.
    pub(crate) fn ran(&self, layer: LayerId, rows: usize) {
        self.batches.fetch_add(1, Ordering::Relaxed);
        self.rows[layer.index()].fetch_add(rows as u64, Ordering::Relaxed);
    }

    /// The thread worked for `time`.
    pub(crate) fn worked(&self, time: Duration) {
        self.busy_ns.fetch_add(time.as_nanos() as u64, Ordering::Relaxed);
    }

    /// What they are now, with `queue` requests waiting.
    pub(crate) fn read(&self, queue: usize) -> LoadCounters {
        LoadCounters::Expert {
            busy_us: self.busy_ns.load(Ordering::Relaxed) / 1000,
            batches: self.batches.load(Ordering::Relaxed),
            rows: self.rows.iter().map(|rows| rows.load(Ordering::Relaxed)).collect(),
            queue: queue as u32,
        }
    }
}

/// Reports an expert node's counters.
#[derive(Debug)]
pub(crate) struct Reporter {
    pub(crate) node: NodeId,
    /// As in the member record.
    pub(crate) incarnation: u64,
    /// When the process started.
    pub(crate) started: Instant,
    pub(crate) counters: Arc<Counters>,
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
            counters: self.counters.read(self.batcher.queued()),
        };
        load::report(states, leader, sample, shutdown).await;
    }
}
