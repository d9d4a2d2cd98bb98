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
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

use crate::metrics::Metrics;

/// Requests that may wait for the compute thread; one more is refused.
const QUEUE: usize = 256;

/// KiB that requests and their answers may take from their arrival until they are answered; what takes more is refused.
const ROOM_KIB: u32 = 2 << 20;

/// The experts a node holds.
pub(crate) type Held = HashMap<ExpertKey, Arc<ExpertWeights>>;

/// A request on its way to the compute thread.
#[derive(Debug)]
struct Job {
    request: DispatchRequest,
    expires: Option<Instant>,
    answer: oneshot::Sender<Result<ExpertOutputs, Refusal>>,
    _room: OwnedSemaphorePermit,
}

/// A cheap handle to the compute thread. The thread ends when the last handle is dropped.
#[derive(Clone, Debug)]
pub(crate) struct Batcher {
    jobs: mpsc::Sender<Job>,
    room: Arc<Semaphore>,
}

impl Batcher {
    /// Starts the thread. It runs what `held` has at the time and says in `metrics` what it did.
    pub(crate) fn start(
        held: Arc<ArcSwap<Held>>,
        metrics: Arc<Metrics>,
        pool: Pool,
    ) -> std::io::Result<(Self, JoinHandle<()>)> {
        let (jobs, queue) = mpsc::channel(QUEUE);
        let thread = std::thread::Builder::new().name("experts".into());
        let thread = thread.spawn(move || run(queue, &held, &metrics, &pool))?;
        Ok((Self::over(jobs), thread))
    }

    fn over(jobs: mpsc::Sender<Job>) -> Self {
        Self { jobs, room: Arc::new(Semaphore::new(ROOM_KIB as usize)) }
    }

    /// Requests that wait for the thread now.
    pub(crate) fn queued(&self) -> usize {
        queued(&self.jobs)
    }

    /// Tells [`Batcher::queued`] without keeping the thread alive.
    pub(crate) fn watch_queue(&self) -> impl Fn() -> usize + Send + Sync + 'static {
        let jobs = self.jobs.downgrade();
        move || jobs.upgrade().map_or(0, |jobs| queued(&jobs))
    }

    /// Hands `request`, whose shapes have been checked, to the thread at once, and waits for its answer when polled.
    pub(crate) fn run(
        &self,
        request: DispatchRequest,
    ) -> Result<impl Future<Output = Result<ExpertOutputs, Refusal>> + Send + use<>, Refusal> {
        let kib = room_kib(&request);
        let room = Arc::clone(&self.room).try_acquire_many_owned(kib).map_err(|_| {
            let message =
                format!("{kib} KiB, of {ROOM_KIB} KiB for requests {} are free", self.room.available_permits());
            Refusal::new(RefusalReason::Unavailable, message)
        })?;
        let (answer, answered) = oneshot::channel();
        let expires = request.deadline.map(|left| Instant::now() + left);
        self.jobs.try_send(Job { request, expires, answer, _room: room }).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => {
                Refusal::new(RefusalReason::Unavailable, format!("{QUEUE} requests are queued already"))
            }
            mpsc::error::TrySendError::Closed(_) => stopped(),
        })?;
        Ok(async { answered.await.map_err(|_| stopped())? })
    }
}

fn queued(jobs: &mpsc::Sender<Job>) -> usize {
    jobs.max_capacity() - jobs.capacity()
}

/// KiB that `request` and its answer take; less than 2^21, for both are limited by what a message may have.
fn room_kib(request: &DispatchRequest) -> u32 {
    let asked: usize = request.experts.iter().map(|part| part.rows.len()).sum();
    let values = (request.hidden_states.len() + asked) * request.hidden_states.width();
    (values * size_of::<f32>() / 1024 + 1) as u32
}

fn stopped() -> Refusal {
    Refusal::new(RefusalReason::Unavailable, "the node is stopping")
}

