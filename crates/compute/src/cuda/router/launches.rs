//! The launches of a batch, as data: what is computed in which order, with which arguments. Plain code; never touches a device.

use sirocco_types::{ExpertDtype, LayerId};

use super::attention::{Round, Section};
use super::budget::{Budget, Shapes};
use super::draws::{Ask, DRAWN};
use super::step::{Items, Step};
use crate::cuda::kernels::{DRAW_THREADS, MANY_TILES, THREADS, shared_bytes};
use crate::cuda::launch::{Argument, Launch, Operands};
use crate::cuda::layout::{BLOCK, Matrix};
use crate::cuda::plan::ITEM;
use crate::router::{RouterMatrix, RouterVector};

/// The kernels of a router, all of them.
pub(in crate::cuda) const KERNELS: [&str; 14] = [
    "linear_few_bf16",
    "linear_many_bf16",
    "embed",
    "add_norm",
    "rotate",
    "choose",
    "copy_block",
    "attention_1",
    "attention_2",
    "attention_4",
    "attention_8",
    "attention_many",
    "fold",
    "sample",
];

/// Makes the launches of one lane.
#[derive(Clone, Copy, Debug)]
pub(super) struct Launches<'a> {
    pub(super) shapes: &'a Shapes,
    pub(super) budget: &'a Budget,
    /// Address of the router's memory.
    pub(super) base: u64,
    pub(super) lane: usize,
    pub(super) epsilon: f32,
}

/// Rows that are normed: of what, with which weights, for whom.
struct Norm {
    /// What is added before; 0 for nothing.
    addend: u64,
    layer: u32,
    weight: RouterVector,
    /// Where it goes besides to the next matrix; 0 for nowhere.
    normed: u64,
}

impl Launches<'_> {
    /// The address of a part of the lane's workspace.
    fn at(&self, place: usize) -> u64 {
        self.base + (self.budget.lanes[self.lane] + place) as u64
    }

    /// Embeds a batch's tokens and norms them for the first layer.
    pub(super) fn begin(&self, step: &Step) -> Vec<Launch> {
        let workspace = &self.budget.workspace;
        let embed = launch(
            "embed",
            (step.tokens, 1),
            0,
            [
                step.ids.into(),
                (self.base + self.budget.weights.embedding as u64).into(),
                self.shapes.vocab.into(),
                self.at(workspace.hidden).into(),
                (self.shapes.hidden as u32).into(),
            ],
        );
        let first = RouterVector::AttentionNorm(LayerId(0));
        vec![embed, self.norm(step, &Norm { addend: 0, layer: 0, weight: first, normed: 0 })]
    }

    /// Attention, residual, norm and gate of a layer.
    pub(super) fn attend(&self, step: &Step, layer: LayerId) -> Vec<Launch> {
        let (weights, workspace) = (&self.budget.weights, &self.budget.workspace);
        let (x, qkv, attended) = (self.at(workspace.x), self.at(workspace.qkv), self.at(workspace.attended));
        let (addend, gate, out) = (self.at(workspace.addend), self.at(workspace.gate), self.at(workspace.out));
        let linear = |matrix: Matrix, weights: usize, from: u64, to: u64| {
            let base = self.base + weights as u64;
            // A block for many rows has so many tiles: of a gate, which has fewer, one block would have all rows.
            let items = if (matrix.tiles as usize) < MANY_TILES { &step.narrow } else { &step.items };
            linear(items, &Operands { items: 0, base, from, row_of: 0, to, matrix, width: matrix.outputs })
        };
        let mut launches = linear(self.shapes.qkv, weights.qkv(layer), x, qkv);
        launches.extend(self.attention(step, layer));
        launches.extend(linear(self.shapes.o, weights.matrix(RouterMatrix::O(layer)), attended, addend));
        let weight = RouterVector::ExpertsNorm(layer);
        launches.push(self.norm(step, &Norm { addend, layer: layer.0, weight, normed: out }));
        launches.extend(linear(self.shapes.gate, weights.matrix(RouterMatrix::Gate(layer)), x, gate));
        let top_k = self.shapes.top_k;
        let chosen = out + (step.tokens * self.shapes.hidden * 4) as u64;
        launches.push(launch(
            "choose",
            (step.tokens.div_ceil(THREADS / 32), 1),
            0,
            [
                gate.into(),
                (step.tokens as u32).into(),
                self.shapes.gate.outputs.into(),
                (top_k as u32).into(),
                chosen.into(),
                (chosen + (step.tokens * top_k * 4) as u64).into(),
            ],
        ));
        launches
    }

    /// Rotation, storing of keys and values, and attention: from queries, keys and values to what the next matrix multiplies.
    pub(super) fn attention(&self, step: &Step, layer: LayerId) -> Vec<Launch> {
        let workspace = &self.budget.workspace;
        let heads = self.shapes.heads;
        let (qkv, cache, records) = (self.at(workspace.qkv), self.cache(layer), self.at(workspace.records));
        let scale = 1.0 / (heads.shape.head_dim as f32).sqrt();
        let mut launches = vec![launch(
            "rotate",
            (step.tokens, 1),
            0,
            [qkv.into(), step.angles.into(), step.slots.into(), scale.into(), cache.into(), heads.into()],
        )];
        for Round { sections, places } in &step.rounds {
            for Section { kernel, shared, tasks } in sections {
                launches.push(launch(
                    kernel,
                    (tasks.len(), heads.shape.kv_heads),
                    *shared,
                    [
                        (step.tasks + tasks.start as u64 * 8).into(),
                        step.tiles.into(),
                        step.tables.into(),
                        qkv.into(),
                        cache.into(),
                        records.into(),
                        heads.into(),
                    ],
                ));
            }
            launches.push(launch(
                "fold",
                (places.len(), heads.shape.kv_heads),
                0,
                [
                    (step.places + places.start as u64 * 4).into(),
                    step.tiles.into(),
                    records.into(),
                    self.at(workspace.attended).into(),
                    self.shapes.o.blocks.into(),
                    heads.into(),
                ],
            ));
        }
        launches
    }

    /// Adds what a layer's experts made to the residual stream and norms it for what follows.
    pub(super) fn add_experts(&self, step: &Step, layer: LayerId) -> Launch {
        let next = layer.index() + 1;
        let weight = if next < self.shapes.layers {
            RouterVector::AttentionNorm(LayerId(next as u32))
        } else {
            RouterVector::Norm
        };
        let addend = self.at(self.budget.workspace.addend);
        self.norm(step, &Norm { addend, layer: layer.0, weight, normed: 0 })
    }

    fn norm(&self, step: &Step, norm: &Norm) -> Launch {
        let (workspace, width) = (&self.budget.workspace, self.shapes.hidden);
        launch(
            "add_norm",
            (step.tokens, 1),
            0,
            [
                self.at(workspace.hidden).into(),
                norm.addend.into(),
                (width as u32).into(),
                step.query_of.into(),
                step.overflows.into(),
                norm.layer.into(),
                (self.base + self.budget.weights.vector(norm.weight) as u64).into(),
                self.epsilon.into(),
                self.at(workspace.x).into(),
                (width.div_ceil(BLOCK) as u32).into(),
                norm.normed.into(),
            ],
        )
    }

    /// The logits after the rows that are asked for.
    pub(super) fn logits(&self, ask: &Ask) -> Vec<Launch> {
        let (workspace, matrix) = (&self.budget.workspace, self.shapes.vocab);
        let base = self.base + self.budget.weights.lm_head as u64;
        let (from, to) = (self.at(workspace.x), self.at(workspace.logits));
        linear(&ask.items, &Operands { items: 0, base, from, row_of: ask.at, to, matrix, width: matrix.outputs })
    }

    /// What is drawn from these logits, to the places from `first` on.
    pub(super) fn sample(&self, ask: &Ask, first: usize) -> Launch {
        let workspace = &self.budget.workspace;
        let arguments = [
            self.at(workspace.logits).into(),
            self.shapes.vocab.outputs.into(),
            ask.draws.into(),
            // What attention left there is used up.
            self.at(workspace.records).into(),
            (self.at(workspace.drawn) + (first * DRAWN) as u64).into(),
        ];
        launch("sample", (ask.rows, 1), 0, arguments)
    }

    pub(super) fn copy_block(&self, from: u32, to: u32) -> Launch {
        let size = self.shapes.layer_block_bytes() / 16;
        let layer = (self.budget.kv_blocks * size) as u64;
        let arguments = [self.cache(LayerId(0)).into(), layer.into(), (size as u32).into(), from.into(), to.into()];
        launch("copy_block", (size.div_ceil(THREADS), self.shapes.layers), 0, arguments)
    }

    fn cache(&self, layer: LayerId) -> u64 {
        let bytes = self.budget.kv_blocks * self.shapes.layer_block_bytes();
        self.base + (self.budget.cache + layer.index() * bytes) as u64
    }
}

