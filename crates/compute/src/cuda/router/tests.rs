//! A whole router on the emulator, kernels and launches alike, against the CPU's, and against itself in other batches.

use half::bf16;
use sirocco_types::{Dtype, LayerId, ModelSpec};

use super::budget::{Budget, Shapes};
use super::machine::Machine;
use super::*;
use crate::cuda::emulator::{BASE, Emulator};
use crate::cuda::graphs::{Graphs, Turn};
use crate::cuda::launch::Launch;
use crate::router::KvBlocks;
use crate::{BLOCK_TOKENS, CpuRouter, CpuWeights, Draw, PackedMatrix, Pool, TokenSet, sample};

/// Blocks of the caches.
const BLOCKS: usize = 48;

/// A small model whose widths fill no block and no tile, with three query heads to a KV head.
pub(in crate::cuda) fn spec() -> ModelSpec {
    ModelSpec {
        model_type: "mixtral".into(),
        hidden_size: 72,
        intermediate_size: 64,
        num_hidden_layers: 2,
        num_local_experts: 8,
        num_experts_per_tok: 2,
        num_attention_heads: 6,
        num_key_value_heads: 2,
        head_dim: 12,
        vocab_size: 200,
        max_position_embeddings: 1024,
        sliding_window: None,
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.0,
        tie_word_embeddings: false,
        bos_token_id: None,
        eos_token_ids: Vec::new(),
        dtype: Dtype::Bf16,
    }
}

/// The emulator as a router's machine.
#[derive(Debug)]
struct Emulated {
    emulator: Emulator,
    /// The graph of launches is what they are.
    graphs: Graphs<Vec<Launch>>,
    staging: [Vec<u8>; LANES],
    results: Vec<u8>,
}

impl Machine for Emulated {
    fn base(&self) -> u64 {
        BASE
    }

    fn staging(&mut self, lane: usize) -> Result<&mut [u8], DeviceError> {
        Ok(&mut self.staging[lane])
    }

    fn copy_in(&mut self, lane: usize, to: usize, bytes: usize) -> Result<(), DeviceError> {
        self.emulator.write(to, &self.staging[lane][..bytes]);
        Ok(())
    }

    fn launch(&mut self, _: usize, launch: &Launch) -> Result<(), DeviceError> {
        self.emulator.launch(launch.kernel, launch.grid, launch.shared, &launch.arguments);
        Ok(())
    }

    fn launch_all(&mut self, lane: usize, launches: &[Launch]) -> Result<(), DeviceError> {
        let launches = match self.graphs.turn(launches) {
            Turn::OneByOne => launches.to_vec(),
            Turn::Record => self.graphs.keep(launches, launches.to_vec()).clone(),
            Turn::Launch(graph) => graph.clone(),
        };
        launches.iter().try_for_each(|launch| self.launch(lane, launch))
    }

    fn use_graphs(&mut self, on: bool) {
        self.graphs.set(on);
    }

    fn graph_launches(&self) -> u64 {
        self.graphs.launched()
    }

    fn copy_out(&mut self, _: usize, from: usize, bytes: usize) -> Result<&[u8], DeviceError> {
        self.results = self.emulator.read(from, bytes);
        Ok(&self.results)
    }

    fn wait(&mut self, _: usize) -> Result<(), DeviceError> {
        Ok(())
    }
}

/// Numbers of -1 to 1 that follow from `seed`.
fn numbers(seed: usize) -> impl Iterator<Item = f32> {
    let mut state = seed as u64 + 1;
    std::iter::repeat_with(move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    })
}

/// The values of a model's matrices, `[outputs, inputs]`, times `scale` of each.
fn matrices(spec: &ModelSpec, scale: impl Fn(RouterMatrix) -> f32) -> Vec<Vec<bf16>> {
    let values = |(index, matrix): (usize, RouterMatrix)| {
        let (outputs, inputs) = matrix.shape(spec);
        let scale = scale(matrix) * 2.0 / (inputs as f32).sqrt();
        numbers(index).take(outputs * inputs).map(|value| bf16::from_f32(value * scale)).collect()
    };
    RouterMatrix::all(spec).enumerate().map(values).collect()
}

fn vectors(spec: &ModelSpec) -> Vec<Vec<f32>> {
    let values = |(index, _)| numbers(1000 + index).take(spec.hidden_size).map(|value| 1.0 + value / 4.0).collect();
    RouterVector::all(spec).enumerate().map(values).collect()
}

