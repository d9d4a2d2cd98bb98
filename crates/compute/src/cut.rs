//! How the panels of a matrix are cut into tasks for the threads of a pool.

use crate::Pool;

/// Panels of a stream at most: where one stream ends and another begins, memory has nothing to do for a while.
const LENGTH: usize = 8;

/// Large tasks first and ever smaller ones, so that all threads end at about the same time.
#[derive(Debug)]
pub(crate) struct Cut {
    /// The first panel of each task, and the number of panels.
    starts: Vec<usize>,
}

impl Cut {
    /// Tasks of multiples of `streams` panels, at most `longest`; the last may have fewer.
    pub(crate) fn new(panels: usize, streams: usize, longest: usize, pool: &Pool) -> Self {
        let mut starts = vec![0];
        let mut first = 0;
        while first < panels {
            let part = (panels - first) * 2 / (3 * pool.threads()) / streams * streams;
            first = panels.min(first + part.clamp(streams, longest));
            starts.push(first);
        }
        Self { starts }
    }

    /// Tasks of `streams` that are read side by side, which are as long as all threads having some allows.
    pub(crate) fn streams(panels: usize, streams: usize, pool: &Pool) -> Self {
        Self::new(panels, streams, streams * LENGTH, pool)
    }

    /// How many tasks there are.
    pub(crate) fn tasks(&self) -> usize {
        self.starts.len() - 1
    }

    /// The first panel of a task, and how many it has.
    pub(crate) fn task(&self, index: usize) -> (usize, usize) {
        (self.starts[index], self.starts[index + 1] - self.starts[index])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_panel_is_in_one_task() {
        let pool = Pool::new(2).unwrap();
        for panels in 0..300 {
            for streams in [1, 2, 4] {
                let other = Cut::new(panels, streams, 4, &pool);
                for cut in [Cut::streams(panels, streams, &pool), other] {
                    let mut next = 0;
                    for task in 0..cut.tasks() {
                        let (first, count) = cut.task(task);
                        assert!(first == next && count > 0, "{cut:?}, task {task}");
                        next += count;
                    }
                    assert_eq!(next, panels, "{cut:?}");
                }
            }
        }
    }

    #[test]
    fn tasks_have_streams_of_as_many_panels_and_end_with_small_ones() {
        let sizes = |panels, threads| -> Vec<usize> {
            let cut = Cut::streams(panels, 4, &Pool::new(threads).unwrap());
            (0..cut.tasks()).map(|task| cut.task(task).1).collect()
        };
        assert_eq!(sizes(224, 2), [32, 32, 32, 32, 32, 20, 12, 8, 8, 4, 4, 4, 4]);
        assert_eq!(sizes(33, 2), [8, 8, 4, 4, 4, 4, 1]);
        assert_eq!(sizes(60, 1), [32, 16, 8, 4]);
    }
}
