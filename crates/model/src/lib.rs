//! Mixture-of-Experts models: reading their checkpoints, and computing everything from token ids to the next token.
//!
//! [`Checkpoint`] reads a Hugging Face folder by byte range. [`Model`] is the part of it that runs on a router node; the
//! experts stand behind the trait [`Experts`], so the same forward pass runs in one process ([`LocalExperts`]) or over a
//! network. Every `.await` in this crate is a possible network hop. It never opens a socket and never starts a thread.
#![forbid(unsafe_code)]

mod chat;
mod checkpoint;
mod config;
mod detokenizer;
mod experts;
mod fingerprint;
mod forward;
mod gate;
mod kv;
mod sampler;
mod stop;
mod tokenizer;

pub use chat::{ChatError, ChatTemplate, Message};
pub use checkpoint::{Checkpoint, CheckpointError};
pub use detokenizer::Detokenizer;
pub use experts::{Experts, ExpertsError, LocalExperts, combine};
pub use forward::{Logits, Model, SequenceChunk, StepOutput, StepTimes};
pub use kv::KvCache;
pub use sampler::{NotFinite, SampledToken, Sampler};
pub use stop::StopMatcher;
pub use tokenizer::{Tokenizer, TokenizerError};
