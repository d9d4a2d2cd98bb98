//! What can be wrong with a device, in words that say what is missing.

/// Why a device cannot be used, or did not do what it was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// A shared library is not there.
    #[error("{library} not found: {problem}")]
    Library {
        /// Its name.
        library: &'static str,
        /// What was tried, and what brings it.
        problem: String,
    },
    /// There is no such GPU.
    #[error("{device}: this machine has {count} NVIDIA GPUs")]
    NoGpu {
        /// As asked for.
        device: String,
        /// How many there are.
        count: usize,
    },
    /// The driver does not know what is needed.
    #[error("the NVIDIA driver supports CUDA {driver}, older than {least}")]
    OldDriver {
        /// The latest CUDA version it supports.
        driver: String,
        /// The least that will do.
        least: String,
    },
    /// The GPU lacks instructions that are needed.
    #[error("{device}: {name} has compute capability {capability}, less than {least}")]
    OldGpu {
        /// As asked for.
        device: String,
        /// The product's name.
        name: String,
        /// What it has.
        capability: String,
        /// The least that will do.
        least: String,
    },
    /// The kernels do not compile.
    #[error("kernels for {architecture} do not compile: {log}")]
    Compile {
        /// For example `sm_90`.
        architecture: String,
        /// What the compiler says.
        log: String,
    },
    /// Too little memory is free for what must be there from the start.
    #[error("{device}: {needed} bytes are needed for {what}, {free} of {total} are free")]
    NotEnough {
        /// As asked for.
        device: String,
        /// For example `the workspace`.
        what: &'static str,
        /// Bytes.
        needed: usize,
        /// Bytes.
        free: usize,
        /// Bytes.
        total: usize,
    },
    /// Too little memory is free for a router.
    #[error(
        "{device}: {needed} bytes are needed: {weights} for a router's weights, {cache} for its KV cache, {workspace} for its \
         workspace, the rest for the driver; {free} of {total} are free"
    )]
    NoRoom {
        /// As asked for.
        device: String,
        /// Bytes, all together.
        needed: usize,
        /// Bytes.
        weights: usize,
        /// Bytes; for one block, where there is room for none.
        cache: usize,
        /// Bytes.
        workspace: usize,
        /// Bytes.
        free: usize,
        /// Bytes.
        total: usize,
    },
    /// A model has a shape that no kernel is made for.
    #[error("{device}: {field} is {value}, more than the {limit} that kernels are made for")]
    Shape {
        /// As asked for.
        device: String,
        /// Of the model.
        field: &'static str,
        /// What it is.
        value: usize,
        /// The most it may be.
        limit: usize,
    },
    /// Memory ran out. The device goes on.
    #[error("{device}: out of memory: {bytes} bytes for {what}")]
    OutOfMemory {
        /// As asked for.
        device: String,
        /// For example `an expert`.
        what: &'static str,
        /// How many were asked for.
        bytes: usize,
    },
    /// The device is gone, or no call of this process succeeds any more. The process must end.
    #[error("{device} is lost: {call}: {problem}")]
    Lost {
        /// As asked for.
        device: String,
        /// The call that failed.
        call: &'static str,
        /// What the driver says.
        problem: String,
    },
    /// A call failed, others may not.
    #[error("{device}: {call}: {problem}")]
    Call {
        /// As asked for.
        device: String,
        /// The call that failed.
        call: &'static str,
        /// What the driver says.
        problem: String,
    },
}

/// Whether a process can go on with its GPU after the driver has returned `code`. Most errors of a kernel leave the process's
/// context broken for good; those of hardware do so for every process.
///
/// Source: CUDA driver API, "Data types used by CUDA driver", the values of `CUresult` and which of them say that "the process
/// must be terminated and relaunched" or that the device cannot be used.
pub(super) fn is_lost(code: u32) -> bool {
    const NO_DEVICE: u32 = 100;
    const DEVICE_UNAVAILABLE: u32 = 46;
    const ECC_UNCORRECTABLE: u32 = 214;
    const NVLINK_UNCORRECTABLE: u32 = 220;
    const FIRST_LAUNCH_ERROR: u32 = 700;
    const LAUNCH_OUT_OF_RESOURCES: u32 = 701;
    const PEER_ALREADY_ENABLED: u32 = 704;
    const PEER_NOT_ENABLED: u32 = 705;
    const PRIMARY_CONTEXT_ACTIVE: u32 = 708;
    const HOST_MEMORY_REGISTRATION: [u32; 2] = [712, 713];
    const COOPERATIVE_LAUNCH_TOO_LARGE: u32 = 720;
    const LAST_LAUNCH_ERROR: u32 = 721;
    const UNKNOWN: u32 = 999;
    let harmless = [
        LAUNCH_OUT_OF_RESOURCES,
        PEER_ALREADY_ENABLED,
        PEER_NOT_ENABLED,
        PRIMARY_CONTEXT_ACTIVE,
        COOPERATIVE_LAUNCH_TOO_LARGE,
    ];
    matches!(code, NO_DEVICE | DEVICE_UNAVAILABLE | ECC_UNCORRECTABLE | NVLINK_UNCORRECTABLE | UNKNOWN)
        || (FIRST_LAUNCH_ERROR..=LAST_LAUNCH_ERROR).contains(&code)
            && !harmless.contains(&code)
            && !HOST_MEMORY_REGISTRATION.contains(&code)
}

#[cfg(test)]
mod tests {
    use cudarc::driver::sys::CUresult::*;

    use super::*;

    #[test]
    fn a_broken_context_and_broken_hardware_are_a_lost_device_and_mistakes_are_not() {
        for lost in [
            CUDA_ERROR_CONTEXT_IS_DESTROYED,
            CUDA_ERROR_ECC_UNCORRECTABLE,
            CUDA_ERROR_HARDWARE_STACK_ERROR,
            CUDA_ERROR_ILLEGAL_ADDRESS,
            CUDA_ERROR_ILLEGAL_INSTRUCTION,
            CUDA_ERROR_LAUNCH_FAILED,
            CUDA_ERROR_LAUNCH_TIMEOUT,
            CUDA_ERROR_MISALIGNED_ADDRESS,
            CUDA_ERROR_NO_DEVICE,
            CUDA_ERROR_UNKNOWN,
        ] {
            assert!(is_lost(lost as u32), "{}", lost as u32);
        }
        for one_call in [
            CUDA_ERROR_INVALID_IMAGE,
            CUDA_ERROR_INVALID_VALUE,
            CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES,
            CUDA_ERROR_OUT_OF_MEMORY,
            CUDA_ERROR_PEER_ACCESS_NOT_ENABLED,
        ] {
            assert!(!is_lost(one_call as u32), "{}", one_call as u32);
        }
    }
}
