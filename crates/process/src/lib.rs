//! What every Sirocco process does the same way: configuration, logs, signals, listeners, health endpoints, metrics, devices.
//!
//! Knows nothing of models, placements or the store.
#![forbid(unsafe_code)]

pub mod config;
mod device;
pub mod http;
pub mod logs;
pub mod metrics;
mod net;
mod node;
mod signals;

pub use device::{DeviceArgs, leave_when_lost, watch_gpu};
pub use net::{BindError, advertised, bind};
pub use node::{LifeError, NodeArgs, Running, main};
pub use signals::Shutdown;

/// Exit statuses of every program.
pub mod exit {
    /// Something failed.
    pub const FAILED: u8 = 1;
    /// The command line, the environment or the configuration file is wrong.
    pub const USAGE: u8 = 2;
    /// No part of the cluster answers.
    pub const UNREACHABLE: u8 = 3;
}

/// Threads to compute with unless told otherwise: one per core this process may use.
pub fn default_threads() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// A number that differs from one start of a process to the next: nanoseconds since 1970.
pub fn incarnation() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |now| u64::try_from(now.as_nanos()).unwrap_or(u64::MAX))
}

/// An error with its causes on one line, the outermost first.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let inner = error.to_string();
        if !text.contains(&inner) {
            text = format!("{text}: {inner}");
        }
        cause = error.source();
    }
    text
}