/// A router on the emulator, whose memory is NaN where nothing was written and nothing is padding.
pub(super) fn emulated(spec: &ModelSpec, scale: impl Fn(RouterMatrix) -> f32) -> CudaRouter {
    let shapes = Shapes::new(spec);
    let limits = RouterLimits { step_tokens: 400, step_sequences: 8, kv_blocks: KvBlocks::Exactly(BLOCKS) };
    let mut budget = Budget::new(&shapes, spec, limits, usize::MAX).unwrap();
    // So little room that rows are drawn from in several parts, and so few records that a prompt's attention is computed in several
    // rounds.
    budget.workspace.ask_bytes -= draws::DRAWS_BYTES - draws::most_of_a_row(spec.vocab_size);
    budget.workspace.record_room = shapes.heads.tile_record_bytes(1024) / shapes.heads.record_bytes();
    let mut emulator = Emulator::new(budget.bytes);
    if spec.head_dim.is_multiple_of(4) {
        emulator.write(budget.cache, &vec![0xff; BLOCKS * shapes.block_bytes()]);
    }
    let workspace = budget.workspace;
    for (part, width) in [
        (workspace.hidden, spec.hidden_size),
        (workspace.qkv, shapes.heads.width),
        (workspace.addend, spec.hidden_size),
        (workspace.out, spec.hidden_size),
        (workspace.logits, 10),
        (workspace.records, 1000),
    ] {
        budget.lanes.iter().for_each(|lane| emulator.write(lane + part, &vec![0xff; 400 * width * 4]));
    }
    let staging = std::array::from_fn(|_| vec![0; workspace.in_bytes]);
    let graphs = Graphs::of(&KernelSettings::default());
    let machine = Emulated { emulator, graphs, staging, results: Vec::new() };
    let mut router = CudaRouter::on(Box::new(machine), spec, shapes, budget, "emulated".into());
    for (matrix, values) in RouterMatrix::all(spec).zip(matrices(spec, scale)) {
        router.load_matrix(matrix, &values.into_iter().flat_map(bf16::to_le_bytes).collect::<Vec<u8>>()).unwrap();
    }
    for (vector, values) in RouterVector::all(spec).zip(vectors(spec)) {
        router.load_vector(vector, &values).unwrap();
    }
    router
}

/// The same router on the CPU.
fn on_cpu(spec: &ModelSpec, scale: impl Fn(RouterMatrix) -> f32) -> CpuRouter {
    let packed = |(matrix, values): (RouterMatrix, Vec<bf16>)| {
        let (outputs, inputs) = matrix.shape(spec);
        let bytes: Vec<u8> = values.into_iter().flat_map(bf16::to_le_bytes).collect();
        PackedMatrix::from_bf16(&bytes, outputs, inputs).unwrap()
    };
    let matrices = RouterMatrix::all(spec).zip(matrices(spec, scale)).map(packed).collect();
    CpuRouter::new(spec, CpuWeights { matrices, vectors: vectors(spec) }, BLOCKS, Pool::new(1).unwrap())
}

/// A sequence, and where it is kept.
pub(super) struct Sequence {
    tokens: Vec<u32>,
    blocks: Vec<u32>,
}

/// A sequence of `len` tokens that follows from `seed`, in blocks that nobody else has, not in order.
pub(super) fn sequence(spec: &ModelSpec, len: usize, seed: usize, first_block: u32) -> Sequence {
    let tokens = numbers(seed).take(len).map(|value| (value.abs() * (spec.vocab_size - 1) as f32) as u32);
    let blocks = (first_block..first_block + len.div_ceil(BLOCK_TOKENS) as u32).rev();
    Sequence { tokens: tokens.collect(), blocks: blocks.collect() }
}

/// What a batch came to, by token.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Outcome {
    /// `[layers, hidden]`
    normed: Vec<Vec<f32>>,
    /// `[layers, top_k]`
    experts: Vec<Vec<u32>>,
    weights: Vec<Vec<f32>>,
    /// `[vocab]`
    logits: Vec<Vec<f32>>,
}

