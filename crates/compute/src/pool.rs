//! The threads a node computes with, and the instruction set they compute in.
//!
//! Work is a number of tasks that an atomic counter hands out; the thread that asks for it takes part. Workers watch for more
//! work for a few tens of microseconds after the last, unless somebody else wants their core, then sleep: an idle pool takes no
//! processor time. One caller's work runs at a time, others wait their turn. A worker that wakes too late for a job is not waited
//! for.

use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

use crate::Isa;
use crate::disjoint::Disjoint;

/// How long a thread watches for what comes next before it sleeps. The next multiplication of a forward pass comes within it.
const WATCH: Duration = Duration::from_micros(40);

/// Longer than offering the core to others takes when nobody wants it.
const WANTED: Duration = Duration::from_micros(5);

/// A fixed set of compute threads, cheap to clone. Work is split over outputs, so their number never changes a result.
#[derive(Clone, Debug)]
pub struct Pool {
    /// None when one thread is enough: work then runs where it is asked for.
    crew: Option<Arc<Crew>>,
    isa: Isa,
}

impl Pool {
    /// A pool of `threads` threads (at least one), of which the caller of each piece of work is one, computing in the best
    /// instruction set here. Errors when the system has no more threads to give.
    pub fn new(threads: usize) -> std::io::Result<Self> {
        Self::with_isa(threads, Isa::best())
    }

    /// The same, computing in `isa`: slower or as fast, and the same bits. Panics when this machine does not have it.
    pub fn with_isa(threads: usize, isa: Isa) -> std::io::Result<Self> {
        assert!(isa.is_available(), "this machine has no {isa:?}");
        let crew = if threads > 1 { Some(Arc::new(Crew::start(threads - 1)?)) } else { None };
        Ok(Self { crew, isa })
    }

    /// Number of threads.
    pub fn threads(&self) -> usize {
        self.crew.as_ref().map_or(1, |crew| crew.workers.len() + 1)
    }

    /// What this pool's threads compute in; this machine has it.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Runs `task` for every index below `count`, spread over the threads when `work` (multiply-adds in all) is worth it.
    /// A task may ask for more, which then runs where it is. Panics when a task does.
    pub(crate) fn for_each(&self, count: usize, work: usize, task: impl Fn(usize) + Sync) {
        /// Below this many multiply-adds, waking a thread costs more than it saves.
        const WORTH_IT: usize = 1 << 17;
        match &self.crew {
            Some(crew) if count > 1 && work >= WORTH_IT && !INSIDE.get() => crew.run(count, &task),
            _ => (0..count).for_each(task),
        }
    }

    /// Runs `task` for every row of `out`, `[rows, width]`, spread over the threads when `work` is worth it. The last row may
    /// be shorter.
    pub(crate) fn for_each_row(
        &self,
        out: &mut [f32],
        width: usize,
        work: usize,
        task: impl Fn(usize, &mut [f32]) + Sync,
    ) {
        let len = out.len();
        let out = Disjoint::new(out);
        self.for_each(len.div_ceil(width), work, |index| {
            let start = index * width;
            // SAFETY: every index is handed out once, and its row is its own.
            task(index, unsafe { out.slice(start, width.min(len - start)) });
        });
    }
}

thread_local! {
    /// Whether this thread is running a task of some pool.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// The threads of a pool besides the caller.
#[derive(Debug)]
struct Crew {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Held by the caller whose work runs.
    turn: Mutex<()>,
}

/// What callers and workers share.
#[derive(Debug)]
struct Shared {
    /// `job number << 32 | OPEN | workers in it`
    state: Apart<AtomicU64>,
    /// The next index to hand out.
    next: Apart<AtomicUsize>,
    /// Written by the caller between jobs, read by workers counted in `state`.
    job: UnsafeCell<Option<Job>>,
    /// The first panic of the job.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    /// Which workers sleep.
    asleep: Box<[AtomicBool]>,
    stop: AtomicBool,
}

/// In `state`: workers may join the job.
const OPEN: u64 = 1 << 31;
/// In `state`: workers in the job.
const WORKERS: u64 = OPEN - 1;

/// A value in cache lines of its own: two, for processors fetch them in pairs.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Apart<T>(T);

struct Job {
    task: *const (dyn Fn(usize) + Sync),
    count: usize,
    caller: Thread,
}

impl std::fmt::Debug for Job {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "a job of {} tasks", self.count)
    }
}

