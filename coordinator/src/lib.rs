//! A coordinator: places every expert on an expert node, and tells operators how the cluster is.
//!
//! Of several coordinators one leads. It looks at the cluster's state ([`sirocco_store::ClusterState`]), has `plan` say which
//! expert goes where and `reconcile` what to write next, and writes it (`leader`). Any of them answers operators
//! (`api`). No token passes through it, and serving goes on without it.
#![forbid(unsafe_code)]

mod api;
mod leader;
mod node;
pub mod plan;
mod problems;
mod reconcile;
pub mod simulate;

pub use node::{Config, StartError, start};
