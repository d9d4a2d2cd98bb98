//! What a router's memory is of and its launches are done by: a GPU's streams; in tests, where there is no GPU, the emulator.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use super::budget::{Budget, Shapes};
use super::launches::{KERNELS, most_shared, threads};
use crate::cuda::error::DeviceError;
use crate::cuda::gpu::{Gpu, Graph, Kernel, Memory, Module, Pinned, Stream};
use crate::cuda::graphs::Graphs;
use crate::cuda::kernels::{self, KernelSettings};
use crate::cuda::launch::Launch;
use crate::router::LANES;

/// One piece of memory, and for each lane a queue of copies and launches, done in order.
pub(super) trait Machine: Send + fmt::Debug {
    /// Address of the memory.
    fn base(&self) -> u64;

    /// What [`Machine::copy_in`] copies from. Waits until earlier copies from it are done.
    fn staging(&mut self, lane: usize) -> Result<&mut [u8], DeviceError>;

    /// Queues a copy of the first `bytes` of the lane's staging to byte `to` of the memory.
    fn copy_in(&mut self, lane: usize, to: usize, bytes: usize) -> Result<(), DeviceError>;

    /// Queues a kernel.
    fn launch(&mut self, lane: usize, launch: &Launch) -> Result<(), DeviceError>;

    /// Queues kernels, one after the other: as a graph when they have come before.
    fn launch_all(&mut self, lane: usize, launches: &[Launch]) -> Result<(), DeviceError>;

    /// Whether lists of launches become graphs, as they do at first.
    fn use_graphs(&mut self, on: bool);

    /// How many graphs have been launched.
    fn graph_launches(&self) -> u64;

    /// Copies `bytes` from byte `from` of the memory, when all that the lane has queued is done.
    fn copy_out(&mut self, lane: usize, from: usize, bytes: usize) -> Result<&[u8], DeviceError>;

    /// Waits until all that the lane has queued is done.
    fn wait(&mut self, lane: usize) -> Result<(), DeviceError>;
}

/// A GPU with a router's memory.
#[derive(Debug)]
pub(super) struct Card {
    // Dropped in this order: what names the others, then what may still be under way.
    graphs: Graphs<Graph>,
    lanes: [Queue; LANES],
    kernels: HashMap<&'static str, Kernel>,
    /// Keeps the kernels loaded.
    _module: Module,
    memory: Memory,
}

/// A stream with its host memory.
#[derive(Debug)]
struct Queue {
    // Dropped first, and waits for what is under way.
    stream: Stream,
    staging: Pinned,
    results: Pinned,
    /// Whether copies from `staging` may be under way.
    copying: bool,
}

impl Card {
    /// Takes the memory, and compiles kernels unless they are cached.
    pub(super) fn new(
        gpu: &Arc<Gpu>,
        settings: &KernelSettings,
        shapes: &Shapes,
        budget: &Budget,
    ) -> Result<Self, DeviceError> {
        let module = kernels::load(gpu, settings)?;
        let kernel =
            |name: &'static str| Ok((name, module.kernel(name, threads(name) as u32, most_shared(name, shapes))?));
        let kernels = KERNELS.into_iter().map(kernel).collect::<Result<_, DeviceError>>()?;
        let queue = || {
            Ok(Queue {
                stream: gpu.stream()?,
                staging: gpu.allocate_pinned(budget.workspace.in_bytes)?,
                results: gpu.allocate_pinned(budget.workspace.out_bytes)?,
                copying: false,
            })
        };
        let lanes = [queue()?, queue()?];
        let memory = gpu.allocate(budget.bytes, "a router's weights, KV cache and workspace")?;
        Ok(Self { graphs: Graphs::of(settings), lanes, kernels, _module: module, memory })
    }
}

impl Machine for Card {
    fn base(&self) -> u64 {
        self.memory.address()
    }

    fn staging(&mut self, lane: usize) -> Result<&mut [u8], DeviceError> {
        let queue = &mut self.lanes[lane];
        if queue.copying {
            queue.stream.wait()?;
            queue.copying = false;
        }
        Ok(&mut queue.staging)
    }

    fn copy_in(&mut self, lane: usize, to: usize, bytes: usize) -> Result<(), DeviceError> {
        let queue = &mut self.lanes[lane];
        queue.copying = true;
        // SAFETY: `staging` waits before it gives the host memory to be written again, and both are dropped after the stream, which
        // waits then.
        unsafe { queue.stream.copy_in(&self.memory, to, &queue.staging, bytes) }
    }

    fn launch(&mut self, lane: usize, launch: &Launch) -> Result<(), DeviceError> {
        let kernel = self.kernels[launch.kernel].with_shared(launch.shared);
        // SAFETY: launches are made by `launches.rs` alone, with the arguments that the kernels take, of places that `budget.rs`
        // made large enough; tests run the same launches on the CPU. The memory is dropped after the streams, which wait then.
        unsafe { self.lanes[lane].stream.launch(&kernel, launch.grid, &launch.arguments) }
    }

    fn launch_all(&mut self, lane: usize, launches: &[Launch]) -> Result<(), DeviceError> {
        // SAFETY: as for `launch`; kernels and memory are dropped after the graphs.
        unsafe { self.graphs.run(&self.lanes[lane].stream, &self.kernels, launches) }
    }

    fn use_graphs(&mut self, on: bool) {
        self.graphs.set(on);
    }

    fn graph_launches(&self) -> u64 {
        self.graphs.launched()
    }

    fn copy_out(&mut self, lane: usize, from: usize, bytes: usize) -> Result<&[u8], DeviceError> {
        let queue = &mut self.lanes[lane];
        // SAFETY: it is waited for at once; when that fails, the host memory is read by nobody before the next copy was waited for.
        unsafe { queue.stream.copy_out(&mut queue.results, &self.memory, from, bytes)? };
        queue.stream.wait()?;
        queue.copying = false;
        Ok(&queue.results[..bytes])
    }

    fn wait(&mut self, lane: usize) -> Result<(), DeviceError> {
        let queue = &mut self.lanes[lane];
        queue.stream.wait()?;
        queue.copying = false;
        Ok(())
    }
}