// SAFETY: `job` is written only by the caller whose turn it is while no worker is counted in `state`, and read only by those
// that are; the task behind it is `Sync` and outlives the job, for the caller waits until all have left.
unsafe impl Sync for Shared {}
// SAFETY: as above; nothing in it is bound to a thread.
unsafe impl Send for Shared {}

impl Crew {
    fn start(workers: usize) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            state: Apart::default(),
            next: Apart::default(),
            job: UnsafeCell::new(None),
            panic: Mutex::default(),
            asleep: (0..workers).map(|_| AtomicBool::new(false)).collect(),
            stop: AtomicBool::new(false),
        });
        let mut crew = Self { shared, workers: Vec::new(), turn: Mutex::default() };
        for index in 0..workers {
            let shared = Arc::clone(&crew.shared);
            let worker = std::thread::Builder::new().name(format!("compute-{index}"));
            crew.workers.push(worker.spawn(move || shared.serve(index))?);
        }
        Ok(crew)
    }

    /// Runs `task` for every index below `count` and returns when all are done.
    fn run<'a>(&self, count: usize, task: &'a (dyn Fn(usize) + Sync + 'a)) {
        let shared = &*self.shared;
        let turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the pointer is not followed after this call, which `task` outlives.
        let task =
            unsafe { std::mem::transmute::<&'a (dyn Fn(usize) + Sync + 'a), *const (dyn Fn(usize) + Sync)>(task) };
        // SAFETY: it is this caller's turn, and the last caller waited until no worker was in its job.
        let job = unsafe { (*shared.job.get()).insert(Job { task, count, caller: std::thread::current() }) };
        shared.next.0.store(0, Relaxed);
        let number = (shared.state.0.load(Relaxed) >> 32) + 1;
        shared.state.0.store((number << 32) | OPEN, SeqCst);
        for (asleep, worker) in shared.asleep.iter().zip(&self.workers).take(count - 1) {
            if asleep.swap(false, SeqCst) {
                worker.thread().unpark();
            }
        }
        shared.work(job);
        shared.state.0.fetch_and(!OPEN, AcqRel);
        let mut watch = Watch::default();
        while shared.state.0.load(Acquire) & WORKERS != 0 {
            if watch.is_over() {
                std::thread::park();
            }
        }
        let panic = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(turn);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        self.shared.stop.store(true, SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker catches what its tasks throw, so there is no panic to pass on.
            let _ = worker.join();
        }
    }
}

impl Shared {
    /// The life of worker `index`.
    fn serve(&self, index: usize) {
        let mut last = 0;
        let mut watch = Watch::default();
        while !self.stop.load(SeqCst) {
            if let Some(number) = self.join(last) {
                last = number;
                // SAFETY: this worker is counted in `state`, so no caller writes the job before it leaves.
                let job = unsafe { (*self.job.get()).as_ref() }.expect("an open job is written");
                self.work(job);
                let caller = job.caller.clone();
                if self.state.0.fetch_sub(1, AcqRel) & (OPEN | WORKERS) == 1 {
                    caller.unpark();
                }
                watch = Watch::default();
            } else if watch.is_over() {
                self.asleep[index].store(true, SeqCst);
                if !is_news(self.state.0.load(SeqCst), last) && !self.stop.load(SeqCst) {
                    std::thread::park();
                }
                self.asleep[index].store(false, SeqCst);
                watch = Watch::default();
            }
        }
    }

    /// Joins the job when one is open that is not `last`; gives its number.
    fn join(&self, last: u64) -> Option<u64> {
        let mut state = self.state.0.load(Acquire);
        while is_news(state, last) {
            match self.state.0.compare_exchange_weak(state, state + 1, Acquire, Acquire) {
                Ok(_) => return Some(state >> 32),
                Err(now) => state = now,
            }
        }
        None
    }

