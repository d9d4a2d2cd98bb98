//! How loaded the cluster is: a task keeps the book of what nodes report while this coordinator leads.
//!
//! Others read its snapshots; the leader writes them to the store at a bounded rate. The book of a new leader starts from
//! there, so a change of leaders loses nothing but the seconds between.

mod book;

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use sirocco_store::ClusterState;
use sirocco_types::{Fingerprint, LoadReport, NodeId};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use self::book::LoadBook;
pub(crate) use self::book::{LoadSnapshot, TOKENS_PER_EXPERT};

/// How often the averages move and a snapshot is published.
const TICK: Duration = Duration::from_secs(1);

/// Keeps the book for coordinator `id` until `shutdown`; its snapshots are empty while another leads.
pub(crate) struct Keeper {
    pub(crate) id: NodeId,
    pub(crate) half_life: Duration,
    pub(crate) states: watch::Receiver<Arc<ClusterState>>,
    pub(crate) reports: mpsc::Receiver<LoadReport>,
    pub(crate) snapshots: watch::Sender<Arc<LoadSnapshot>>,
}

impl Keeper {
    /// See the type.
    pub(crate) async fn run(mut self, shutdown: CancellationToken) {
        let mut book: Option<(Fingerprint, LoadBook)> = None;
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut last = Instant::now();
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                report = self.reports.recv() => match (report, &mut book) {
                    (Some(report), Some((_, book))) => {
                        let node = report.node.clone();
                        if let Err(error) = book.record(report) {
                            tracing::debug!(%node, %error, "a load report is left out");
                        }
                    }
                    (Some(_), None) => {}
                    (None, _) => return,
                },
                now = ticks.tick() => {
                    let state = Arc::clone(&self.states.borrow());
                    self.follow(&mut book, &state);
                    if let Some((_, book)) = &mut book {
                        book.tick(now - last, &state);
                        self.snapshots.send_replace(Arc::new(book.snapshot(&state, self.id.as_str(), now_ms())));
                    }
                    last = now;
                }
            }
        }
    }

    /// Opens the book when this coordinator leads a cluster with a model, and closes it when that has passed.
    fn follow(&self, book: &mut Option<(Fingerprint, LoadBook)>, state: &ClusterState) {
        let model = state.model().filter(|_| state.leader() == Some(self.id.as_str()));
        match (model, &book) {
            (Some(model), Some((fingerprint, _))) if model.fingerprint == *fingerprint => {}
            (Some(model), _) => *book = Some((model.fingerprint, LoadBook::new(state, &model.spec, self.half_life))),
            (None, Some(_)) => {
                *book = None;
                self.snapshots.send_replace(Arc::default());
            }
            (None, None) => {}
        }
    }
}

/// Milliseconds since 1970, for people to read; nothing is decided by it but how soon automatic rebalancing comes again.
pub(crate) fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_millis() as u64)
}
