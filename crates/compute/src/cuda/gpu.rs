//! One GPU through its driver: memory, streams, kernels, graphs of them. Every call that can fail says which call it was and whether
//! the device is lost.
//!
//! Uses the driver's functions that exist since CUDA 12.0; of cudarc only what loads the driver's library when it is called.
//! Never touches cudarc before [`Gpu::open`] has seen that the library is there: cudarc panics without it.

use std::ffi::{CString, c_void};
use std::ptr::NonNull;
use std::sync::Arc;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUdevice_attribute, CUfunction_attribute, CUresult};

use super::error::{DeviceError, is_lost};
use super::launch::{Argument, Launch};

/// The least CUDA version that the driver must support: 1000 times the major, 10 times the minor number.
const LEAST_DRIVER: i32 = 12_000;

/// The least compute capability: Ampere's, the first with bf16 tensor cores and asynchronous copies.
const LEAST_CAPABILITY: (i32, i32) = (8, 0);

/// What brings the driver's library.
const NO_DRIVER: &str = "no NVIDIA driver is installed here, or a container was started without its GPUs";

/// A GPU that this process may use. Its context lives until the last that was made from it is dropped.
#[derive(Debug)]
pub(super) struct Gpu {
    name: String,
    /// As asked for, in errors.
    device_name: String,
    device: sys::CUdevice,
    context: sys::CUcontext,
    capability: (i32, i32),
    /// As NVML knows it.
    bus: String,
}

// SAFETY: a device is a number, and a context may be used by any thread that makes it its current one, as `bind` does.
unsafe impl Send for Gpu {}
// SAFETY: as above; the driver's functions may be called by several threads at once.
unsafe impl Sync for Gpu {}

/// How many GPUs the driver shows; an error where there is no driver.
pub(super) fn count() -> Result<usize, DeviceError> {
    // SAFETY: it only looks for the driver's library.
    if !unsafe { sys::is_culib_present() } {
        return Err(DeviceError::Library { library: "libcuda.so.1", problem: NO_DRIVER.into() });
    }
    let count = result::init().and_then(|()| result::device::get_count());
    match count {
        Ok(count) => Ok(usize::try_from(count).unwrap_or(0)),
        Err(DriverError(CUresult::CUDA_ERROR_NO_DEVICE)) => Ok(0),
        Err(error) => Err(failed("cuda", "cuInit", error)),
    }
}

/// The names of the GPUs of this machine; none where there is no driver.
pub fn cuda_devices() -> Vec<String> {
    let name = |ordinal| result::device::get_name(result::device::get(ordinal).ok()?).ok();
    (0..).take(count().unwrap_or(0)).filter_map(name).collect()
}

