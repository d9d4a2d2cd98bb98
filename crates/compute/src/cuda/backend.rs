//! Runs batches of experts on a GPU.
//!
//! A batch is cut into waves that the workspace has room for. Two lanes, each with a stream and buffers of its own, take turns:
//! while one computes, the other's rows come in or go out. A wave is one copy in of what to do and one of its hidden states, each
//! once however many experts want it; two launches for each half of the experts at most, which are one graph when as many items
//! came before; and one copy out. The workspace is there from the start, so a batch needs no memory of its own.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sirocco_types::ExpertDtype;

use super::error::DeviceError;
use super::expert::{CudaExpert, CudaPacker, Staging};
use super::gpu::{Gpu, Graph, Memory, Pinned, Stream};
use super::graphs::Graphs;
use super::kernels::{KernelSettings, Kernels, grid_y, shared_bytes};
use super::launch::{Launch, Operands};
use super::layout::{Layout, row_bytes, write_row};
use super::nvml::Nvml;
use super::plan::{ITEM, Piece, Work, item, items, waves};
use crate::backend::{Batch, ExpertBackend, GpuReadings};
use crate::ffn::ExpertPacker;

/// Most rows of a wave.
const SLOTS: usize = 4096;

/// The part of a GPU's memory that is left to the driver and to others: one in so many.
pub(super) const RESERVE: usize = 32;

/// What the driver takes for each process on a GPU, at most.
const CONTEXT: usize = 640 << 20;

/// A GPU's memory, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GpuMemory {
    /// In nobody's use.
    pub free: usize,
    /// All of it.
    pub total: usize,
}

/// The memory of the GPU `cuda:ordinal` now. Errors say why it cannot be used; kernels are compiled for that, unless they are cached.
pub fn probe_gpu(ordinal: usize, settings: &KernelSettings) -> Result<GpuMemory, DeviceError> {
    let gpu = Gpu::open(ordinal)?;
    Kernels::load(&gpu, settings, ExpertDtype::default())?;
    let (free, total) = gpu.memory()?;
    Ok(GpuMemory { free, total })
}

/// What batches are run with.
#[derive(Debug)]
struct Lanes {
    // Dropped first, for they name what the lanes have.
    graphs: Graphs<Graph>,
    lanes: [Lane; 2],
}

/// Experts on a GPU.
#[derive(Debug)]
pub struct CudaBackend {
    // Dropped in this order: what may still be under way first.
    work: Mutex<Lanes>,
    staging: Arc<Mutex<Staging>>,
    kernels: Kernels,
    layout: Layout,
    capacity: usize,
    nvml: Option<Nvml>,
    gpu: Arc<Gpu>,
}

impl CudaBackend {
    /// Takes the GPU `cuda:ordinal` for experts of this shape, kept as `dtype`: compiles kernels unless they are cached, and takes
    /// the workspace. Errors say what is missing.
    pub fn open(
        ordinal: usize,
        settings: &KernelSettings,
        dtype: ExpertDtype,
        (hidden, inter): (usize, usize),
    ) -> Result<Self, DeviceError> {
        let gpu = Gpu::open(ordinal)?;
        let kernels = Kernels::load(&gpu, settings, dtype)?;
        let layout = Layout { dtype, hidden, inter };
        let (free, total) = gpu.memory()?;
        let needed = 2 * Lane::device_bytes(layout) + total / RESERVE;
        if needed + layout.bytes() > free {
            let device = format!("cuda:{ordinal}");
            let needed = needed + layout.bytes();
            return Err(DeviceError::NotEnough { device, what: "the workspace and one expert", needed, free, total });
        }
        let lanes = [Lane::new(&gpu, layout)?, Lane::new(&gpu, layout)?];
        let staging = Arc::new(Mutex::new(Staging::new(&gpu, layout)?));
        let nvml = Nvml::open(gpu.bus());
        let capacity = free - needed;
        let work = Mutex::new(Lanes { graphs: Graphs::of(settings), lanes });
        Ok(Self { work, staging, kernels, layout, capacity, nvml, gpu })
    }
}

impl CudaBackend {
    /// Bytes of experts that each of `nodes` such backends has room for, when they are opened together on a GPU with `memory`, by
    /// processes of their own.
    pub fn share(memory: GpuMemory, nodes: usize, dtype: ExpertDtype, (hidden, inter): (usize, usize)) -> usize {
        let workspace = 2 * Lane::device_bytes(Layout { dtype, hidden, inter });
        memory.free.saturating_sub(memory.total / RESERVE + nodes * (workspace + CONTEXT)) / nodes
    }

