//! A router on a GPU: embedding, attention with its KV cache, gate and output projection, all of it on the device between two layers.
//!
//! - `budget`: where weights, cache and workspace lie in one piece of memory, taken at the start; refuses what does not fit.
//! - `step`: what comes in with a batch, in one copy; `attention` cuts its attention up.
//! - `draws`: what comes in with a wish for logits or draws, and what was drawn.
//! - `launches`: what is computed in which order, as data; `machine` does it, a GPU's streams or in tests the emulator.
//!
//! A layer crosses to the host once, with what the experts are asked, and back once, with what they made: pinned memory on both
//! ways, and one wait. Weights are bf16, activations sums of two bf16 where a matrix multiplies them, all else is f32, the KV cache too.
//! A token's bits depend neither on its batch mates nor on how its sequence was cut up: see the orders of summation at the top of
//! `kernels/ffn.cu`, `kernels/router.cu` and `kernels/attention.cu`. They are near the CPU's, and not the same.

mod attention;
mod budget;
mod draws;
mod launches;
mod machine;
#[cfg(test)]
mod repeats;
mod step;
#[cfg(test)]
pub(super) mod tests;

use std::sync::Arc;
use std::time::{Duration, Instant};

use sirocco_types::{ExpertId, LayerId, ModelSpec, Routing};

use super::backend::RESERVE;
use super::error::DeviceError;
use super::gpu::Gpu;
use super::kernels::KernelSettings;
use super::launch::Launch;
use super::layout::{TILE, pack_bf16_tile};
use super::nvml::Nvml;
use crate::router::{GpuGauge, LANES, RouterBackend, RouterLimits, RouterMatrix, RouterVector};
use crate::{Draw, Drawn, Queries, Rotary};
use budget::{Budget, NoRoom, Shapes};
use draws::{Ask, DRAWN};
#[cfg(test)]
pub(super) use launches::KERNELS;
use launches::Launches;
use machine::{Card, Machine};
use step::Step;

/// All but the experts of a model, on a GPU.
#[derive(Debug)]
pub struct CudaRouter {
    machine: Box<dyn Machine>,
    spec: ModelSpec,
    shapes: Shapes,
    budget: Budget,
    rotary: Rotary,
    lanes: [Lane; LANES],
    name: String,
    nvml: Option<Arc<Nvml>>,
}

/// A batch.
#[derive(Debug, Default)]
struct Lane {
    step: Step,
    /// Layers it went through, and whether it waits for the experts of the next.
    done: usize,
    asked: bool,
}

impl CudaRouter {
    /// Takes the GPU `cuda:ordinal` for a model like `spec`: all memory at once, for weights, KV cache and a workspace for two batches.
    /// Compiles kernels unless they are cached.
    ///
    /// Errors say what is missing: [`DeviceError::NoRoom`] with the numbers when it does not fit, [`DeviceError::Shape`] when no
    /// kernel knows the model's shape.
    pub fn open(
        ordinal: usize,
        settings: &KernelSettings,
        spec: &ModelSpec,
        limits: RouterLimits,
    ) -> Result<Self, DeviceError> {
        let device = format!("cuda:{ordinal}");
        budget::check(&device, spec)?;
        let gpu = Gpu::open(ordinal)?;
        let shapes = Shapes::new(spec);
        let (free, total) = gpu.memory()?;
        // The driver and others are left their part.
        let budget = Budget::new(&shapes, spec, limits, free.saturating_sub(total / RESERVE));
        let budget = budget.map_err(|NoRoom { weights, cache, workspace }| {
            let needed = weights + cache + workspace + total / RESERVE;
            DeviceError::NoRoom { device, needed, weights, cache, workspace, free, total }
        })?;
        let machine = Card::new(&gpu, settings, &shapes, &budget)?;
        let nvml = Nvml::open(gpu.bus()).map(Arc::new);
        Ok(Self { nvml, ..Self::on(Box::new(machine), spec, shapes, budget, gpu.name().to_owned()) })
    }

