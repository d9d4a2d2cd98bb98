//! Waiting longer after each failure in a row.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::Duration;

const FIRST: Duration = Duration::from_millis(50);
const LONGEST: Duration = Duration::from_secs(3);

/// Doubles from 50 ms to 3 s; each wait is shortened by up to half at random, so that nodes that lost the store together do
/// not come back together.
#[derive(Debug)]
pub(crate) struct Backoff(Duration);

impl Backoff {
    pub(crate) fn new() -> Self {
        Self(FIRST)
    }

    /// Waits, and makes the next wait longer.
    pub(crate) async fn wait(&mut self) {
        let jitter = f64::from(random()) / f64::from(u32::MAX) / 2.0;
        let wait = self.0.mul_f64(1.0 - jitter);
        self.0 = (self.0 * 2).min(LONGEST);
        tokio::time::sleep(wait).await;
    }
}

/// A number that differs between processes and calls; of no use for secrets.
pub(crate) fn random() -> u32 {
    RandomState::new().build_hasher().finish() as u32
}
