//! Runs experts on a compute thread of its own, each expert once for all the requests that wait for it.
//!
//! The thread takes every job that is queued, whichever router sent it, has the backend run each expert over all of its rows
//! together and deals the results back. A row's result does not depend on the rows beside it. When the backend fails, the
//! requests of that batch are refused; when its device is lost, the node is told. Never blocks the I/O runtime.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use arc_swap::ArcSwap;
use sirocco_compute::{Batch, DeviceError, ExpertBackend, ExpertWeights, Part};
use sirocco_proto::Rows;
use sirocco_proto::expert::{DispatchRequest, ExpertOutputs, Refusal, RefusalReason};
use sirocco_types::{ExpertId, ExpertKey};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio_util::sync::CancellationToken;

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
    /// Starts the thread. It runs what `held` has at the time, says in `metrics` what it did, and cancels `lost` when the
    /// backend's device is.
    pub(crate) fn start(
        held: Arc<ArcSwap<Held>>,
        metrics: Arc<Metrics>,
        backend: Arc<dyn ExpertBackend>,
        lost: CancellationToken,
    ) -> std::io::Result<(Self, JoinHandle<()>)> {
        let (jobs, queue) = mpsc::channel(QUEUE);
        let thread = std::thread::Builder::new().name("experts".into());
        let thread = thread.spawn(move || run(queue, &held, &metrics, &*backend, &lost))?;
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

fn run(
    mut queue: mpsc::Receiver<Job>,
    held: &ArcSwap<Held>,
    metrics: &Metrics,
    backend: &dyn ExpertBackend,
    lost: &CancellationToken,
) {
    let mut jobs = Vec::with_capacity(QUEUE);
    while queue.blocking_recv_many(&mut jobs, QUEUE) > 0 {
        let begun = Instant::now();
        let held = held.load();
        let mut started: Vec<Running> = jobs.drain(..).filter_map(|job| Running::start(job, &held)).collect();
        match run_batch(&mut started, &held, metrics, backend) {
            Ok(()) => started.into_iter().for_each(Running::finish),
            Err(error) => {
                tracing::error!(%error, requests = started.len(), "a batch failed");
                if matches!(error, DeviceError::Lost { .. }) {
                    lost.cancel();
                }
                for running in started {
                    running.refuse(&error);
                }
            }
        }
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

    fn refuse(self, error: &DeviceError) {
        let reason = match error {
            DeviceError::OutOfMemory { .. } => RefusalReason::Unavailable,
            _ => RefusalReason::Internal,
        };
        let _ = self.job.answer.send(Err(Refusal::new(reason, error.to_string())));
    }
}

/// Where rows of a part go.
struct Share {
    job: usize,
    /// Which of the part's rows is the first of them.
    first: usize,
    /// How many.
    rows: usize,
    /// Where they begin in the job's rows.
    start: usize,
}

/// Runs every expert that is held over its rows of all `jobs`.
fn run_batch(
    jobs: &mut [Running],
    held: &Held,
    metrics: &Metrics,
    backend: &dyn ExpertBackend,
) -> Result<(), DeviceError> {
    let Some(width) = jobs.first().map(|running| running.job.request.hidden_states.width()) else { return Ok(()) };
    // The hidden states of all jobs, one job after the other: where each job's begin.
    let begins: Vec<usize> = jobs
        .iter()
        .scan(0, |next, running| {
            let begin = *next;
            *next += running.job.request.hidden_states.len();
            Some(begin)
        })
        .collect();
    let mut work: BTreeMap<ExpertKey, (Part, Vec<Share>)> = BTreeMap::new();
    for (job, running) in jobs.iter().enumerate() {
        let request = &running.job.request;
        for (part, start) in request.experts.iter().zip(&running.experts) {
            let Ok(start) = *start else { continue };
            let key = ExpertKey { layer: request.layer, expert: part.expert };
            let new = || (Part { weights: &held[&key], rows: Vec::new() }, Vec::new());
            let (of_expert, shares) = work.entry(key).or_insert_with(new);
            shares.push(Share { job, first: of_expert.rows.len(), rows: part.rows.len(), start });
            of_expert.rows.extend(part.rows.iter().map(|&row| begins[job] + row as usize));
        }
    }
    let mut outputs: Vec<Vec<f32>> = jobs.iter_mut().map(|running| std::mem::take(&mut running.rows)).collect();
    let (keys, work): (Vec<_>, Vec<_>) = work.into_iter().unzip();
    let (parts, shares): (Vec<Part>, Vec<Vec<Share>>) = work.into_iter().unzip();
    let append = |row: usize, out: &mut Vec<f32>| {
        let job = begins.partition_point(|begin| *begin <= row) - 1;
        jobs[job].job.request.hidden_states.append_row(row - begins[job], out);
    };
    backend.run(&Batch { append: &append, parts: &parts }, &mut |part, first, rows| {
        let last = first + rows.len() / width;
        for share in &shares[part] {
            let (from, to) = (first.max(share.first), last.min(share.first + share.rows));
            if from < to {
                let target = &mut outputs[share.job][(share.start + from - share.first) * width..];
                target[..(to - from) * width].copy_from_slice(&rows[(from - first) * width..(to - first) * width]);
            }
        }
    })?;
    for (key, part) in keys.into_iter().zip(&parts) {
        metrics.ran(key, part.rows.len());
    }
    for (running, rows) in jobs.iter_mut().zip(outputs) {
        running.rows = rows;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use sirocco_compute::{CpuBackend, ExpertMatrix, Pool};
    use sirocco_process::http::Health;
    use sirocco_process::metrics::Page;
    use sirocco_proto::expert::ExpertRows;
    use sirocco_types::{ExpertDtype, Fingerprint, LayerId, LoadCounters, ModelSpec};

    use super::*;
    use crate::testing::{self, Odd, Way};

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

    fn cpu() -> CpuBackend {
        let (pool, dtype) = (Pool::new(1).unwrap(), ExpertDtype::Bf16);
        CpuBackend { pool, dtype, hidden_size: HIDDEN, intermediate_size: HIDDEN }
    }

    fn key(expert: u32) -> ExpertKey {
        ExpertKey { layer: LayerId(1), expert: ExpertId(expert) }
    }

    /// Experts 0 and 1 of layer 1.
    fn held() -> Arc<ArcSwap<Held>> {
        let mut packer = cpu().packer().unwrap();
        for matrix in ExpertMatrix::ALL {
            packer.push_rows(matrix, &[0; 2 * HIDDEN * HIDDEN]);
        }
        let weights = Arc::new(packer.finish().unwrap());
        Arc::new(ArcSwap::from_pointee(Held::from([(key(0), Arc::clone(&weights)), (key(1), weights)])))
    }

    fn metrics(page: &Page) -> Arc<Metrics> {
        let spec = ModelSpec { num_hidden_layers: 3, num_local_experts: 8, ..testing::spec() };
        Arc::new(Metrics::new(page, &spec))
    }

    #[tokio::test]
    async fn what_ran_is_counted_by_expert_and_what_was_refused_is_not() {
        let page = Page::new(&Health::new("expert-node", "e"));
        let (metrics, held) = (metrics(&page), held());
        let (backend, lost) = (Arc::new(cpu()), CancellationToken::new());
        let (batcher, thread) = Batcher::start(Arc::clone(&held), Arc::clone(&metrics), backend, lost).unwrap();
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
    async fn a_batch_that_fails_is_refused_whole_and_only_a_lost_device_is_the_end_of_the_node() {
        let device = || "cuda:0".to_owned();
        let cases = [
            (
                DeviceError::OutOfMemory { device: device(), what: "a batch", bytes: 7 },
                RefusalReason::Unavailable,
                false,
            ),
            (
                DeviceError::Call { device: device(), call: "cuLaunchKernel", problem: "no".into() },
                RefusalReason::Internal,
                false,
            ),
            (
                DeviceError::Lost { device: device(), call: "cuStreamSynchronize", problem: "gone".into() },
                RefusalReason::Internal,
                true,
            ),
        ];
        for (error, reason, is_lost) in cases {
            let page = Page::new(&Health::new("expert-node", "e"));
            let (metrics, lost) = (metrics(&page), CancellationToken::new());
            let backend = Arc::new(Odd(cpu(), Way::Fails(error.clone())));
            let (batcher, thread) = Batcher::start(held(), Arc::clone(&metrics), backend, lost.clone()).unwrap();
            let refusal = batcher.run(request(&[(0, &[0]), (1, &[1])])).unwrap().await.unwrap_err();
            assert_eq!((refusal.reason, refusal.message), (reason, error.to_string()));
            drop(batcher);
            thread.join().unwrap();
            assert_eq!(lost.is_cancelled(), is_lost);
            let LoadCounters::Expert { batches, .. } = metrics.load(0) else { panic!("an expert node's counters") };
            assert_eq!(batches, 0, "what was not answered is not counted");
        }
    }

    #[tokio::test]
    async fn rows_come_back_to_the_request_that_sent_them_however_the_backend_hands_them_out() {
        let page = Page::new(&Health::new("expert-node", "e"));
        let (metrics, held) = (metrics(&page), held());
        let numbered = |request: DispatchRequest, first: usize| {
            let states = (first..first + 3).flat_map(|row| [row as f32; HIDDEN]).collect();
            DispatchRequest { hidden_states: Rows::new(states, HIDDEN), ..request }
        };
        let asked = [&[(0, &[2, 0][..]), (1, &[1, 1])][..], &[], &[(1, &[0]), (5, &[2]), (0, &[1, 2])]];
        let (answers, mut jobs): (Vec<_>, Vec<_>) = asked
            .iter()
            .enumerate()
            .map(|(index, experts)| {
                let (answer, answered) = oneshot::channel();
                let room = Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap();
                let request = numbered(request(experts), 3 * index);
                let job = Job { request, expires: None, answer, _room: room };
                (answered, Running::start(job, &held.load()).unwrap())
            })
            .unzip();
        run_batch(&mut jobs, &held.load(), &metrics, &Odd(cpu(), Way::Backwards)).unwrap();
        jobs.into_iter().for_each(Running::finish);
        let expected = [&[2, 0, 1, 1][..], &[], &[6, 7, 8]];
        for (answer, expected) in answers.into_iter().zip(expected) {
            let rows = answer.await.unwrap().unwrap().rows;
            let mut got = Vec::new();
            (0..rows.len()).for_each(|row| rows.append_row(row, &mut got));
            let want: Vec<f32> = expected.iter().flat_map(|&row| [row as f32; HIDDEN]).collect();
            assert_eq!(got, want);
        }
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