impl Gpu {
    /// The GPU `cuda:ordinal`. Errors say what is missing.
    pub(super) fn open(ordinal: usize) -> Result<Arc<Self>, DeviceError> {
        let device_name = format!("cuda:{ordinal}");
        let count = count()?;
        let supports = driver_version().map_err(|error| failed(&device_name, "cuDriverGetVersion", error))?;
        if supports < LEAST_DRIVER {
            let version = |version: i32| format!("{}.{}", version / 1000, version % 1000 / 10);
            return Err(DeviceError::OldDriver { driver: version(supports), least: version(LEAST_DRIVER) });
        }
        let index = i32::try_from(ordinal).ok().filter(|_| ordinal < count);
        let Some(index) = index else { return Err(DeviceError::NoGpu { device: device_name, count }) };
        let fail = |call| move |error| failed(&format!("cuda:{ordinal}"), call, error);
        let device = result::device::get(index).map_err(fail("cuDeviceGet"))?;
        let name = result::device::get_name(device).map_err(fail("cuDeviceGetName"))?;
        let attribute = |attribute| {
            // SAFETY: `device` comes from the driver.
            unsafe { result::device::get_attribute(device, attribute) }.map_err(fail("cuDeviceGetAttribute"))
        };
        let capability = (
            attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        if capability < LEAST_CAPABILITY {
            let text = |(major, minor)| format!("{major}.{minor}");
            let (capability, least) = (text(capability), text(LEAST_CAPABILITY));
            return Err(DeviceError::OldGpu { device: device_name, name, capability, least });
        }
        let domain = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID)?;
        let bus = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_PCI_BUS_ID)?;
        let slot = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID)?;
        let bus = format!("{domain:08x}:{bus:02x}:{slot:02x}.0");
        // SAFETY: `device` comes from the driver; `drop` releases what this retains.
        let context = unsafe { result::primary_ctx::retain(device) }.map_err(fail("cuDevicePrimaryCtxRetain"))?;
        Ok(Arc::new(Self { name, device_name, device, context, capability, bus }))
    }

    /// The product's name.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Its address on the bus, as NVML writes it.
    pub(super) fn bus(&self) -> &str {
        &self.bus
    }

    /// What kernels are compiled for, for example `sm_90`.
    pub(super) fn architecture(&self) -> String {
        format!("sm_{}{}", self.capability.0, self.capability.1)
    }

    /// Free bytes and all bytes of its memory.
    pub(super) fn memory(&self) -> Result<(usize, usize), DeviceError> {
        self.bind()?;
        self.check("cuMemGetInfo", result::mem_get_info())
    }

    /// Makes its context this thread's current one, which the driver's other functions work in.
    pub(super) fn bind(&self) -> Result<(), DeviceError> {
        // SAFETY: the context is retained until `drop`.
        self.check("cuCtxSetCurrent", unsafe { result::ctx::set_current(self.context) })
    }

    /// Names this GPU and `call` when it failed.
    pub(super) fn check<T>(&self, call: &'static str, result: Result<T, DriverError>) -> Result<T, DeviceError> {
        result.map_err(|error| failed(&self.device_name, call, error))
    }

    /// Bytes of device memory, zero at first, for `what`.
    pub(super) fn allocate(self: &Arc<Self>, bytes: usize, what: &'static str) -> Result<Memory, DeviceError> {
        self.bind()?;
        // SAFETY: the size is not zero; `Memory` owns and frees what it gets.
        let address = match unsafe { result::malloc_sync(bytes.max(1)) } {
            Err(DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => {
                return Err(DeviceError::OutOfMemory { device: self.device_name.clone(), what, bytes });
            }
            result => self.check("cuMemAlloc", result)?,
        };
        let memory = Memory { gpu: Arc::clone(self), address, bytes };
        // SAFETY: the memory was just allocated, with room for all of them.
        self.check("cuMemsetD8", unsafe { result::memset_d8_sync(address, 0, bytes) })?;
        // It returns before the memory is zero, and our streams wait for no other.
        // SAFETY: the default stream is always there.
        self.check("cuStreamSynchronize", unsafe { result::stream::synchronize(result::stream::null()) })?;
        Ok(memory)
    }

    /// Bytes of the host's memory that the GPU reads and writes by itself, zero at first.
    pub(super) fn allocate_pinned(self: &Arc<Self>, bytes: usize) -> Result<Pinned, DeviceError> {
        self.bind()?;
        // SAFETY: `Pinned` owns and frees what it gets.
        let data = match unsafe { result::malloc_host(bytes.max(1), 0) } {
            Err(DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => {
                let (device, what) = (self.device_name.clone(), "pinned host memory");
                return Err(DeviceError::OutOfMemory { device, what, bytes });
            }
            result => self.check("cuMemHostAlloc", result)?,
        };
        let data = NonNull::new(data.cast::<u8>()).ok_or_else(|| DeviceError::OutOfMemory {
            device: self.device_name.clone(),
            what: "pinned host memory",
            bytes,
        })?;
        // SAFETY: it was just allocated with room for as many.
        unsafe { data.write_bytes(0, bytes) };
        Ok(Pinned { gpu: Arc::clone(self), data, bytes })
    }

    /// A queue of work.
    pub(super) fn stream(self: &Arc<Self>) -> Result<Stream, DeviceError> {
        self.bind()?;
        let kind = result::stream::StreamKind::NonBlocking;
        let stream = self.check("cuStreamCreate", result::stream::create(kind))?;
        Ok(Stream { gpu: Arc::clone(self), stream })
    }

    /// What `image`, a cubin for this architecture, has. Fails when the driver cannot read it.
    pub(super) fn load(self: &Arc<Self>, image: &[u8]) -> Result<Module, DeviceError> {
        self.bind()?;
        // SAFETY: the image lies in memory until the call returns, and says itself how long it is; it was compiled by NVRTC and,
        // where it comes from a file, its checksum fits.
        let module = unsafe { result::module::load_data(image.as_ptr().cast()) };
        Ok(Module { module: self.check("cuModuleLoadData", module)?, gpu: Arc::clone(self) })
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // SAFETY: `open` retained it. Whether it fails makes no difference any more.
        let _ = unsafe { result::primary_ctx::release(self.device) };
    }
}

fn driver_version() -> Result<i32, DriverError> {
    let mut version = 0;
    // SAFETY: it writes one integer.
    unsafe { sys::cuDriverGetVersion(&raw mut version) }.result()?;
    Ok(version)
}

fn failed(device: &str, call: &'static str, error: DriverError) -> DeviceError {
    let code = error.0 as u32;
    let text = |text: Result<&std::ffi::CStr, DriverError>| text.ok().map(|text| text.to_string_lossy().into_owned());
    let name = text(error.error_name()).unwrap_or_else(|| format!("error {code}"));
    let problem = text(error.error_string()).map_or_else(|| name.clone(), |text| format!("{text} ({name})"));
    let device = device.to_owned();
    if is_lost(code) {
        DeviceError::Lost { device, call, problem }
    } else {
        DeviceError::Call { device, call, problem }
    }
}

/// Memory of a GPU.
#[derive(Debug)]
pub(super) struct Memory {
    gpu: Arc<Gpu>,
    address: sys::CUdeviceptr,
    bytes: usize,
}

impl Memory {
    pub(super) fn address(&self) -> u64 {
        self.address
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: it was allocated by `Gpu::allocate` and is freed once. The driver waits for kernels that use it.
        let _ = self.gpu.bind().map(|()| unsafe { result::free_sync(self.address) });
    }
}

/// Host memory that the GPU reads and writes by itself.
#[derive(Debug)]
pub(super) struct Pinned {
    gpu: Arc<Gpu>,
    data: NonNull<u8>,
    bytes: usize,
}

// SAFETY: it owns its memory like a `Box<[u8]>`.
unsafe impl Send for Pinned {}
// SAFETY: shared, it is only read.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// Its bytes as f32; those that make no whole one are left out.
    pub(super) fn floats(&self) -> &[f32] {
        // SAFETY: it begins at the start of a page, every bit pattern is an f32, and for reading see `deref`.
        unsafe { std::slice::from_raw_parts(self.data.as_ptr().cast(), self.bytes / size_of::<f32>()) }
    }
}

