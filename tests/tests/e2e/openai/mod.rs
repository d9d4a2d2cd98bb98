//! OpenAI's API over HTTP, against real clusters.

mod answers;
mod client;
mod forms;
mod refusals;
mod serving;
