//! What a caller took in the last minute, as a bucket that leaks: it holds one minute's limit and drains at the limit's rate. In
//! whole numbers, so that nothing is lost to rounding. Never reads a clock.

use std::num::NonZeroU32;
use std::time::{Duration, Instant};

/// Parts in which the level is kept: one unit is as many as a minute has nanoseconds, so that each nanosecond drains as many
/// as the limit has units.
const UNIT: u128 = Duration::from_mins(1).as_nanos();

/// How full a bucket is. Its limit is passed to each call, because it may change while the bucket is in use.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bucket {
    level: u128,
    /// When `level` was right.
    at: Instant,
}

impl Bucket {
    /// An empty bucket.
    pub(super) fn new(now: Instant) -> Self {
        Self { level: 0, at: now }
    }

    /// Takes `amount` if the minute's `limit` has room for it. If not, takes nothing and says after what time it would; never
    /// for more than the whole limit.
    pub(super) fn take(&mut self, limit: NonZeroU32, amount: u32, now: Instant) -> Result<(), Duration> {
        self.drain(limit, now);
        let per_nanosecond = u128::from(limit.get());
        let (after, capacity) = (self.level + u128::from(amount) * UNIT, per_nanosecond * UNIT);
        if after > capacity {
            return Err(nanoseconds((after - capacity).div_ceil(per_nanosecond)));
        }
        self.level = after;
        Ok(())
    }

    /// Takes `amount`, whether there is room for it or not.
    pub(super) fn charge(&mut self, limit: NonZeroU32, amount: u32, now: Instant) {
        self.drain(limit, now);
        self.level += u128::from(amount) * UNIT;
    }

    /// Gives `amount` back.
    pub(super) fn refund(&mut self, amount: u32) {
        self.level = self.level.saturating_sub(u128::from(amount) * UNIT);
    }

    /// Whole units that can be taken now, and the time until the bucket is empty.
    pub(super) fn left(&mut self, limit: NonZeroU32, now: Instant) -> (u32, Duration) {
        self.drain(limit, now);
        let per_nanosecond = u128::from(limit.get());
        let room = (per_nanosecond * UNIT).saturating_sub(self.level) / UNIT;
        (room as u32, nanoseconds(self.level.div_ceil(per_nanosecond)))
    }

    fn drain(&mut self, limit: NonZeroU32, now: Instant) {
        let passed = now.saturating_duration_since(self.at).as_nanos();
        self.level = self.level.saturating_sub(passed * u128::from(limit.get()));
        self.at = self.at.max(now);
    }
}

fn nanoseconds(count: u128) -> Duration {
    Duration::from_nanos(u64::try_from(count).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn no_more_is_taken_than_the_limit_and_every_refusal_tells_the_truth(
            limit in 1u32..500,
            steps in prop::collection::vec((0u64..20_000, 1u32..40), 1..200),
        ) {
            let limit = NonZeroU32::new(limit).unwrap();
            let start = Instant::now();
            let (mut bucket, mut now, mut taken) = (Bucket::new(start), start, 0u128);
            for (pause_ms, amount) in steps {
                now += Duration::from_millis(pause_ms);
                match bucket.take(limit, amount, now) {
                    Ok(()) => taken += u128::from(amount),
                    Err(wait) if amount <= limit.get() => {
                        let mut early = bucket;
                        prop_assert!(early.take(limit, amount, now + wait.saturating_sub(Duration::from_nanos(1))).is_err());
                        now += wait;
                        prop_assert_eq!(bucket.take(limit, amount, now), Ok(()));
                        taken += u128::from(amount);
                    }
                    Err(_) => {}
                }
                let drained = (now - start).as_nanos() * u128::from(limit.get());
                prop_assert!(taken * UNIT <= u128::from(limit.get()) * UNIT + drained);
            }
        }
    }

    #[test]
    fn what_is_charged_beyond_the_limit_is_waited_for() {
        let (limit, start) = (NonZeroU32::new(60).unwrap(), Instant::now());
        let mut bucket = Bucket::new(start);
        bucket.charge(limit, 90, start);
        assert_eq!(bucket.left(limit, start), (0, Duration::from_secs(90)));
        assert_eq!(bucket.take(limit, 1, start), Err(Duration::from_secs(31)));
        bucket.refund(30);
        assert_eq!(bucket.take(limit, 1, start), Err(Duration::from_secs(1)));
        assert_eq!(bucket.left(limit, start + Duration::from_secs(20)), (20, Duration::from_secs(40)));
    }
}