    /// Runs tasks until none is left.
    fn work(&self, job: &Job) {
        // SAFETY: the caller keeps the task alive until every worker has left the job.
        let task = unsafe { &*job.task };
        INSIDE.set(true);
        let result = catch_unwind(AssertUnwindSafe(|| {
            loop {
                let index = self.next.0.fetch_add(1, Relaxed);
                if index >= job.count {
                    break;
                }
                task(index);
            }
        }));
        INSIDE.set(false);
        if let Err(panic) = result {
            self.next.0.store(job.count, Release);
            self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(panic);
        }
    }
}

/// Whether `state` is of an open job other than `last`.
fn is_news(state: u64, last: u64) -> bool {
    state & OPEN != 0 && state >> 32 != last
}

/// Busy waiting that ends.
#[derive(Default)]
struct Watch {
    looks: u32,
    since: Option<Instant>,
}

impl Watch {
    /// Waits a moment; true once [`WATCH`] is over, or somebody else wanted this core.
    fn is_over(&mut self) -> bool {
        std::hint::spin_loop();
        self.looks = self.looks.wrapping_add(1);
        if !self.looks.is_multiple_of(16) {
            return false;
        }
        let now = Instant::now();
        std::thread::yield_now();
        now.elapsed() >= WANTED || *self.since.get_or_insert(now) + WATCH <= now
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MUCH: usize = usize::MAX;

    #[test]
    fn every_task_runs_once_on_any_number_of_threads() {
        for threads in [1, 2, 5] {
            let pool = Pool::new(threads).unwrap();
            assert_eq!(pool.threads(), threads);
            for count in [0, 1, 2, 3, 100, 1000] {
                let runs: Vec<_> = (0..count).map(|_| AtomicUsize::new(0)).collect();
                pool.for_each(count, MUCH, |index| {
                    runs[index].fetch_add(1, Relaxed);
                });
                assert!(runs.iter().all(|runs| runs.load(Relaxed) == 1), "{threads} threads, {count} tasks");
            }
        }
    }

    #[test]
    fn rows_are_handed_out_whole_and_the_last_may_be_short() {
        let mut out = vec![0.0; 11];
        Pool::new(3).unwrap().for_each_row(&mut out, 4, MUCH, |index, row| row.fill((index * 10 + row.len()) as f32));
        assert_eq!(out, [4.0, 4.0, 4.0, 4.0, 14.0, 14.0, 14.0, 14.0, 23.0, 23.0, 23.0]);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_works_on() {
        let pool = Pool::new(3).unwrap();
        for _ in 0..20 {
            let caught = catch_unwind(AssertUnwindSafe(|| {
                pool.for_each(50, MUCH, |index| assert!(index != 17, "seventeen"));
            }));
            assert_eq!(caught.unwrap_err().downcast_ref::<&str>(), Some(&"seventeen"));
            let sum = AtomicUsize::new(0);
            pool.for_each(50, MUCH, |index| {
                sum.fetch_add(index, Relaxed);
            });
            assert_eq!(sum.load(Relaxed), 49 * 50 / 2);
        }
    }

    #[test]
    fn callers_on_many_threads_and_tasks_that_ask_again_all_get_their_work_done() {
        let pool = Pool::new(3).unwrap();
        let sum = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        pool.for_each(7, MUCH, |_| {
                            pool.for_each(3, MUCH, |_| {
                                sum.fetch_add(1, Relaxed);
                            });
                        });
                    }
                });
            }
        });
        assert_eq!(sum.load(Relaxed), 4 * 50 * 7 * 3);
    }

    #[test]
    fn idle_workers_sleep_and_wake_again() {
        let pool = Pool::new(2).unwrap();
        let shared = Arc::clone(&pool.crew.as_ref().unwrap().shared);
        for _ in 0..3 {
            let deadline = Instant::now() + Duration::from_secs(10);
            while !shared.asleep[0].load(SeqCst) {
                assert!(Instant::now() < deadline, "the worker never slept");
                std::thread::yield_now();
            }
            // Two tasks that wait for each other: both threads must come.
            let meet = std::sync::Barrier::new(2);
            pool.for_each(2, MUCH, |_| {
                meet.wait();
            });
        }
    }
}