    fn on(machine: Box<dyn Machine>, spec: &ModelSpec, shapes: Shapes, budget: Budget, name: String) -> Self {
        let rotary = Rotary::new(spec.head_dim, spec.rope_theta);
        Self { machine, spec: spec.clone(), shapes, budget, rotary, lanes: Default::default(), name, nvml: None }
    }

    /// Loads a matrix, whose `rows` are little-endian bf16 of the shape that [`RouterMatrix::shape`] says.
    pub fn load_matrix(&mut self, matrix: RouterMatrix, rows: &[u8]) -> Result<(), DeviceError> {
        let (outputs, inputs) = matrix.shape(&self.spec);
        assert_eq!(rows.len(), outputs * inputs * 2, "{matrix:?} has its shape");
        let tile_bytes = super::layout::Matrix::new(outputs, inputs).bf16_tile_bytes();
        let tile_rows = TILE * inputs * 2;
        let at_once = (self.budget.workspace.in_bytes / tile_bytes).max(1);
        let mut to = self.budget.weights.matrix(matrix);
        // While one lane's are copied, the other's are packed.
        for (index, rows) in rows.chunks(at_once * tile_rows).enumerate() {
            let lane = index % LANES;
            let staging = self.machine.staging(lane)?;
            let bytes = rows.len().div_ceil(tile_rows) * tile_bytes;
            for (rows, tile) in rows.chunks(tile_rows).zip(staging.chunks_exact_mut(tile_bytes)) {
                pack_bf16_tile(inputs, rows, tile);
            }
            self.machine.copy_in(lane, to, bytes)?;
            to += bytes;
        }
        (0..LANES).try_for_each(|lane| self.machine.wait(lane))
    }

    /// Loads a vector, `[hidden_size]`.
    pub fn load_vector(&mut self, vector: RouterVector, values: &[f32]) -> Result<(), DeviceError> {
        assert_eq!(values.len(), self.shapes.hidden, "{vector:?} has its shape");
        copy_floats(&mut *self.machine, 0, values, self.budget.weights.vector(vector))?;
        self.machine.wait(0)
    }

    /// For benchmarks: how long the kernels of a layer's attention take for `queries`, from rotation to folding, on average over `times`.
    pub fn attention_time(&mut self, queries: &[Queries], times: u32) -> Result<Duration, DeviceError> {
        let tokens: usize = queries.iter().map(|queries| queries.len).sum();
        self.begin(0, &vec![0; tokens], queries)?;
        let launches = self.launches(0).attention(&self.lanes[0].step, LayerId(0));
        self.time(&launches, times)
    }

    /// For benchmarks: how long drawing from the logits takes that lane 0 came to last, from a row for each of `draws`, on average over
    /// `times`. Penalties change them each time.
    pub fn sample_time(&mut self, draws: &[&Draw], times: u32) -> Result<Duration, DeviceError> {
        let ask = self.ask(0, &vec![0; draws.len()], draws)?;
        assert_eq!(ask.rows, draws.len(), "they are drawn from at once");
        let launch = self.launches(0).sample(&ask, 0);
        self.time(&[launch], times)
    }

    /// How long launches of lane 0 take, on average over `times` after one more.
    fn time(&mut self, launches: &[Launch], times: u32) -> Result<Duration, DeviceError> {
        let run = |machine: &mut dyn Machine| launches.iter().try_for_each(|launch| machine.launch(0, launch));
        run(&mut *self.machine)?;
        self.machine.wait(0)?;
        let since = Instant::now();
        (0..times).try_for_each(|_| run(&mut *self.machine))?;
        self.machine.wait(0)?;
        Ok(since.elapsed() / times)
    }

    /// For benchmarks and checks: whether launches that come again become graphs, as they do at first.
    pub fn use_graphs(&mut self, on: bool) {
        self.machine.use_graphs(on);
    }

    /// For benchmarks and checks: how many graphs have been launched.
    pub fn graph_launches(&self) -> u64 {
        self.machine.graph_launches()
    }

    /// Bytes of KV cache that a token takes in a layer.
    pub fn kv_token_bytes(&self) -> usize {
        self.shapes.layer_block_bytes() / crate::BLOCK_TOKENS
    }

