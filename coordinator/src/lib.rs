//! A coordinator: places every expert on an expert node, and tells operators how the cluster is.
//!
//! Of several coordinators one leads. It looks at the cluster's state ([`sirocco_store::ClusterState`]), has `plan` say which
//! expert goes where and `reconcile` what to write next, and writes it (`leader`). Any of them answers operators
//! (`api`). No token passes through it, and serving goes on without it.
#![forbid(unsafe_code)]

mod api;
mod inputs;
mod leader;
mod load;
mod metrics;
mod node;
mod operations;
pub mod plan;
mod problems;
mod rebalance;
mod reconcile;
pub mod simulate;
#[cfg(test)]
mod testing;

pub use node::{Config, StartError, start};
