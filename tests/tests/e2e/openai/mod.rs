//! OpenAI's API over HTTP, against real clusters.

mod answers;
mod client;
mod refusals;
mod serving;