    fn launches(&self, lane: usize) -> Launches<'_> {
        let (shapes, budget, base) = (&self.shapes, &self.budget, self.machine.base());
        Launches { shapes, budget, base, lane, epsilon: self.spec.rms_norm_eps }
    }

    fn launch(&mut self, lane: usize, launches: &[Launch]) -> Result<(), DeviceError> {
        self.machine.launch_all(lane, launches)
    }

    /// What `run` gives. After an error all that the lane has queued is waited for: its blocks may be somebody else's next.
    fn settled<T>(
        &mut self,
        lane: usize,
        run: impl FnOnce(&mut Self) -> Result<T, DeviceError>,
    ) -> Result<T, DeviceError> {
        let result = run(self);
        if result.is_err() {
            // It failed already, which is said.
            let _ = self.machine.wait(lane);
        }
        result
    }

    /// Where a part of a lane's workspace lies in the memory.
    fn place(&self, lane: usize, part: usize) -> usize {
        self.budget.lanes[lane] + part
    }

    /// Queues what comes in with a wish for the logits after the first of `rows`, and for what is drawn from them when there are `draws`;
    /// as many as there is room for at once.
    fn ask(&mut self, lane: usize, rows: &[u32], draws: &[&Draw]) -> Result<Ask, DeviceError> {
        assert_eq!(self.lanes[lane].done, self.shapes.layers, "logits come after all layers");
        let to = self.place(lane, self.budget.workspace.ask);
        let address = self.machine.base() + to as u64;
        let staging = self.machine.staging(lane)?;
        let workspace = &self.budget.workspace;
        let rows = &rows[..rows.len().min(workspace.logit_rows)];
        let staging = &mut staging[..workspace.ask_bytes];
        let (ask, bytes) = Ask::write(rows, draws, self.spec.vocab_size, staging, address);
        self.machine.copy_in(lane, to, bytes)?;
        Ok(ask)
    }
}

