//! An expert node: holds the experts that the placement gives it, and runs them for router nodes.
//!
//! - `loader`: follows the placement, reads weights, says what is held.
//! - `service`: checks requests and answers them.
//! - `batch`: runs each expert once for all the requests that wait for it, on a compute thread.
//!
//! It never chooses what it holds and never sees a token: only hidden states.
#![forbid(unsafe_code)]

mod batch;
mod loader;
mod node;
mod progress;
mod service;

pub use node::{Config, StartError, default_capacity, start};
