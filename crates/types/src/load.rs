//! How loaded a cluster is: the aggregates that the leader keeps in the store.
//!
//! Rates are exponentially weighted: what happened one half-life ago counts half. They outlive the traffic they were measured
//! on, so that an idle cluster keeps the placement that its last load asked for.

use serde::{Deserialize, Serialize};

use crate::NodeId;

/// One layer's load.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LayerLoad {
    /// Routed tokens a second of each expert, by index.
    pub tokens_per_s: Vec<f64>,
    /// Routed tokens of each expert over the last half-lives in which there was traffic, by index: what placements are made by.
    pub weight: Vec<f64>,
    /// Time of the slowest node over the mean of all, each node's rows over its speed; 1 is perfect, 0 while nothing is known.
    pub imbalance: f64,
    /// The coordinator that measured it.
    pub leader: String,
    /// When, in milliseconds since 1970, by the leader's clock.
    pub at_ms: u64,
}

/// One expert node's load.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct NodeLoad {
    /// Share of the time its compute thread worked, from 0 to 1.
    pub busy: f64,
    /// Requests that waited for the compute thread.
    pub queue: f64,
    /// Rows an expert was run on at once, on average.
    pub batch_rows: f64,
    /// Rows a second over all layers.
    pub rows_per_s: f64,
    /// Rows a second of work: `rows_per_s / busy`.
    pub service_rows_per_s: f64,
    /// The coordinator that measured it.
    pub leader: String,
    /// When, in milliseconds since 1970, by the leader's clock.
    pub at_ms: u64,
}

/// What a node tells the leader, about once a second. Counters run from the start of the process, so that a lost report
/// loses nothing.
#[derive(Clone, Debug, PartialEq)]
pub struct LoadReport {
    /// Who reports.
    pub node: NodeId,
    /// Of which start of its process; a new one means that its counters start anew.
    pub incarnation: u64,
    /// Microseconds since the process started.
    pub uptime_us: u64,
    /// What it counted.
    pub counters: LoadCounters,
}

/// The counters of a [`LoadReport`].
#[derive(Clone, Debug, PartialEq)]
pub enum LoadCounters {
    /// Of a router: routed tokens by layer and expert, `[layers][experts]`.
    Router {
        /// `[layers][experts]`
        tokens: Vec<Vec<u64>>,
    },
    /// Of an expert node.
    Expert {
        /// Microseconds its compute thread worked.
        busy_us: u64,
        /// Times an expert was run.
        batches: u64,
        /// Rows run, by layer.
        rows: Vec<u64>,
        /// Requests waiting now.
        queue: u32,
    },
}
