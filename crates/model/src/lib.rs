//! Mixture-of-Experts models: reading their checkpoints, and computing everything from token ids to the next token.
//!
//! [`Checkpoint`] reads a Hugging Face folder by byte range. [`Model`] is the part of it that runs on a router node, on the CPU or a
//! GPU ([`RouterBackend`](sirocco_compute::RouterBackend)); the experts stand behind the trait [`Experts`], so the same forward pass
//! runs in one process ([`LocalExperts`]) or over a network. Every `.await` in this crate is a possible network hop. It never opens a
//! socket, and starts no thread but the short-lived ones that [`Grammars::compile`] and loading need.
#![forbid(unsafe_code)]

mod calls;
mod chat;
mod checkpoint;
mod config;
mod detokenizer;
mod experts;
mod fingerprint;
mod forward;
mod grammar;
mod quality;
mod sampler;
mod stop;
mod tokenizer;
mod turns;

pub use calls::{CallReader, Marker, Said, TOOL_CALLS};
pub use chat::{CalledFunction, ChatError, ChatTemplate, Message, ToolCall};
pub use checkpoint::{Checkpoint, CheckpointError, expected_tensors};
pub use config::read_spec;
pub use detokenizer::Detokenizer;
pub use experts::{Experts, ExpertsError, LocalExperts, combine};
pub use forward::{Logits, Model, SequenceChunk, StepError, StepOutput, StepTimes};
pub use grammar::{Constraint, ConstraintError, GrammarError, Grammars};
pub use quality::{QualityError, quality};
pub use sampler::{SampleError, SampledToken, Sampler};
pub use stop::StopMatcher;
pub use tokenizer::{Tokenizer, TokenizerError};
