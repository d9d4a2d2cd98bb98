//! A router node: runs everything of the model that is not an expert, and serves clients.
//!
//! A request's way: `callers` says whose it is, `api` (gRPC) or `openai` (HTTP) reads it, `intake` checks it by `policy` and
//! tokenises it, `engine` batches and computes step after step as `scheduler` decides,
//! `dispatch` has the experts of each layer run on the nodes that `topology` names and `replicas` chooses among, over the
//! streams of `connection`. What is routed where is counted and reported by `load`.
//! `page` is what people see at `/`.
//! It never holds an expert's weights and never writes a placement.
#![forbid(unsafe_code)]

mod api;
mod callers;
mod connection;
mod deadline;
mod dispatch;
mod engine;
mod events;
mod intake;
mod load;
mod metrics;
mod node;
mod openai;
mod page;
mod policy;
mod replicas;
mod scheduler;
mod standing;
mod topology;

pub use callers::{OpenError, keys};
pub use node::{Config, StartError, start};
pub use policy::Policy;
