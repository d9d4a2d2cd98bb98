//! How expert nodes have answered lately: what an answer usually takes, and which nodes not to count on for a while.
//!
//! Pure arithmetic over times that callers give. What is usual is learned over all nodes together, so that one slow node does not
//! make slowness usual.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// An answer is late when it takes this many times what is usual.
const LATE: f64 = 8.0;
/// Nothing is late before this: schedulers and networks hiccup.
const LEAST_PATIENCE: Duration = Duration::from_millis(20);
/// What is late while nothing is known.
const FIRST_PATIENCE: Duration = Duration::from_secs(1);
/// How much one answer moves what is usual, up or down.
const STEP: f64 = 1.0 / 16.0;
/// Sizes of calls that are told apart: up to 1, 2, 4, ... rows.
const SIZES: usize = 20;

/// A node that is late this often in a row is suspended.
const STRIKES: u32 = 3;
/// How long the first suspension lasts, and the longest after doubling.
const SUSPENSION: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// For how many calls one may be asked of a second node because the first is late.
const CALLS_PER_HEDGE: i64 = 20;
/// Hedges that may be saved up.
const HEDGES: i64 = 16;

/// For how many calls one may be repeated at once because a node refused or failed.
const CALLS_PER_RETRY: i64 = 5;
/// Repeated calls that may be saved up.
const RETRIES: i64 = 64;

/// What an answer usually takes, by the number of rows asked for.
#[derive(Debug, Default)]
pub(crate) struct Usual {
    /// Medians in seconds of a node of ordinary speed; 0: none known.
    medians: Mutex<[f64; SIZES]>,
}

impl Usual {
    /// A call for `rows` rows took `time` on a node of `speed` percent.
    pub(crate) fn took(&self, rows: usize, speed: u32, time: Duration) {
        let seconds = time.as_secs_f64() * f64::from(speed) / 100.0;
        let mut medians = self.medians.lock().unwrap_or_else(PoisonError::into_inner);
        let median = &mut medians[size(rows)];
        // Frugal streaming median: as many answers above as below keep it where it is. Source: arXiv 1407.1121.
        *median = match *median {
            known if known <= 0.0 => seconds,
            known if seconds > known => known * (1.0 + STEP),
            known => known * (1.0 - STEP),
        };
    }

    /// How long an answer to `rows` rows may take on a node of `speed` percent before it is late.
    pub(crate) fn patience(&self, rows: usize, speed: u32) -> Duration {
        let medians = self.medians.lock().unwrap_or_else(PoisonError::into_inner);
        let own = size(rows);
        // A call of another size takes at most as much more as it has more rows.
        let scaled = |other: usize| medians[other] * (1_u64 << own.saturating_sub(other)) as f64;
        let nearest = (0..SIZES).filter(|other| medians[*other] > 0.0).min_by_key(|other| other.abs_diff(own));
        nearest.map_or(FIRST_PATIENCE, |nearest| {
            Duration::from_secs_f64(scaled(nearest) * LATE * 100.0 / f64::from(speed)).max(LEAST_PATIENCE)
        })
    }
}

/// Which of the sizes `rows` is.
fn size(rows: usize) -> usize {
    (rows.max(1).next_power_of_two().ilog2() as usize).min(SIZES - 1)
}

/// How one node has answered lately.
#[derive(Debug, Default)]
pub(crate) struct Standing(Mutex<Record>);

#[derive(Debug, Default)]
struct Record {
    /// Late or failed calls in a row.
    strikes: u32,
    /// Suspensions in a row.
    suspensions: u32,
    until: Option<Instant>,
}

impl Standing {
    /// It answered in time.
    pub(crate) fn answered(&self) {
        *self.record() = Record::default();
    }

    /// It is late, or failed. Returns whether it is suspended for that.
    pub(crate) fn failed(&self, now: Instant) -> bool {
        let mut record = self.record();
        record.strikes += 1;
        if record.strikes < STRIKES || record.until.is_some_and(|until| now < until) {
            return false;
        }
        let time = SUSPENSION.0.saturating_mul(1 << record.suspensions.min(16)).min(SUSPENSION.1);
        record.until = Some(now + time);
        record.suspensions += 1;
        // The first call after it decides.
        record.strikes = STRIKES - 1;
        true
    }