    /// For benchmarks and checks: whether launches that come again become graphs, as they do at first.
    pub fn use_graphs(&self, on: bool) {
        self.work().graphs.set(on);
    }

    /// For benchmarks and checks: how many graphs have been launched.
    pub fn graph_launches(&self) -> u64 {
        self.work().graphs.launched()
    }

    fn work(&self) -> MutexGuard<'_, Lanes> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// For benchmarks: how long the kernels take for the first wave of `batch`, without the copies on both sides, on average over
    /// `times`.
    pub fn kernel_time(&self, batch: &Batch, times: u32) -> Result<Duration, DeviceError> {
        let rows: Vec<usize> = batch.parts.iter().map(|part| part.rows.len()).collect();
        let Some(wave) = waves(&rows, SLOTS).into_iter().next() else { return Ok(Duration::ZERO) };
        let mut work = self.work();
        let Lanes { graphs, lanes: [lane, _] } = &mut *work;
        let mut timed = || {
            let work = lane.prepare(self.layout, batch, &wave)?;
            lane.compute(graphs, &self.kernels, self.layout, &work)?;
            lane.stream.wait()?;
            let since = Instant::now();
            (0..times).try_for_each(|_| lane.compute(graphs, &self.kernels, self.layout, &work))?;
            lane.stream.wait()?;
            Ok(since.elapsed() / times)
        };
        let result = timed();
        if result.is_err() {
            lane.stop();
        }
        result
    }
}

impl ExpertBackend for CudaBackend {
    fn kind(&self) -> &'static str {
        "cuda"
    }

    fn name(&self) -> String {
        self.gpu.name().to_owned()
    }

    fn capacity_bytes(&self) -> Option<u64> {
        Some(self.capacity as u64)
    }

    fn packer(&self) -> Result<ExpertPacker, DeviceError> {
        let packer = CudaPacker::new(&self.gpu, self.layout, Arc::clone(&self.staging))?;
        Ok(ExpertPacker::on_gpu(packer, self.layout.hidden, self.layout.inter))
    }

    fn run(&self, batch: &Batch, done: &mut dyn FnMut(usize, usize, &[f32])) -> Result<(), DeviceError> {
        let rows: Vec<usize> = batch.parts.iter().map(|part| part.rows.len()).collect();
        let mut work = self.work();
        let Lanes { graphs, lanes } = &mut *work;
        // After a panic a wave may be under way, whose rows are not this batch's.
        lanes.iter_mut().filter(|lane| !lane.pieces.is_empty()).for_each(Lane::stop);
        let waves = waves(&rows, SLOTS);
        let count = waves.len();
        let result = waves.into_iter().enumerate().try_for_each(|(index, wave)| {
            let lane = &mut lanes[index % 2];
            lane.finish(self.layout, done)?;
            lane.start((graphs, &self.kernels), self.layout, batch, wave)
        });
        let result = result.and_then(|()| (count..count + 2).try_for_each(|i| lanes[i % 2].finish(self.layout, done)));
        if result.is_err() {
            lanes.iter_mut().for_each(Lane::stop);
        }
        result
    }

    fn readings(&self) -> Option<GpuReadings> {
        self.nvml.as_ref()?.read()
    }
}

/// A stream with the memory for a wave.
#[derive(Debug)]
struct Lane {
    // Dropped first, and waits for what is under way.
    stream: Stream,
    /// On the host: items of few rows, items of many rows, then for each slot its row, `[slots]` u32.
    work: Pinned,
    /// On the host: `[rows, row_bytes(hidden)]`.
    rows: Pinned,
    /// On the host: `[slots, hidden]` f32.
    output: Pinned,
    /// `work` and the others, on the device.
    device_work: Memory,
    device_rows: Memory,
    device_output: Memory,
    /// On the device: `[slots, row_bytes(inter)]`.
    gated: Memory,
    /// What is under way.
    pieces: Vec<Piece>,
    /// A row on its way into `rows`.
    row: Vec<f32>,
}

