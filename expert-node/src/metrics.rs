//! Every metric of an expert node: what it is called and means, and the one method that whoever measures it calls.
//!
//! What the compute thread does is counted here once, for Prometheus and for the reports of [`crate::load`]. Takes atomics only, no
//! lock and no memory. Never counts what was refused as run.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use sirocco_process::metrics::{Counter, Histogram, LATENCIES, Page, Seconds};
use sirocco_proto::expert::RefusalReason;
use sirocco_types::{ExpertKey, LoadCounters, ModelSpec};

use crate::batch::{Batcher, Held};

/// Upper bounds for the rows that an expert is run on at once.
const BATCH_ROWS: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0];

/// What an expert node did since it started.
#[derive(Debug)]
pub(crate) struct Metrics {
    experts_per_layer: usize,
    /// `[layers, experts]`
    rows: Arc<[AtomicU64]>,
    batch_rows: Histogram,
    compute_seconds: Seconds,
    load_seconds: Histogram,
    load_failures: Counter,
    /// By reason.
    refusals: Vec<Counter>,
}

impl Metrics {
    /// Puts the metrics of a node that runs experts of a model like `spec` on `page`.
    pub(crate) fn new(page: &Page, spec: &ModelSpec) -> Self {
        Self {
            experts_per_layer: spec.num_local_experts,
            rows: spec.experts().map(|_| AtomicU64::new(0)).collect(),
            batch_rows: page.histogram(
                ("sirocco_expert_batch_rows", "Rows that an expert was run on at once, for all routers together."),
                BATCH_ROWS,
            ),
            compute_seconds: page
                .seconds(("sirocco_expert_compute_seconds_total", "Time in which the compute thread worked.")),
            load_seconds: page
                .histogram(("sirocco_expert_load_seconds", "Time to read an expert from the checkpoint."), LATENCIES),
            load_failures: page
                .counter(("sirocco_expert_load_failures_total", "Experts that could not be read from the checkpoint.")),
            refusals: page.counters(
                (
                    "sirocco_expert_refusals_total",
                    "Calls that were refused whole, and single experts of calls that were not run.",
                ),
                ["reason"],
                RefusalReason::ALL.map(|reason| [reason.as_str()]),
            ),
        }
    }

    /// Puts on `page` what is known when somebody scrapes: what is `held`, of `capacity_bytes`, and what waits for `batcher`,
    /// which this does not keep alive.
    pub(crate) fn watch(&self, page: &Page, held: &Arc<ArcSwap<Held>>, capacity_bytes: u64, batcher: &Batcher) {
        let (rows, experts, of) = (Arc::clone(&self.rows), self.experts_per_layer, Arc::clone(held));
        let named =
            ("sirocco_expert_rows_total", "Rows that an expert was run on; only experts that are held are shown.");
        page.total(named, &["layer", "expert"], move |samples| {
            for key in of.load().keys() {
                let rows = rows[index(*key, experts)].load(Ordering::Relaxed);
                samples.add(&[&key.layer.0.to_string(), &key.expert.0.to_string()], rows as f64);
            }
        });
        let of = Arc::clone(held);
        page.gauge(("sirocco_expert_held_experts", "Experts that the node has loaded."), &[], move |samples| {
            samples.add(&[], of.load().len() as f64);
        });
        let of = Arc::clone(held);
        page.gauge(
            ("sirocco_expert_held_bytes", "Bytes of the experts that the node has loaded."),
            &[],
            move |samples| {
                samples.add(&[], of.load().values().map(|weights| weights.bytes()).sum::<usize>() as f64);
            },
        );
        let capacity = ("sirocco_expert_capacity_bytes", "Most bytes of experts that the node may load.");
        page.gauge(capacity, &[], move |samples| samples.add(&[], capacity_bytes as f64));
        let queued = batcher.watch_queue();
        page.gauge(("sirocco_expert_calls_waiting", "Calls that wait for the compute thread."), &[], move |samples| {
            samples.add(&[], queued() as f64);
        });
    }

    /// Expert `key`, one of the model, was run on `rows` rows at once.
    pub(crate) fn ran(&self, key: ExpertKey, rows: usize) {
        self.rows[index(key, self.experts_per_layer)].fetch_add(rows as u64, Ordering::Relaxed);
        self.batch_rows.observe(rows as f64);
    }

    /// The compute thread worked for `time`.
    pub(crate) fn worked(&self, time: Duration) {
        self.compute_seconds.inc_by(time.as_secs_f64());
    }

    /// An expert was read in `time`.
    pub(crate) fn loaded(&self, time: Duration) {
        self.load_seconds.observe(time.as_secs_f64());
    }

    /// An expert could not be read.
    pub(crate) fn not_loaded(&self) {
        self.load_failures.inc();
    }

    /// A call, or one expert of it, was refused.
    pub(crate) fn refused(&self, reason: RefusalReason) {
        self.refusals[reason as usize].inc();
    }

    /// What the coordinator is told, with `queue` calls waiting.
    pub(crate) fn load(&self, queue: usize) -> LoadCounters {
        let layer = |rows: &[AtomicU64]| rows.iter().map(|rows| rows.load(Ordering::Relaxed)).sum();
        LoadCounters::Expert {
            busy_us: (self.compute_seconds.get() * 1e6) as u64,
            batches: self.batch_rows.get_sample_count(),
            rows: self.rows.chunks(self.experts_per_layer).map(layer).collect(),
            queue: queue as u32,
        }
    }
}

/// The place of `key` among a model's experts.
fn index(key: ExpertKey, experts_per_layer: usize) -> usize {
    key.layer.index() * experts_per_layer + key.expert.index()
}