fn run(mut queue: mpsc::Receiver<Job>, held: &ArcSwap<Held>, metrics: &Metrics, pool: &Pool) {
    let mut jobs = Vec::with_capacity(QUEUE);
    while queue.blocking_recv_many(&mut jobs, QUEUE) > 0 {
        let begun = Instant::now();
        let held = held.load();
        let started = jobs.drain(..).filter_map(|job| Running::start(job, &held)).collect();
        run_batch(started, &held, metrics, pool);
        metrics.worked(begun.elapsed());
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

fn run_batch(mut jobs: Vec<Running>, held: &Held, metrics: &Metrics, pool: &Pool) {
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
        metrics.ran(key, parts.iter().map(|&(j, p)| jobs[j].job.request.experts[p].rows.len()).sum());
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

#[cfg(test)]
mod tests {
    use sirocco_compute::{ExpertMatrix, ExpertPacker};
    use sirocco_process::http::Health;
    use sirocco_process::metrics::Page;
    use sirocco_proto::expert::ExpertRows;
    use sirocco_types::{ExpertDtype, Fingerprint, LayerId, LoadCounters, ModelSpec};

    use super::*;
    use crate::testing;

    const HIDDEN: usize = 16;

    fn request(experts: &[(u32, &[u32])]) -> DispatchRequest {
        let rows = |&(expert, rows): &(u32, &[u32])| ExpertRows { expert: ExpertId(expert), rows: rows.to_vec() };
        DispatchRequest {
            id: 0,
            fingerprint: Fingerprint([7; 32]),
            layer: LayerId(1),
            deadline: None,
            hidden_states: Rows::new(vec![1.0; 3 * HIDDEN], HIDDEN),
            experts: experts.iter().map(rows).collect(),
        }
    }

    #[tokio::test]
    async fn what_ran_is_counted_by_expert_and_what_was_refused_is_not() {
        let mut packer = ExpertPacker::new(ExpertDtype::Bf16, HIDDEN, HIDDEN);
        for matrix in ExpertMatrix::ALL {
            packer.push_rows(matrix, &[0; 2 * HIDDEN * HIDDEN]);
        }
        let weights = Arc::new(packer.finish());
        let key = |expert| ExpertKey { layer: LayerId(1), expert: ExpertId(expert) };
        let held = Held::from([(key(0), Arc::clone(&weights)), (key(1), weights)]);
        let page = Page::new(&Health::new("expert-node", "e"));
        let spec = ModelSpec { num_hidden_layers: 3, num_local_experts: 8, ..testing::spec() };
        let metrics = Arc::new(Metrics::new(&page, &spec));
        let held = Arc::new(ArcSwap::from_pointee(held));
        let pool = Pool::new(1).unwrap();
        let (batcher, thread) = Batcher::start(Arc::clone(&held), Arc::clone(&metrics), pool).unwrap();
        metrics.watch(&page, &held, 1 << 20, &batcher);
        let outputs = batcher.run(request(&[(0, &[0, 1, 2]), (1, &[2, 0]), (5, &[1])])).unwrap().await.unwrap();
        assert_eq!(outputs.rows.len(), 5);
        batcher.run(request(&[(1, &[1])])).unwrap().await.unwrap();
        drop(batcher);
        thread.join().unwrap();

        let LoadCounters::Expert { busy_us, batches, rows, queue } = metrics.load(0) else {
            panic!("an expert node's counters");
        };
        assert!(busy_us > 0);
        assert_eq!((batches, rows, queue), (3, vec![0, 6, 0], 0));
        let text = page.render().unwrap();
        for line in [
            "sirocco_expert_rows_total{layer=\"1\",expert=\"0\"} 3",
            "sirocco_expert_rows_total{layer=\"1\",expert=\"1\"} 3",
            "sirocco_expert_batch_rows_sum 6",
            "sirocco_expert_held_experts 2",
            "sirocco_expert_calls_waiting 0",
        ] {
            assert!(text.lines().any(|shown| shown == line), "{line} is not in:\n{text}");
        }
        assert_eq!(text.matches("sirocco_expert_rows_total{").count(), 2, "only what is held is shown");
    }

    #[tokio::test]
    async fn requests_wait_until_the_thread_takes_them() {
        let (jobs, mut queue) = mpsc::channel(QUEUE);
        let batcher = Batcher::over(jobs);
        let mut waiting = std::pin::pin!(batcher.run(request(&[])).unwrap());
        assert!(futures::poll!(&mut waiting).is_pending());
        assert_eq!(batcher.queued(), 1);
        queue.recv().await.unwrap();
        assert_eq!(batcher.queued(), 0);
    }

    #[tokio::test]
    async fn what_waits_takes_bounded_memory_and_gives_it_back() {
        let (jobs, mut queue) = mpsc::channel(QUEUE);
        let batcher = Batcher::over(jobs);
        // 3 rows, and 2^24 more to answer, of 16 f32: a little over 1 GiB.
        let large = || request(&[(0, &vec![0; 1 << 24])]);
        let mut first = std::pin::pin!(batcher.run(large()).unwrap());
        assert!(futures::poll!(&mut first).is_pending());
        let refusal = batcher.run(large()).err().unwrap();
        assert_eq!(refusal.reason, RefusalReason::Unavailable);
        assert!(refusal.message.contains("1048577 KiB, of 2097152 KiB for requests 1048575 are free"), "{refusal}");
        assert!(batcher.run(request(&[(0, &[0])])).is_ok(), "what is small still fits");
        drop(queue.recv().await.unwrap());
        assert!(batcher.run(large()).is_ok(), "answered or dropped, it takes nothing any more");
    }

    #[tokio::test]
    async fn what_is_too_late_is_not_run_and_says_so() {
        let (jobs, mut queue) = mpsc::channel(QUEUE);
        let batcher = Batcher::over(jobs);
        let of = |deadline| DispatchRequest { deadline, ..request(&[(0, &[0])]) };
        let late = batcher.run(of(Some(std::time::Duration::ZERO))).unwrap();
        let _patient = batcher.run(of(Some(std::time::Duration::from_hours(1)))).unwrap();
        let left = batcher.run(of(None)).unwrap();
        drop(left);
        let held = Held::default();
        let mut started = Vec::new();
        for _ in 0..3 {
            started.push(Running::start(queue.recv().await.unwrap(), &held).is_some());
        }
        assert_eq!(started, [false, true, false], "nor is what nobody waits for any more");
        assert_eq!(late.await.unwrap_err().reason, RefusalReason::DeadlineExceeded);
    }
}