impl Lane {
    /// Bytes of `work`, `rows`, `output`, and `gated`.
    fn sizes(layout: Layout) -> [usize; 4] {
        let (hidden, inter) = (row_bytes(layout.hidden), row_bytes(layout.inter));
        [SLOTS * (ITEM + 4), SLOTS * hidden, SLOTS * layout.hidden * 4, SLOTS * inter]
    }

    fn device_bytes(layout: Layout) -> usize {
        Self::sizes(layout).iter().sum()
    }

    fn new(gpu: &Arc<Gpu>, layout: Layout) -> Result<Self, DeviceError> {
        const WHAT: &str = "the workspace";
        let [work, rows, output, gated] = Self::sizes(layout);
        Ok(Self {
            stream: gpu.stream()?,
            work: gpu.allocate_pinned(work)?,
            rows: gpu.allocate_pinned(rows)?,
            output: gpu.allocate_pinned(output)?,
            device_work: gpu.allocate(work, WHAT)?,
            device_rows: gpu.allocate(rows, WHAT)?,
            device_output: gpu.allocate(output, WHAT)?,
            gated: gpu.allocate(gated, WHAT)?,
            pieces: Vec::new(),
            row: Vec::with_capacity(layout.hidden),
        })
    }

    /// Queues a wave. Nothing must be under way.
    fn start(
        &mut self,
        (graphs, kernels): (&mut Graphs<Graph>, &Kernels),
        layout: Layout,
        batch: &Batch,
        wave: Vec<Piece>,
    ) -> Result<(), DeviceError> {
        let prepared = self.prepare(layout, batch, &wave)?;
        self.pieces = wave;
        self.compute(graphs, kernels, layout, &prepared)?;
        // SAFETY: `finish` or `stop` waits before the lane is used again; `finish` reads it after that.
        unsafe { self.stream.copy_out(&mut self.output, &self.device_output, 0, prepared.slots * layout.hidden * 4) }
    }

    /// Writes what a wave needs and queues its copy. Nothing must be under way.
    fn prepare(&mut self, layout: Layout, batch: &Batch, wave: &[Piece]) -> Result<Prepared, DeviceError> {
        let (few, many) = items(wave);
        let row_of = self.write_items(layout, batch, few.iter().chain(&many));
        let (slots, rows) = self.write_rows(layout, batch, wave, row_of);
        // SAFETY: the buffers are written by this function alone, which is called when nothing is under way.
        unsafe {
            self.stream.copy_in(&self.device_work, 0, &self.work, row_of + slots * 4)?;
            self.stream.copy_in(&self.device_rows, 0, &self.rows, rows * row_bytes(layout.hidden))?;
        }
        Ok(Prepared { few: few.len(), many: many.len(), row_of, slots })
    }

    /// Queues the kernels.
    fn compute(
        &self,
        graphs: &mut Graphs<Graph>,
        kernels: &Kernels,
        layout: Layout,
        prepared: &Prepared,
    ) -> Result<(), DeviceError> {
        // SAFETY: these are the arguments of all kernels of `ffn.cu`, by their types; a lane's memory has room for SLOTS slots,
        // and it, the experts and the kernels stay until the lane has waited. No graph names an expert's memory, which items
        // do; the lane's and the kernels are dropped after the graphs.
        unsafe { graphs.run(&self.stream, &kernels.by_shape, &self.launches(layout, prepared)) }
    }

    /// The launches of a wave: the same again when as many items of few rows and of many come.
    fn launches(&self, layout: Layout, prepared: &Prepared) -> Vec<Launch> {
        let (gate_up, down) = (layout.gate_up(), layout.down());
        let items = self.device_work.address();
        let (x, gated, output) = (self.device_rows.address(), self.gated.address(), self.device_output.address());
        let row_of = items + prepared.row_of as u64;
        let halves = [
            (gate_up, ["gate_up_few", "gate_up_many"], (x, row_of, gated), true),
            (down, ["linear_few", "linear_many"], (gated, 0, output), false),
        ];
        let mut launches = Vec::new();
        for (matrix, [for_few, for_many], (from, row_of, to), is_gated) in halves {
            let (few_y, many_y) = grid_y(matrix.tiles, is_gated);
            // Of weights the items have whole addresses.
            let few = Operands { items, base: 0, from, row_of, to, matrix, width: matrix.outputs };
            let many = Operands { items: items + (prepared.few * ITEM) as u64, ..few };
            let shared = shared_bytes(layout.dtype);
            for (kernel, operands, grid, shared) in
                [(for_few, few, (prepared.few, few_y), 0), (for_many, many, (prepared.many, many_y), shared)]
            {
                if grid.0 > 0 {
                    launches.push(Launch { kernel, grid, shared, arguments: operands.arguments().to_vec() });
                }
            }
        }
        launches
    }

