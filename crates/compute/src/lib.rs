//! Sirocco's numeric kernels. Every result is the same bits whatever the batch, the threads, the tiling or the instruction
//! set.
//!
//! The rule that makes it so: each output element is one chain of fused multiply-adds over its inputs in ascending order,
//! starting from zero. Lanes of a vector register are different outputs, never parts of one sum. Exponentials and their like
//! are our own or those of the crate `libm`, compiled into the program, never from the platform. The scalar code of [`PackedMatrix`] is the
//! oracle that the vector code is tested against, bit for bit.
//!
//! This is the only crate with `unsafe`: vector intrinsics, threads that write disjoint columns of one output, and the CUDA
//! driver. GPUs are found, not used yet: every kernel runs on the CPU.

mod attention;
mod combine;
mod device;
mod disjoint;
mod exp;
mod ffn;
mod isa;
mod matmul;
mod norm;
mod packed;
mod pages;
mod pool;
mod quant;
mod wide;

pub use attention::{AttentionShape, BLOCK_TOKENS, KvBlocks, Query, attend, store_kv};
pub use combine::weighted_sum;
pub use device::{cpu_description, cuda_devices};
pub use exp::exp_relative;
pub use ffn::{ExpertMatrix, ExpertPacker, ExpertWeights};
pub use isa::Isa;
pub use matmul::matmul;
pub use norm::{Rotary, rms_norm, softmax};
pub use packed::{PackedMatrix, Packer, ShapeMismatch};
pub use pool::Pool;
