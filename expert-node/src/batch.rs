//! Runs experts on a compute thread of its own, each expert once for all the requests that wait for it.
//!
//! The thread takes every job that is queued, whichever router sent it, runs each expert over all of its rows together and
//! deals the results back. A row's result does not depend on the rows beside it. Never blocks the I/O runtime.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use arc_swap::ArcSwap;
use sirocco_compute::{ExpertWeights, Pool};
use sirocco_proto::Rows;
use sirocco_proto::expert::{DispatchRequest, ExpertOutputs, Refusal, RefusalReason};
use sirocco_types::{ExpertId, ExpertKey};
use tokio::sync::{mpsc, oneshot};

/// Requests that may wait for the compute thread; one more is refused.
const QUEUE: usize = 256;

/// The experts a node holds.
pub(crate) type Held = HashMap<ExpertKey, Arc<ExpertWeights>>;

/// A request on its way to the compute thread.
#[derive(Debug)]
struct Job {
    request: DispatchRequest,
    expires: Option<Instant>,
    answer: oneshot::Sender<Result<ExpertOutputs, Refusal>>,
}

/// A cheap handle to the compute thread. The thread ends when the last handle is dropped.
#[derive(Clone, Debug)]
pub(crate) struct Batcher {
    jobs: mpsc::Sender<Job>,
}

impl Batcher {
    /// Starts the thread. It runs what `held` has at the time.
    pub(crate) fn start(held: Arc<ArcSwap<Held>>, pool: Pool) -> std::io::Result<(Self, JoinHandle<()>)> {
        let (jobs, queue) = mpsc::channel(QUEUE);
        let thread = std::thread::Builder::new().name("experts".into()).spawn(move || run(queue, &held, &pool))?;
        Ok((Self { jobs }, thread))
    }

    /// Runs the experts of `request`, whose shapes have been checked.
    pub(crate) async fn run(&self, request: DispatchRequest) -> Result<ExpertOutputs, Refusal> {
        let (answer, answered) = oneshot::channel();
        let expires = request.deadline.map(|left| Instant::now() + left);
        self.jobs.try_send(Job { request, expires, answer }).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => {
                Refusal::new(RefusalReason::Unavailable, format!("{QUEUE} requests are queued already"))
            }
            mpsc::error::TrySendError::Closed(_) => stopped(),
        })?;
        answered.await.map_err(|_| stopped())?
    }
}

fn stopped() -> Refusal {
    Refusal::new(RefusalReason::Unavailable, "the node is stopping")
}

fn run(mut queue: mpsc::Receiver<Job>, held: &ArcSwap<Held>, pool: &Pool) {
    let mut jobs = Vec::with_capacity(QUEUE);
    while queue.blocking_recv_many(&mut jobs, QUEUE) > 0 {
        let held = held.load();
        let started = jobs.drain(..).filter_map(|job| Running::start(job, &held)).collect();
        run_batch(started, &held, pool);
    }
}

/// A job whose held experts are known.
struct Running {
    job: Job,
    /// For each expert of the request: where its rows begin in `rows`, in rows, or why it is not run.
    experts: Vec<Result<usize, Refusal>>,
    /// `[rows, hidden_size]`.
    rows: Vec<f32>,
}

impl Running {
    /// Drops a job nobody waits for and answers one that is too late.
    fn start(job: Job, held: &Held) -> Option<Self> {
        if job.answer.is_closed() {
            return None;
        }
        if job.expires.is_some_and(|expires| expires <= Instant::now()) {
            let refusal = Refusal::new(RefusalReason::DeadlineExceeded, "the deadline passed in the queue");
            let _ = job.answer.send(Err(refusal));
            return None;
        }
        let mut count = 0;
        let layer = job.request.layer;
        let experts = job.request.experts.iter().map(|part| {
            let key = ExpertKey { layer, expert: part.expert };
            if !held.contains_key(&key) {
                return Err(Refusal::new(RefusalReason::NotHeld, format!("{key} is not held here")));
            }
            let start = count;
            count += part.rows.len();
            Ok(start)
        });
        let experts = experts.collect();
        let rows = vec![0.0; count * job.request.hidden_states.width()];
        Some(Self { job, experts, rows })
    }

    fn finish(self) {
        let parts = self.job.request.experts.iter().map(|part| part.expert);
        let experts: Vec<(ExpertId, Result<(), Refusal>)> =
            parts.zip(self.experts).map(|(expert, start)| (expert, start.map(|_| ()))).collect();
        let rows = Rows::new(self.rows, self.job.request.hidden_states.width());
        // A router that no longer waits has lost interest.
        let _ = self.job.answer.send(Ok(ExpertOutputs { experts, rows }));
    }
}

fn run_batch(mut jobs: Vec<Running>, held: &Held, pool: &Pool) {
    let mut work: BTreeMap<ExpertKey, Vec<(usize, usize)>> = BTreeMap::new();
    for (j, running) in jobs.iter().enumerate() {
        let request = &running.job.request;
        for (p, part) in request.experts.iter().enumerate().filter(|(p, _)| running.experts[*p].is_ok()) {
            work.entry(ExpertKey { layer: request.layer, expert: part.expert }).or_default().push((j, p));
        }
    }
    for (key, parts) in work {
        let weights = &held[&key];
        let mut input = Vec::new(); // [rows, hidden]
        for &(j, p) in &parts {
            let request = &jobs[j].job.request;
            for &row in &request.experts[p].rows {
                request.hidden_states.append_row(row as usize, &mut input);
            }
        }
        let output = weights.forward(&input, pool); // [rows, hidden]
        let mut rest = output.as_slice();
        for &(j, p) in &parts {
            let running = &mut jobs[j];
            let width = running.job.request.hidden_states.width();
            let Ok(start) = &running.experts[p] else { continue };
            let (rows, after) = rest.split_at(running.job.request.experts[p].rows.len() * width);
            running.rows[*start * width..][..rows.len()].copy_from_slice(rows);
            rest = after;
        }
    }
    for running in jobs {
        running.finish();
    }
}