impl std::ops::Deref for Pinned {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: it was allocated with as many bytes, which were written before. A copy to it that is under way is waited for by
        // whoever started it before it looks: see `Stream::copy_out`.
        unsafe { std::slice::from_raw_parts(self.data.as_ptr(), self.bytes) }
    }
}

impl std::ops::DerefMut for Pinned {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `deref`, and nobody else has it. See `Stream::copy_in`.
        unsafe { std::slice::from_raw_parts_mut(self.data.as_ptr(), self.bytes) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: it was allocated by `Gpu::allocate_pinned` and is freed once. The driver waits for copies that use it.
        let _ = self.gpu.bind().map(|()| unsafe { result::free_host(self.data.as_ptr().cast()) });
    }
}

/// A queue of work, done in order.
#[derive(Debug)]
pub(super) struct Stream {
    gpu: Arc<Gpu>,
    stream: sys::CUstream,
}

// SAFETY: a handle of the driver, which any thread may use.
unsafe impl Send for Stream {}
// SAFETY: as above; the driver orders calls of several threads.
unsafe impl Sync for Stream {}

impl Stream {
    /// Queues a copy of the first `bytes` of `from` to `to`, from its byte `offset` on.
    ///
    /// # Safety
    /// Neither is dropped, and `from` not written, before [`Stream::wait`] has returned.
    pub(super) unsafe fn copy_in(
        &self,
        to: &Memory,
        offset: usize,
        from: &Pinned,
        bytes: usize,
    ) -> Result<(), DeviceError> {
        assert!(bytes <= from.bytes && offset + bytes <= to.bytes, "a copy fits");
        self.gpu.bind()?;
        // SAFETY: both have room for it, as was checked; they stay as they are until it is done, as the caller promises.
        let copy = unsafe { result::memcpy_htod_async(to.address + offset as u64, &from[..bytes], self.stream) };
        self.gpu.check("cuMemcpyHtoDAsync", copy)
    }