/// Takes parts of sequences, (sequence, start, length), through all layers, with experts that are a formula; `spoil` may change what
/// they made. What each part's tokens came to, and its overflow.
pub(super) fn forward(
    router: &mut dyn RouterBackend,
    spec: &ModelSpec,
    lane: usize,
    parts: &[(&Sequence, usize, usize)],
    spoil: &dyn Fn(usize, &mut [f32]),
) -> Vec<(Outcome, Option<LayerId>)> {
    let tokens: Vec<u32> =
        parts.iter().flat_map(|(sequence, start, len)| &sequence.tokens[*start..start + len]).copied().collect();
    let queries: Vec<Queries> =
        parts.iter().map(|&(sequence, start, len)| Queries { blocks: &sequence.blocks, start, len }).collect();
    router.begin(lane, &tokens, &queries).unwrap();
    let mut all = vec![Outcome::default(); tokens.len()];
    let mut normed = Vec::new();
    for layer in spec.layers() {
        let routing = router.attend(lane, layer, &mut normed).unwrap();
        let mut combined = Vec::new();
        for (token, (normed, outcome)) in normed.chunks_exact(spec.hidden_size).zip(&mut all).enumerate() {
            let (experts, weights) = routing.of(token);
            let factor: f32 = experts.iter().zip(weights).map(|(e, w)| w * (0.1 * (e.0 + 1) as f32)).sum();
            combined.extend((1..=normed.len()).map(|i| factor * normed[i % normed.len()]));
            outcome.normed.push(normed.to_vec());
            outcome.experts.push(experts.iter().map(|e| e.0).collect());
            outcome.weights.push(weights.to_vec());
        }
        spoil(layer.index(), &mut combined);
        router.add_experts(lane, layer, &combined).unwrap();
    }
    let rows: Vec<u32> = (0..tokens.len() as u32).collect();
    let logits = router.logits(lane, &rows).unwrap();
    let few: Vec<u32> = rows.iter().copied().step_by(7).collect();
    let draws: Vec<Draw> = few.iter().map(|row| draw(spec.vocab_size, *row)).collect();
    let drawn = router.sample(lane, &few, &draws.iter().collect::<Vec<_>>()).unwrap();
    let logits: Vec<&[f32]> = logits.chunks_exact(spec.vocab_size).collect();
    for ((row, draw), drawn) in few.iter().zip(&draws).zip(drawn) {
        assert_eq!(drawn, sample(&mut logits[*row as usize].to_vec(), draw));
    }
    all.iter_mut().zip(logits).for_each(|(outcome, logits)| outcome.logits.push(logits.to_vec()));
    let overflows = router.overflows(lane).unwrap();
    let mut all = all.into_iter();
    let mut outcomes = Vec::new();
    for (&(_, _, len), overflow) in parts.iter().zip(overflows) {
        for outcome in all.by_ref().take(len) {
            outcomes.push((outcome, overflow));
        }
    }
    outcomes
}

/// Draws of several kinds.
fn draw(vocab: usize, row: u32) -> Draw {
    let random = Draw { temperature: 0.5, top_k: 50, uniform: u64::from(row) << 56, ..Draw::default() };
    let mut odd = TokenSet::none_of(vocab);
    (1..vocab as u32).step_by(2).for_each(|id| odd.insert(id));
    match row % 4 {
        0 => Draw::default(),
        1 => Draw { top_p: 0.7, report: Some(5), ..random },
        2 => {
            Draw { repetition_penalty: 1.5, seen: Some(odd), generated: vec![(3, 2)], presence_penalty: 1.0, ..random }
        }
        _ => Draw { min_p: 0.2, allowed: Some(odd), bias: vec![(4, 90.0), (5, 1.0)], report: Some(20), ..random },
    }
}

pub(super) const NOTHING: &dyn Fn(usize, &mut [f32]) = &|_, _| ();

/// Whether `got` is `want` but for `tolerance` of its largest.
fn near(got: &[Vec<f32>], want: &[Vec<f32>], tolerance: f32) -> bool {
    got.iter().zip(want).all(|(got, want)| {
        let largest = want.iter().fold(0.0_f32, |most, value| most.max(value.abs()));
        got.iter().zip(want).all(|(got, want)| (got - want).abs() <= largest * tolerance)
    })
}

/// Shapes that take different ways through the kernels: a window, few query heads and many to a KV head, heads of more than 128
/// elements, heads that fill no four, tied embeddings.
fn specs() -> Vec<ModelSpec> {
    let spec = spec();
    vec![
        spec.clone(),
        ModelSpec { sliding_window: Some(100), tie_word_embeddings: true, ..spec.clone() },
        ModelSpec { num_attention_heads: 10, num_key_value_heads: 1, head_dim: 6, ..spec.clone() },
        ModelSpec { num_attention_heads: 4, num_key_value_heads: 4, ..spec.clone() },
        ModelSpec { num_attention_heads: 2, num_key_value_heads: 1, head_dim: 132, num_hidden_layers: 1, ..spec },
    ]
}

#[test]
fn a_router_computes_what_the_cpus_does() {
    for spec in specs() {
        let (mut gpu, mut cpu) = (emulated(&spec, |_| 1.0), on_cpu(&spec, |_| 1.0));
        let (a, b) = (sequence(&spec, 300, 1, 0), sequence(&spec, 40, 2, 20));
        for parts in [vec![(&b, 0, 1), (&a, 0, 270)], vec![(&a, 270, 1), (&b, 1, 38)], vec![(&a, 271, 29), (&b, 39, 1)]]
        {
            let got = forward(&mut gpu, &spec, 1, &parts, NOTHING);
            let want = forward(&mut cpu, &spec, 1, &parts, NOTHING);
            for (token, ((got, _), (want, _))) in got.iter().zip(&want).enumerate() {
                let what = format!("{spec:?}, token {token}");
                assert_eq!(got.experts, want.experts, "{what}");
                assert!(near(&got.weights, &want.weights, 1e-4), "{what}: {got:?}, not {want:?}");
                assert!(near(&got.normed, &want.normed, 1e-4), "{what}: {got:?}, not {want:?}");
                assert!(near(&got.logits, &want.logits, 1e-4), "{what}: {got:?}, not {want:?}");
            }
        }
    }
}

