//! Sirocco's numeric kernels. Every result is the same bits whatever the batch, the threads, the tiling or the instruction
//! set.
//!
//! The rule that makes it so: each output element is one chain of fused multiply-adds over its inputs in ascending order,
//! starting from zero. Lanes of a vector register are different outputs, never parts of one sum; where a row is summed up, in
//! norms and in attention's softmax, it is into 16 sums in turn, which are added up by halves. Exponentials and their like
//! are our own or those of the crate `libm`, compiled into the program, never from the platform. The oracle that every
//! kernel is tested against, bit for bit, is that rule written as a loop of `f32::mul_add`; each [`Isa`] this machine has can be
//! forced with [`Pool::with_isa`].
//!
//! This is the only crate with `unsafe`: vector intrinsics, threads that share a job and write disjoint parts of one output,
//! memory in huge pages, and NVIDIA's driver, compiler and management library. Experts ([`CudaBackend`]) and routers ([`CudaRouter`])
//! run on GPUs too, by rules of their own.

mod attention;
mod backend;
mod combine;
mod cuda;
mod cut;
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
mod router;
mod sampling;
mod wide;

pub use attention::{AttentionShape, BLOCK_TOKENS, KvLayer, Queries, attend};
pub use backend::{Batch, CpuBackend, DeviceChoice, ExpertBackend, GpuReadings, Part, open_backend};
pub use combine::weighted_sum;
pub use cuda::{CudaBackend, CudaRouter, DeviceError, GpuMemory, KernelSettings, cuda_devices, probe_gpu};
pub use device::cpu_description;
pub use exp::exp_relative;
pub use ffn::{ExpertMatrix, ExpertPacker, ExpertWeights};
pub use isa::Isa;
pub use matmul::matmul;
pub use norm::{Rotary, rms_norm, softmax};
pub use packed::{PackedMatrix, Packer, ShapeMismatch};
pub use pool::Pool;
pub use router::{
    CpuRouter, CpuWeights, GpuGauge, KvBlocks, LANES, RouterBackend, RouterDevice, RouterLimits, RouterMatrix,
    RouterVector, kv_block_bytes, open_router,
};
pub use sampling::{Draw, Drawn, Report, TokenSet, sample};
