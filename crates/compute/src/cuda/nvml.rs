//! How a GPU fares, from NVIDIA's management library, which comes with the driver; absent where that is.

use std::ffi::{CString, c_char, c_int, c_uint, c_void};

use libloading::Library;

use crate::backend::GpuReadings;

/// A GPU as the management library knows it.
#[derive(Debug)]
pub(super) struct Nvml {
    library: Library,
    device: Device,
}

#[derive(Clone, Copy, Debug)]
struct Device(*mut c_void);

// SAFETY: a handle of the library, whose functions any thread may call, several at once.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

/// `nvmlUtilization_t`: percent of the last sample period.
#[derive(Default)]
#[repr(C)]
struct Utilisation {
    gpu: c_uint,
    memory: c_uint,
}

/// `nvmlMemory_t`: bytes.
#[derive(Default)]
#[repr(C)]
struct MemoryInfo {
    total: u64,
    free: u64,
    used: u64,
}

/// `NVML_TEMPERATURE_GPU`.
const DIE: c_int = 0;

impl Nvml {
    /// The GPU at this address of the bus; none when the library or what is asked of it is missing.
    pub(super) fn open(bus: &str) -> Option<Self> {
        // SAFETY: NVIDIA's library, whose initialisers do nothing that a program could notice.
        let library = unsafe { Library::new("libnvidia-ml.so.1") }.ok()?;
        let bus = CString::new(bus).ok()?;
        let mut device = std::ptr::null_mut();
        // SAFETY: the functions are declared as the library's header has them; the address ends with zero; the handle is written
        // before it is used.
        unsafe {
            let init: libloading::Symbol<unsafe extern "C" fn() -> c_int> = library.get("nvmlInit_v2").ok()?;
            let find: libloading::Symbol<unsafe extern "C" fn(*const c_char, *mut *mut c_void) -> c_int> =
                library.get("nvmlDeviceGetHandleByPciBusId_v2").ok()?;
            (init() == 0 && find(bus.as_ptr(), &raw mut device) == 0).then_some(())?;
        }
        Some(Self { library, device: Device(device) })
    }

    /// How it fares now; none when the library does not tell.
    pub(super) fn read(&self) -> Option<GpuReadings> {
        let (mut utilisation, mut memory, mut celsius) = (Utilisation::default(), MemoryInfo::default(), 0);
        // SAFETY: the functions are declared as the library's header has them and write one structure each.
        unsafe {
            let get: libloading::Symbol<unsafe extern "C" fn(*mut c_void, *mut Utilisation) -> c_int> =
                self.library.get("nvmlDeviceGetUtilizationRates").ok()?;
            (get(self.device.0, &raw mut utilisation) == 0).then_some(())?;
            let get: libloading::Symbol<unsafe extern "C" fn(*mut c_void, *mut MemoryInfo) -> c_int> =
                self.library.get("nvmlDeviceGetMemoryInfo").ok()?;
            (get(self.device.0, &raw mut memory) == 0).then_some(())?;
            let get: libloading::Symbol<unsafe extern "C" fn(*mut c_void, c_int, *mut c_uint) -> c_int> =
                self.library.get("nvmlDeviceGetTemperature").ok()?;
            (get(self.device.0, DIE, &raw mut celsius) == 0).then_some(())?;
        }
        let utilisation = f64::from(utilisation.gpu) / 100.0;
        Some(GpuReadings {
            utilisation,
            memory_bytes: memory.used,
            memory_total_bytes: memory.total,
            temperature_celsius: f64::from(celsius),
        })
    }
}
