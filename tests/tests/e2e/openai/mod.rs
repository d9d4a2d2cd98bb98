//! OpenAI's API over HTTP, against real clusters.

mod answers;
pub(crate) mod client;
mod refusals;
mod serving;
