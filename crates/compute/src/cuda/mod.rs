//! Experts and routers on NVIDIA GPUs: found at run time, so that one program runs with and without them.
//!
//! - `gpu`: a GPU through its driver, loaded by cudarc when it is there; `error` says what is missing, or that the GPU is lost.
//! - `kernels`: CUDA C++ in `kernels/`, compiled at start by `nvrtc` for the GPU that is there, and kept on disk.
//! - `layout`: weights as tensor cores take them; `expert` brings them into the GPU's memory.
//! - `launch`: what a kernel is called with, as data; `graphs`: launches that come again and again, queued at once.
//! - `router`: all of a model but its experts.
//! - `plan` cuts a batch into waves and items, `backend` runs them; `nvml` tells how the GPU fares.
//!
//! Activations are sums of two bf16 where they enter an expert and between its two halves, which is nearly f32; sums are f32. The
//! results are near the CPU's but not its bits. They are the same on all GPUs of a kind, whatever the rows beside a row, how many, and how they were cut up, because
//! there is one order of summation, which stands at the top of `kernels/ffn.cu`.

mod backend;
#[cfg(test)]
mod emulator;
mod error;
mod expert;
mod gpu;
mod graphs;
mod kernels;
mod launch;
mod layout;
mod nvml;
mod nvrtc;
mod plan;
mod router;
#[cfg(test)]
mod tests;

pub use backend::{CudaBackend, GpuMemory, probe_gpu};
pub use error::DeviceError;
pub(crate) use expert::{CudaExpert, CudaPacker};
pub use gpu::cuda_devices;
pub use kernels::KernelSettings;
pub use router::CudaRouter;