    /// Queues a copy of `bytes` of `from`, from its byte `offset` on, to the start of `to`.
    ///
    /// # Safety
    /// Neither is dropped, and `to` neither read nor written, before [`Stream::wait`] has returned.
    pub(super) unsafe fn copy_out(
        &self,
        to: &mut Pinned,
        from: &Memory,
        offset: usize,
        bytes: usize,
    ) -> Result<(), DeviceError> {
        assert!(offset + bytes <= from.bytes && bytes <= to.bytes, "a copy fits");
        self.gpu.bind()?;
        // SAFETY: both have room for it, as was checked; they stay as they are until it is done, as the caller promises.
        let copy = unsafe { result::memcpy_dtoh_async(&mut to[..bytes], from.address + offset as u64, self.stream) };
        self.gpu.check("cuMemcpyDtoHAsync", copy)
    }

    /// Queues a kernel.
    ///
    /// # Safety
    /// `arguments` are what the kernel takes, each of its type; what is on the device where they point to is large enough and is not
    /// dropped before [`Stream::wait`] has returned.
    pub(super) unsafe fn launch(
        &self,
        kernel: &Kernel,
        grid: (usize, usize),
        arguments: &[Argument],
    ) -> Result<(), DeviceError> {
        self.gpu.bind()?;
        let mut arguments = pointers(arguments);
        let grid = (grid.0 as u32, grid.1 as u32, 1);
        // SAFETY: the module of the kernel is loaded as long as `Kernels` lives, which outlives every batch; for the arguments
        // the caller vouches.
        let launch = unsafe {
            result::launch_kernel(
                kernel.function,
                grid,
                (kernel.threads, 1, 1),
                kernel.shared_bytes,
                self.stream,
                &mut arguments,
            )
        };
        self.gpu.check("cuLaunchKernel", launch)
    }

    /// Makes a graph of kernels, each waiting for the one before it, and queues what it takes to bring it to the GPU; runs none of
    /// them. Nodes are added one by one, not captured from the stream: no call of another thread can disturb that, and an error
    /// leaves nothing behind.
    ///
    /// Errors also when the driver makes none or has no memory for it.
    ///
    /// # Safety
    /// Of each kernel what [`Stream::launch`] says, as long as the graph lives; the kernels stay loaded as long.
    pub(super) unsafe fn record(&self, calls: &[(Kernel, &Launch)]) -> Result<Graph, DeviceError> {
        self.gpu.bind()?;
        let mut template = Template(std::ptr::null_mut());
        // SAFETY: it writes one handle.
        let created = unsafe { sys::cuGraphCreate(&raw mut template.0, 0) }.result();
        self.gpu.check("cuGraphCreate", created)?;
        let mut node: sys::CUgraphNode = std::ptr::null_mut();
        for (kernel, Launch { grid, arguments, .. }) in calls {
            let before = node;
            let mut arguments = pointers(arguments);
            let parameters = sys::CUDA_KERNEL_NODE_PARAMS {
                func: kernel.function,
                gridDimX: grid.0 as u32,
                gridDimY: grid.1 as u32,
                gridDimZ: 1,
                blockDimX: kernel.threads,
                blockDimY: 1,
                blockDimZ: 1,
                sharedMemBytes: kernel.shared_bytes,
                kernelParams: arguments.as_mut_ptr(),
                extra: std::ptr::null_mut(),
                kern: std::ptr::null_mut(),
                ctx: std::ptr::null_mut(),
            };
            let dependencies = usize::from(!before.is_null());
            // SAFETY: the template was created, its last node is one of it, and arguments are copied before the call returns; for
            // kernel and arguments the caller vouches.
            let added = unsafe {
                sys::cuGraphAddKernelNode_v2(
                    &raw mut node,
                    template.0,
                    &raw const before,
                    dependencies,
                    &raw const parameters,
                )
            };
            self.gpu.check("cuGraphAddKernelNode", added.result())?;
        }
        // SAFETY: the template was created; what is made of it does not need it any more.
        let graph = unsafe { result::graph::instantiate(template.0, sys::CUgraphInstantiate_flags(0)) };
        let graph = self.gpu.check("cuGraphInstantiate", graph)?;
        let graph = Graph { gpu: Arc::clone(&self.gpu), graph };
        // So that a lack of memory comes to light before anything is run.
        // SAFETY: both were created and live.
        self.gpu.check("cuGraphUpload", unsafe { result::graph::upload(graph.graph, self.stream) })?;
        Ok(graph)
    }