impl RouterBackend for CudaRouter {
    fn kind(&self) -> &'static str {
        "cuda"
    }

    fn name(&self) -> String {
        self.name.clone()
    }

    fn gauge(&self) -> Option<GpuGauge> {
        let nvml = Arc::clone(self.nvml.as_ref()?);
        Some(Arc::new(move || nvml.read()))
    }

    fn weight_bytes(&self) -> usize {
        self.budget.weights.bytes
    }

    fn kv_blocks(&self) -> usize {
        self.budget.kv_blocks
    }

    fn copy_block(&mut self, from: u32, to: u32) -> Result<(), DeviceError> {
        let launch = self.launches(0).copy_block(from, to);
        self.machine.launch(0, &launch)?;
        // The other lane's stream does not wait for this one.
        self.machine.wait(0)
    }

    fn begin(&mut self, lane: usize, tokens: &[u32], queries: &[Queries]) -> Result<(), DeviceError> {
        let workspace = &self.budget.workspace;
        assert!((1..=workspace.tokens).contains(&tokens.len()), "a batch is as large as was announced");
        let to = self.place(lane, workspace.step);
        let address = self.machine.base() + to as u64;
        let plan = (&self.shapes.heads, &self.rotary, workspace.record_room);
        let staging = &mut self.machine.staging(lane)?[..workspace.step_bytes];
        let (step, bytes) = Step::write(plan, tokens, queries, staging, address);
        self.lanes[lane] = Lane { step, done: 0, asked: false };
        let launches = self.launches(lane).begin(&self.lanes[lane].step);
        self.settled(lane, |router| {
            router.machine.copy_in(lane, to, bytes)?;
            router.launch(lane, &launches)
        })
    }

    fn attend(&mut self, lane: usize, layer: LayerId, normed: &mut Vec<f32>) -> Result<Routing, DeviceError> {
        let Lane { step, done, asked } = &mut self.lanes[lane];
        assert!(*done == layer.index() && !std::mem::replace(asked, true), "layers are computed in order");
        let (tokens, top_k) = (step.tokens, self.shapes.top_k);
        let launches = self.launches(lane).attend(&self.lanes[lane].step, layer);
        let wide = tokens * self.shapes.hidden * 4;
        let from = self.place(lane, self.budget.workspace.out);
        self.settled(lane, |router| {
            router.launch(lane, &launches)?;
            let out = router.machine.copy_out(lane, from, wide + tokens * top_k * 8)?;
            let (rows, routing) = out.split_at(wide);
            let (experts, weights) = routing.split_at(tokens * top_k * 4);
            normed.clear();
            normed.extend(floats(rows));
            let experts = experts.as_chunks::<4>().0.iter().map(|id| ExpertId(u32::from_le_bytes(*id)));
            Ok(Routing { top_k, experts: experts.collect(), weights: floats(weights).collect() })
        })
    }

    fn add_experts(&mut self, lane: usize, layer: LayerId, combined: &[f32]) -> Result<(), DeviceError> {
        let to = self.place(lane, self.budget.workspace.addend);
        let Lane { step, done, asked } = &mut self.lanes[lane];
        assert!(*done == layer.index() && std::mem::replace(asked, false), "experts answer what was asked");
        assert_eq!(combined.len(), step.tokens * self.shapes.hidden, "a row for each token");
        *done += 1;
        let launch = self.launches(lane).add_experts(&self.lanes[lane].step, layer);
        self.settled(lane, |router| {
            copy_floats(&mut *router.machine, lane, combined, to)?;
            router.machine.launch(lane, &launch)
        })
    }

    fn overflows(&mut self, lane: usize) -> Result<Vec<Option<LayerId>>, DeviceError> {
        let step = &self.lanes[lane].step;
        let (from, bytes) = ((step.overflows - self.machine.base()) as usize, step.queries * 4);
        let layers = self.machine.copy_out(lane, from, bytes)?.as_chunks::<4>().0.iter();
        let layers = layers.map(|layer| Some(u32::from_le_bytes(*layer)).filter(|layer| *layer != u32::MAX));
        Ok(layers.map(|layer| layer.map(LayerId)).collect())
    }

    fn logits(&mut self, lane: usize, rows: &[u32]) -> Result<Vec<f32>, DeviceError> {
        let width = self.shapes.vocab.outputs as usize;
        let from = self.place(lane, self.budget.workspace.logits);
        let mut logits = Vec::with_capacity(rows.len() * width);
        while logits.len() < rows.len() * width {
            let ask = self.ask(lane, &rows[logits.len() / width..], &[])?;
            let launches = self.launches(lane).logits(&ask);
            self.launch(lane, &launches)?;
            logits.extend(floats(self.machine.copy_out(lane, from, ask.rows * width * 4)?));
        }
        Ok(logits)
    }

    fn sample(&mut self, lane: usize, rows: &[u32], draws: &[&Draw]) -> Result<Vec<Option<Drawn>>, DeviceError> {
        assert_eq!(rows.len(), draws.len(), "a draw for each row");
        assert!(rows.len() <= self.budget.workspace.tokens, "no more rows than a batch has");
        let mut first = 0;
        while first < rows.len() {
            let ask = self.ask(lane, &rows[first..], &draws[first..])?;
            let mut launches = self.launches(lane).logits(&ask);
            launches.push(self.launches(lane).sample(&ask, first));
            self.launch(lane, &launches)?;
            first += ask.rows;
        }
        let from = self.place(lane, self.budget.workspace.drawn);
        let drawn = self.machine.copy_out(lane, from, rows.len() * DRAWN)?;
        let vocab = self.spec.vocab_size;
        Ok(drawn.as_chunks().0.iter().zip(draws).map(|(bytes, draw)| draws::read(bytes, draw, vocab)).collect())
    }
}

/// Little-endian f32.
fn floats(bytes: &[u8]) -> impl Iterator<Item = f32> {
    bytes.as_chunks::<4>().0.iter().map(|value| f32::from_le_bytes(*value))
}

/// Queues a copy of `values` to byte `to` of the memory.
fn copy_floats(machine: &mut dyn Machine, lane: usize, values: &[f32], to: usize) -> Result<(), DeviceError> {
    let staging = machine.staging(lane)?;
    for (place, value) in staging.as_chunks_mut::<4>().0.iter_mut().zip(values) {
        *place = value.to_le_bytes();
    }
    machine.copy_in(lane, to, values.len() * 4)
}