fn launch<const N: usize>(
    kernel: &'static str,
    grid: (usize, usize),
    shared: usize,
    arguments: [Argument; N],
) -> Launch {
    Launch { kernel, grid, shared, arguments: arguments.to_vec() }
}

/// A multiplication, by the kernel for few rows and that for many, as there are items for either.
fn linear(items: &Items, operands: &Operands) -> Vec<Launch> {
    let tiles = operands.matrix.tiles as usize;
    let many_at = items.at + (items.few * ITEM) as u64;
    [
        ("linear_few_bf16", items.at, items.few, tiles, 0),
        ("linear_many_bf16", many_at, items.many, tiles.div_ceil(MANY_TILES), shared_bytes(ExpertDtype::Bf16)),
    ]
    .into_iter()
    .filter(|(_, _, count, ..)| *count > 0)
    .map(|(kernel, at, count, grid_y, shared)| {
        let operands = Operands { items: at, ..*operands };
        launch(kernel, (count, grid_y), shared, operands.arguments())
    })
    .collect()
}

/// Threads of a block of a kernel.
pub(super) fn threads(kernel: &str) -> usize {
    if kernel == "sample" { DRAW_THREADS } else { THREADS }
}

/// Most shared memory that a launch of a kernel asks for, bytes.
pub(super) fn most_shared(kernel: &str, shapes: &Shapes) -> usize {
    match kernel {
        "linear_many_bf16" => shared_bytes(ExpertDtype::Bf16),
        "attention_1" => shapes.heads.shared_bytes(1),
        "attention_2" => shapes.heads.shared_bytes(2),
        "attention_4" => shapes.heads.shared_bytes(4),
        "attention_8" => shapes.heads.shared_bytes(8),
        "attention_many" => shapes.heads.shared_bytes(shapes.heads.many_rows()),
        _ => 0,
    }
}