#[test]
fn batch_mates_and_the_cut_of_a_prompt_change_no_bit() {
    for spec in specs() {
        let mut router = emulated(&spec, |_| 1.0);
        let (a, b, c) = (sequence(&spec, 300, 1, 0), sequence(&spec, 70, 2, 20), sequence(&spec, 280, 3, 30));
        let whole: Vec<Outcome> =
            forward(&mut router, &spec, 0, &[(&a, 0, 300)], NOTHING).into_iter().map(|(outcome, _)| outcome).collect();
        let others = [(&c, 280), (&b, 70)];
        let mut starts = [0; 2];
        let mut start = 0;
        for (step, len) in [1, 7, 100, 1, 60, 1, 1, 86, 3, 1, 1, 38].into_iter().enumerate() {
            let (other, all) = others[step % 2];
            let more = (step * 37 % 90 + 1).min(all - starts[step % 2]);
            let mut parts = vec![(&a, start, len)];
            let mut skip = 0;
            if more > 0 {
                // Before it and behind it in turn.
                parts.insert(step % 2, (other, starts[step % 2], more));
                skip = if step % 2 == 0 { more } else { 0 };
                starts[step % 2] += more;
            }
            let got = forward(&mut router, &spec, step % 2, &parts, NOTHING);
            for (token, (got, _)) in got[skip..skip + len].iter().enumerate() {
                assert!(*got == whole[start + token], "{spec:?}: token {} of {len} from {start} on", start + token);
            }
            start += len;
        }
        assert_eq!(start, 300);
    }
}

#[test]
fn a_copied_block_is_as_good_as_the_first_one() {
    let spec = spec();
    let mut router = emulated(&spec, |_| 1.0);
    let mut a = sequence(&spec, 60, 1, 0);
    forward(&mut router, &spec, 0, &[(&a, 0, 59)], NOTHING);
    let last = forward(&mut router, &spec, 0, &[(&a, 59, 1)], NOTHING);
    router.copy_block(a.blocks[0], 40).unwrap();
    a.blocks[0] = 40;
    assert!(forward(&mut router, &spec, 1, &[(&a, 59, 1)], NOTHING) == last);
}

#[test]
fn what_is_not_finite_is_named_by_its_layer_and_changes_no_bit_of_its_batch_mates() {
    let spec = spec();
    let mut router = emulated(&spec, |_| 1.0);
    let (a, b, c) = (sequence(&spec, 9, 1, 0), sequence(&spec, 20, 2, 10), sequence(&spec, 3, 3, 20));
    let parts = [(&a, 0, 9), (&b, 0, 20), (&c, 0, 3)];
    let clean = forward(&mut router, &spec, 0, &parts, NOTHING);
    assert!(clean.iter().all(|(_, overflow)| overflow.is_none()));
    for (value, layer) in [(f32::NAN, 0), (f32::INFINITY, 1), (f32::NEG_INFINITY, 0)] {
        let spoil = |at: usize, combined: &mut [f32]| {
            if at >= layer {
                combined[15 * spec.hidden_size + 71] = value;
            }
        };
        let got = forward(&mut router, &spec, 0, &parts, &spoil);
        for (token, (got, clean)) in got.iter().zip(&clean).enumerate() {
            if (9..29).contains(&token) {
                assert_eq!(got.1, Some(LayerId(layer as u32)));
                assert!(got.0.logits.iter().flatten().all(|logit| logit.is_finite()));
            } else {
                assert!(got == clean, "token {token}");
            }
        }
    }
}

#[test]
fn equal_experts_are_chosen_from_the_lowest_on_and_what_is_no_number_is_drawn_by_nobody() {
    let spec = spec();
    let same = |matrix| if matches!(matrix, RouterMatrix::Gate(_)) { 0.0 } else { 1.0 };
    let a = sequence(&spec, 5, 1, 0);
    for (outcome, _) in forward(&mut emulated(&spec, same), &spec, 0, &[(&a, 0, 5)], NOTHING) {
        assert!(outcome.experts.iter().all(|experts| *experts == [0, 1]));
        assert!(outcome.weights.iter().all(|weights| *weights == [0.5, 0.5]));
    }
    let huge = |matrix| if matrix == RouterMatrix::LmHead { 3e38 } else { 1.0 };
    for (outcome, _) in forward(&mut emulated(&spec, huge), &spec, 0, &[(&a, 0, 5)], NOTHING) {
        assert!(outcome.logits.iter().flatten().any(|logit| !logit.is_finite()));
    }
}