    /// Writes items to `work`; how many bytes they take.
    fn write_items<'a>(&mut self, layout: Layout, batch: &Batch, items: impl Iterator<Item = &'a Work>) -> usize {
        let mut written = 0;
        for Work { part, first, rows } in items {
            let weights = expert(batch, *part);
            assert_eq!(weights.layout(), layout, "experts have the shape of their model");
            let (gate_up, down) = weights.addresses();
            self.work[written..written + ITEM].copy_from_slice(&item([gate_up, down], *first, *rows));
            written += ITEM;
        }
        written
    }

    /// Writes the wave's hidden states to `rows`, each once, and to `work`, from byte `start` on, which of them each slot has. How
    /// many slots and rows there are.
    fn write_rows(&mut self, layout: Layout, batch: &Batch, wave: &[Piece], start: usize) -> (usize, usize) {
        let row_bytes = row_bytes(layout.hidden);
        let mut places: HashMap<usize, u32> = HashMap::new();
        let mut slots = 0;
        for piece in wave {
            for &row in &batch.parts[piece.part].rows[piece.rows.clone()] {
                let next = places.len() as u32;
                let place = *places.entry(row).or_insert(next);
                if place == next {
                    self.row.clear();
                    (batch.append)(row, &mut self.row);
                    write_row(&self.row, &mut self.rows[place as usize * row_bytes..][..row_bytes]);
                }
                self.work[start + slots * 4..][..4].copy_from_slice(&place.to_le_bytes());
                slots += 1;
            }
        }
        (slots, places.len())
    }

    /// Waits for the wave under way, if any, and hands out its rows.
    fn finish(&mut self, layout: Layout, done: &mut dyn FnMut(usize, usize, &[f32])) -> Result<(), DeviceError> {
        if self.pieces.is_empty() {
            return Ok(());
        }
        self.stream.wait()?;
        for Piece { part, rows, first } in self.pieces.drain(..) {
            done(part, rows.start, &self.output.floats()[first * layout.hidden..][..rows.len() * layout.hidden]);
        }
        Ok(())
    }

    /// Waits for the wave under way, if any, and forgets it.
    fn stop(&mut self) {
        self.pieces.clear();
        // It failed already, which was said.
        let _ = self.stream.wait();
    }
}

/// A wave that was written to a lane's buffers.
struct Prepared {
    /// Items of few rows.
    few: usize,
    /// Items of many rows, which follow.
    many: usize,
    /// Where in `work` the slots' rows begin, in bytes.
    row_of: usize,
    slots: usize,
}

/// The weights of a part.
fn expert<'a>(batch: &'a Batch, part: usize) -> &'a CudaExpert {
    batch.parts[part].weights.on_gpu().expect("a backend is given what its own packers made")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_that_share_a_gpu_have_room_for_what_they_were_told_in_whatever_order_they_are_opened_and_filled() {
        let (dtype, hidden, inter) = (ExpertDtype::Bf16, 4096, 14_336);
        let workspace = 2 * Lane::device_bytes(Layout { dtype, hidden, inter });
        let memory = GpuMemory { free: 70 << 30, total: 80 << 30 };
        for nodes in 1..=16 {
            let share = CudaBackend::share(memory, nodes, dtype, (hidden, inter));
            assert!(nodes > 8 || share > 5 << 30, "{nodes}: {share}");
            // All that were opened before may be full already.
            for before in 0..nodes {
                let free = memory.free - before * (CONTEXT + workspace + share) - CONTEXT;
                assert!(workspace + memory.total / RESERVE + share <= free, "number {before} of {nodes}");
            }
        }
        assert_eq!(CudaBackend::share(memory, 80, dtype, (hidden, inter)), 0);
    }

    #[test]
    fn the_workspace_is_what_its_parts_take() {
        let layout = Layout { dtype: ExpertDtype::Bf16, hidden: 4096, inter: 14_336 };
        assert_eq!(Lane::device_bytes(layout), 4096 * (28 + 4096 * 4 + 4096 * 4 + 14_336 * 4));
    }
}