    /// Queues the kernels of a graph that a stream of this GPU made.
    pub(super) fn launch_graph(&self, graph: &mut Graph) -> Result<(), DeviceError> {
        self.gpu.bind()?;
        // SAFETY: graph and stream were created and live; for the kernels the caller of `record` vouched, as long as the graph lives.
        self.gpu.check("cuGraphLaunch", unsafe { result::graph::launch(graph.graph, self.stream) })
    }

    /// Waits until all that was queued is done. An error of a kernel comes to light here.
    pub(super) fn wait(&self) -> Result<(), DeviceError> {
        self.gpu.bind()?;
        // SAFETY: the stream lives until `drop`.
        self.gpu.check("cuStreamSynchronize", unsafe { result::stream::synchronize(self.stream) })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: it was created by `Gpu::stream`. What is queued is waited for, so that nothing is freed under it.
        let _ = self.wait().map(|()| unsafe { result::stream::destroy(self.stream) });
    }
}

/// Where the arguments of a kernel are, as the driver takes them.
fn pointers(arguments: &[Argument]) -> Vec<*mut c_void> {
    arguments.iter().map(|argument| std::ptr::from_ref(argument).cast_mut().cast()).collect()
}

/// What a graph is made of.
struct Template(sys::CUgraph);

impl Drop for Template {
    fn drop(&mut self) {
        if !self.0.is_null() {
            // SAFETY: it was created by `Stream::record`, and is destroyed once. Whether it fails makes no difference any more.
            let _ = unsafe { result::graph::destroy(self.0) };
        }
    }
}

/// Kernels with their arguments, to be launched by one call again and again.
#[derive(Debug)]
pub(super) struct Graph {
    gpu: Arc<Gpu>,
    graph: sys::CUgraphExec,
}

// SAFETY: a handle of the driver, which any thread may use, one at a time: it is launched through `&mut`.
unsafe impl Send for Graph {}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: it was made by `Stream::record` and is destroyed once. The driver lets one end that is under way.
        let _ = self.gpu.bind().map(|()| unsafe { result::graph::exec_destroy(self.graph) });
    }
}

/// Compiled kernels.
#[derive(Debug)]
pub(super) struct Module {
    gpu: Arc<Gpu>,
    module: sys::CUmodule,
}

// SAFETY: a handle of the driver, which any thread may use.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

/// A kernel of a [`Module`] that must stay loaded.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kernel {
    function: sys::CUfunction,
    threads: u32,
    shared_bytes: u32,
}

impl Kernel {
    /// The same, of which a launch asks for no more shared memory than `bytes`.
    pub(super) fn with_shared(self, bytes: usize) -> Self {
        assert!(bytes <= self.shared_bytes as usize, "shared memory that was announced");
        Self { shared_bytes: bytes as u32, ..self }
    }
}

// SAFETY: a handle of the driver, which any thread may use.
unsafe impl Send for Kernel {}
// SAFETY: as above.
unsafe impl Sync for Kernel {}

impl Module {
    /// The kernel called `name`, to be run by blocks of `threads` with `shared_bytes` of shared memory that the launch asks for.
    pub(super) fn kernel(&self, name: &str, threads: u32, shared_bytes: usize) -> Result<Kernel, DeviceError> {
        self.gpu.bind()?;
        let symbol = CString::new(name).expect("names of kernels have no zeros");
        // SAFETY: the module is loaded.
        let function = unsafe { result::module::get_function(self.module, symbol) };
        let function = self.gpu.check("cuModuleGetFunction", function)?;
        let shared_bytes = i32::try_from(shared_bytes).expect("shared memory is some KiB");
        let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the function was just found.
        let set = unsafe { result::function::set_function_attribute(function, attribute, shared_bytes) };
        self.gpu.check("cuFuncSetAttribute", set)?;
        Ok(Kernel { function, threads, shared_bytes: shared_bytes.cast_unsigned() })
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        // SAFETY: it was loaded by `Gpu::load`. Its kernels have ended: streams wait for theirs before they are dropped.
        let _ = self.gpu.bind().map(|()| unsafe { result::module::unload(self.module) });
    }
}
