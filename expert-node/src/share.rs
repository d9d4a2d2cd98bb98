//! What nodes of one machine may take of the device that they share.

use sirocco_compute::{CudaBackend, DeviceError, GpuMemory, KernelSettings, probe_gpu};
use sirocco_process::DeviceArgs;
use sirocco_types::{DeviceChoice, ExpertDtype, ModelSpec};

use crate::node::default_capacity;

/// The part of a GPU's free memory that goes to the KV caches of routers which share it with expert nodes: one in so many.
const KV_PART: u64 = 8;

/// Makes of `auto` what it is on this machine, so that all nodes are given the same. Returns why it is the CPU, if it is. Errors when the GPU
/// that is asked for cannot be used. Takes seconds when kernels are compiled.
pub fn settle(device: &mut DeviceArgs) -> Result<Option<String>, DeviceError> {
    let Some(ordinal) = device.device.ordinal() else { return Ok(None) };
    match probe(device, ordinal) {
        Ok(_) => device.device = DeviceChoice::Cuda(ordinal),
        Err(error) if device.device == DeviceChoice::Auto => {
            device.device = DeviceChoice::Cpu;
            return Ok(Some(error.to_string()));
        }
        Err(error) => return Err(error),
    }
    Ok(None)
}

/// Bytes of KV cache for each of `routers` on the settled `device`; none where each may take what is usual.
pub fn kv_share(device: &DeviceArgs, routers: u16) -> Result<Option<u64>, DeviceError> {
    let Some(ordinal) = device.device.ordinal() else { return Ok(None) };
    let memory = probe(device, ordinal)?;
    Ok(Some(memory.free as u64 / KV_PART / u64::from(routers)))
}

/// Bytes of experts, kept as `dtype`, for each of `nodes` on the settled `device`, whose routers have started.
pub fn capacity_share(
    device: &DeviceArgs,
    spec: &ModelSpec,
    dtype: ExpertDtype,
    nodes: u16,
) -> Result<u64, DeviceError> {
    let Some(ordinal) = device.device.ordinal() else { return Ok(default_capacity() / u64::from(nodes)) };
    let memory = probe(device, ordinal)?;
    let shape = (spec.hidden_size, spec.intermediate_size);
    Ok(CudaBackend::share(memory, usize::from(nodes), dtype, shape) as u64)
}

fn probe(device: &DeviceArgs, ordinal: usize) -> Result<GpuMemory, DeviceError> {
    probe_gpu(ordinal, &kernel_settings(device))
}

/// Where kernels come from and how they are launched, as `device` says.
pub(crate) fn kernel_settings(device: &DeviceArgs) -> KernelSettings {
    let (cache, no_graphs) = (device.kernel_folder(), device.no_cuda_graphs);
    KernelSettings { nvrtc: device.nvrtc.clone(), cache, no_graphs }
}
