//! An expert node: holds the experts that the placement gives it, and runs them for router nodes.
//!
//! - `loader`: follows the placement, reads weights, says what is held.
//! - `service`: checks requests and answers them.
//! - `batch`: runs each expert once for all the requests that wait for it, on a compute thread that has the CPU's or a GPU's
//!   backend do it.
//! - `metrics`: counts what that thread does; `load` reports it.
//! - `departure`: when a node that is asked to stop may leave.
//! - `share`: what several nodes on one device may take of it.
//!
//! It never chooses what it holds and never sees a token: only hidden states.
#![forbid(unsafe_code)]

mod batch;
mod departure;
mod load;
mod loader;
mod metrics;
mod node;
mod progress;
mod service;
mod share;
#[cfg(test)]
mod testing;

pub use node::{Config, StartError, start};
pub use share::{capacity_share, kv_share, settle};
