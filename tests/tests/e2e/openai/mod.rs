//! OpenAI's API over HTTP, against real clusters.

mod answers;
pub(crate) mod client;
mod experts;
mod forms;
mod parameters;
mod refusals;
mod serving;

pub(crate) use client::{cluster, post, send};
pub(crate) use serving::{start, wait_for_log};
