//! The threads a node computes with.

use std::sync::Arc;

use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuildError, ThreadPoolBuilder};

/// A fixed set of compute threads, cheap to clone. Work is split over outputs, so their number never changes a result.
#[derive(Clone, Debug)]
pub struct Pool {
    /// None when one thread is enough: work then runs where it is asked for.
    threads: Option<Arc<ThreadPool>>,
}

impl Pool {
    /// Starts `threads` threads (at least one). Errors when the system has no more threads to give.
    pub fn new(threads: usize) -> Result<Self, ThreadPoolBuildError> {
        if threads <= 1 {
            return Ok(Self { threads: None });
        }
        let name = |index| format!("compute-{index}");
        let pool = ThreadPoolBuilder::new().num_threads(threads).thread_name(name).build()?;
        Ok(Self { threads: Some(Arc::new(pool)) })
    }

    /// Number of threads.
    pub fn threads(&self) -> usize {
        self.threads.as_ref().map_or(1, |pool| pool.current_num_threads())
    }

    /// Runs `task` for every index below `count`, spread over the threads when `work` (multiply-adds in all) is worth it.
    pub(crate) fn for_each(&self, count: usize, work: usize, task: impl Fn(usize) + Sync) {
        match self.worth_it(count, work) {
            Some(pool) => pool.install(|| (0..count).into_par_iter().for_each(&task)),
            None => (0..count).for_each(task),
        }
    }

    /// Runs `task` for every row of `out`, `[rows, width]`, spread over the threads when `work` is worth it.
    pub(crate) fn for_each_row(
        &self,
        out: &mut [f32],
        width: usize,
        work: usize,
        task: impl Fn(usize, &mut [f32]) + Sync,
    ) {
        match self.worth_it(out.len() / width, work) {
            Some(pool) => pool.install(|| {
                out.par_chunks_exact_mut(width).enumerate().for_each(|(index, row)| task(index, row));
            }),
            None => out.chunks_exact_mut(width).enumerate().for_each(|(index, row)| task(index, row)),
        }
    }

    /// The threads, when there are several and enough to do for them.
    fn worth_it(&self, count: usize, work: usize) -> Option<&ThreadPool> {
        /// Below this many multiply-adds, waking a thread costs more than it saves.
        const WORTH_IT: usize = 1 << 22;
        self.threads.as_deref().filter(|_| count > 1 && work >= WORTH_IT)
    }
}