    /// Whether others should be asked instead, if there are others.
    pub(crate) fn suspended(&self, now: Instant) -> bool {
        self.record().until.is_some_and(|until| now < until)
    }

    fn record(&self) -> MutexGuard<'_, Record> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How many more calls may be made beside those that each layer needs, so that a cluster that is slow or sick as a whole is not
/// asked again and again for all.
#[derive(Debug)]
pub(crate) struct Budget {
    /// For how many calls one more may be made.
    calls: i64,
    /// Calls earned and not spent; less than none after more than was saved up had to be made at once.
    saved: Mutex<i64>,
    most: i64,
}

impl Budget {
    /// That of calls to a second node because the first is late.
    pub(crate) fn of_hedges() -> Self {
        Self::new(CALLS_PER_HEDGE, HEDGES)
    }

    /// That of calls repeated at once.
    pub(crate) fn of_retries() -> Self {
        Self::new(CALLS_PER_RETRY, RETRIES)
    }

    fn new(calls: i64, most: i64) -> Self {
        Self { calls, saved: Mutex::new(most * calls), most: most * calls }
    }

    /// A call was made that had to be.
    pub(crate) fn earn(&self) {
        let mut saved = self.saved();
        *saved = (*saved + 1).min(self.most);
    }

    /// Whether one more may be made.
    pub(crate) fn allows(&self) -> bool {
        *self.saved() >= self.calls
    }

    /// One more was made, whether it was allowed or had to be.
    pub(crate) fn spend(&self) {
        let mut saved = self.saved();
        *saved = (*saved - self.calls).max(-self.most);
    }

    fn saved(&self) -> MutexGuard<'_, i64> {
        self.saved.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn one_slow_node_of_three_does_not_make_slowness_usual() {
        let usual = Usual::default();
        assert_eq!(usual.patience(1, 100), FIRST_PATIENCE);
        for _ in 0..200 {
            usual.took(1, 100, 5 * MS);
            usual.took(1, 50, 10 * MS);
            usual.took(1, 100, 55 * MS);
        }
        let patience = usual.patience(1, 100);
        assert!((30 * MS..60 * MS).contains(&patience), "{patience:?}");
        assert!(usual.patience(1, 50) > patience * 3 / 2, "a node of half the speed may take twice as long");
        assert!(usual.patience(64, 100) >= patience * 63, "64 rows may take 64 times as long");
    }

    #[test]
    fn a_hiccup_of_a_fast_cluster_is_not_late() {
        let usual = Usual::default();
        usual.took(1, 100, MS / 10);
        assert_eq!(usual.patience(1, 100), LEAST_PATIENCE);
    }

    #[test]
    fn a_node_that_is_late_three_times_running_is_suspended_and_then_tried_with_one_call() {
        let (standing, now) = (Standing::default(), Instant::now());
        assert!(!standing.failed(now) && !standing.failed(now) && !standing.suspended(now));
        standing.answered();
        assert!(!standing.failed(now) && !standing.failed(now) && standing.failed(now));
        let during = now + SUSPENSION.0 / 2;
        assert!(standing.suspended(during) && !standing.failed(during));
        let after = now + SUSPENSION.0;
        assert!(!standing.suspended(after) && standing.failed(after), "one more is enough");
        assert!(standing.suspended(after + SUSPENSION.0 * 3 / 2), "and counts for longer");
        standing.answered();
        assert!(!standing.suspended(after) && !standing.failed(after));
    }

    #[test]
    fn for_long_there_is_one_more_call_for_as_many_as_earn_it() {
        for (budget, calls, most) in
            [(Budget::of_hedges(), CALLS_PER_HEDGE, HEDGES), (Budget::of_retries(), CALLS_PER_RETRY, RETRIES)]
        {
            let take = || {
                let allowed = budget.allows();
                if allowed {
                    budget.spend();
                }
                allowed
            };
            assert_eq!(i64::try_from((0..1000).filter(|_| take()).count()), Ok(most));
            let more = (0..2000).filter(|_| {
                budget.earn();
                take()
            });
            assert_eq!(i64::try_from(more.count()), Ok(2000 / calls));
        }
    }
}
