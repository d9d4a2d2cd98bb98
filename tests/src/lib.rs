//! What Sirocco's tests start clusters with: real processes on free ports, a real etcd, nothing left behind.
//!
//! Waiting is always for a condition and always bounded; what runs out of time says what was waited for.
#![forbid(unsafe_code)]

pub mod cluster;
pub mod etcd;
pub mod faults;
pub mod process;
pub mod random;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Longest wait for a condition in a test.
pub const PATIENCE: Duration = Duration::from_mins(1);

/// Waits until `condition` gives something.
pub fn wait_for<T>(what: &str, condition: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    wait_at_most(PATIENCE, what, condition)
}

/// The same for what may take longer, or must not take as long.
pub fn wait_at_most<T>(patience: Duration, what: &str, mut condition: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let start = Instant::now();
    loop {
        if let Some(found) = condition()? {
            return Ok(found);
        }
        if start.elapsed() > patience {
            bail!("waited {patience:?} for {what}");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A path in the repository.
pub fn repository(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
}
