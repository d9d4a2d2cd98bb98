//! How often the launches of decode steps change while contexts grow: seldom, so that graphs of them are used again. And that their
//! bits are a prompt's, on the emulator.

use std::collections::HashSet;

use super::attention::rounded;
use super::budget::{Budget, Shapes};
use super::launches::Launches;
use super::step::Step;
use super::tests::{NOTHING, emulated, forward, sequence, spec};
use super::*;
use crate::BLOCK_TOKENS;
use crate::cuda::launch::Launch;
use crate::cuda::plan::FEW_ROWS;
use crate::router::KvBlocks;

/// Of Mixtral 8x7B's attention, with `window`.
fn mixtral(window: Option<usize>) -> ModelSpec {
    ModelSpec {
        hidden_size: 4096,
        num_hidden_layers: 3,
        num_attention_heads: 32,
        num_key_value_heads: 8,
        head_dim: 128,
        vocab_size: 32_000,
        max_position_embeddings: 32_768,
        sliding_window: window,
        ..spec()
    }
}

/// A router's parts, with no device behind it.
struct Parts {
    shapes: Shapes,
    budget: Budget,
    rotary: Rotary,
    staging: Vec<u8>,
}

impl Parts {
    fn new(spec: &ModelSpec, step_tokens: usize) -> Self {
        let shapes = Shapes::new(spec);
        let limits = RouterLimits { step_tokens, step_sequences: 64, kv_blocks: KvBlocks::Exactly(1 << 14) };
        let budget = Budget::new(&shapes, spec, limits, usize::MAX).unwrap();
        let rotary = Rotary::new(spec.head_dim, spec.rope_theta);
        Self { staging: vec![0; budget.workspace.step_bytes], shapes, budget, rotary }
    }

    /// A step of `len` tokens behind each of so many, its first launches, and those of each layer.
    fn lists(&mut self, starts: &[usize], len: usize) -> (Step, Vec<Vec<Launch>>) {
        let blocks = vec![0; (starts.iter().max().unwrap() + len).div_ceil(BLOCK_TOKENS)];
        let queries: Vec<Queries> = starts.iter().map(|&start| Queries { blocks: &blocks, start, len }).collect();
        let plan = (&self.shapes.heads, &self.rotary, self.budget.workspace.record_room);
        let (step, _) = Step::write(plan, &vec![0; starts.len() * len], &queries, &mut self.staging, 1 << 40);
        let launches = Launches { shapes: &self.shapes, budget: &self.budget, base: 1 << 36, lane: 0, epsilon: 1e-5 };
        let layers = (0..self.shapes.layers).map(|layer| launches.attend(&step, LayerId(layer as u32)));
        let lists = std::iter::once(launches.begin(&step)).chain(layers).collect();
        (step, lists)
    }
}

#[test]
fn launches_of_a_thousand_decode_steps_change_only_when_the_rounded_number_of_tasks_does() {
    // Chunks of 256 tokens that a sequence's last token sees.
    let seen = |position: usize, window: usize| position / 256 + 1 - (position + 1).saturating_sub(window) / 256;
    for (window, starts, most) in [
        (None, vec![0], 4),
        (None, vec![3, 100, 255, 256, 700, 1999, 4000, 9000], 4),
        (None, (0..64).map(|sequence| sequence * 250).collect(), 3),
        (Some(4096), vec![3, 100, 3900, 4000, 4090, 20_000], 6),
    ] {
        let mut parts = Parts::new(&mixtral(window), 64);
        let mut distinct = vec![HashSet::new(); 4];
        let mut numbers = HashSet::new();
        for step in 0..1000 {
            let starts: Vec<usize> = starts.iter().map(|start| start + step).collect();
            numbers.insert(rounded(starts.iter().map(|&start| seen(start, window.unwrap_or(usize::MAX))).sum()));
            let (step, lists) = parts.lists(&starts, 1);
            assert_eq!(step.rounds.len(), 1);
            distinct.iter_mut().zip(lists).for_each(|(distinct, list)| {
                distinct.insert(list);
            });
        }
        assert_eq!(distinct[0].len(), 1, "{window:?} {starts:?}: what comes before the layers never changes");
        for distinct in &distinct[1..] {
            assert_eq!(distinct.len(), numbers.len(), "{window:?} {starts:?}");
        }
        assert!(numbers.len() <= most, "{window:?} {starts:?}: {numbers:?}");
    }
}

#[test]
fn launches_of_several_rounds_change_seldom_too() {
    let mut parts = Parts::new(&mixtral(None), 64);
    let mut distinct = HashSet::new();
    for step in 0..1000 {
        let starts: Vec<usize> = (0..64).map(|sequence| 20_000 + sequence * 37 + step).collect();
        let (step, mut lists) = parts.lists(&starts, 1);
        assert!(step.rounds.len() > 1);
        distinct.insert(lists.swap_remove(1));
    }
    assert!(distinct.len() <= 20, "{}", distinct.len());
}

#[test]
fn a_gate_is_computed_by_items_of_few_rows_whatever_the_number_of_tokens() {
    let mut parts = Parts::new(&mixtral(None), 512);
    for len in [1, 32, 33, 100, 128, 129, 512] {
        let (_, lists) = parts.lists(&[0], len);
        // Of a layer the matrices for queries, keys and values, for the output, and the gate's.
        let linear: Vec<&Launch> = lists[1].iter().filter(|launch| launch.kernel.starts_with("linear")).collect();
        let (gate, others) = linear.split_last().unwrap();
        assert_eq!((gate.kernel, gate.grid), ("linear_few_bf16", (len.div_ceil(FEW_ROWS), 1)));
        let many = others.iter().filter(|launch| launch.kernel == "linear_many_bf16").count();
        assert_eq!(many, if len > FEW_ROWS { 2 } else { 0 }, "{len}");
    }
}

#[test]
fn steps_that_are_launched_as_graphs_have_the_bits_of_a_prompt() {
    let spec = spec();
    let mut router = emulated(&spec, |_| 1.0);
    // As contexts grow over the end of a chunk there are 5 to 10 tasks; of 9 the tenth does nothing.
    let sequences: Vec<_> = (0..5).map(|i| sequence(&spec, 264, i, 9 * i as u32)).collect();
    let starts = [254, 252, 252, 252, 250];
    for (sequence, start) in sequences.iter().zip(starts) {
        forward(&mut router, &spec, 0, &[(sequence, 0, start)], NOTHING);
    }
    let mut steps = Vec::new();
    let before = router.graph_launches();
    for step in 0..10 {
        let parts: Vec<_> = sequences.iter().zip(starts).map(|(sequence, start)| (sequence, start + step, 1)).collect();
        steps.push(forward(&mut router, &spec, 0, &parts, NOTHING));
    }
    // Tasks are 5 in steps 0 and 1, 6 in steps 2 and 3, then 9, which are 10, then 10. Of each number the first step's two layers
    // are not launched as graphs. Nor are the first step's launches before the layers, and behind them.
    assert!(router.graph_launches() - before >= 2 * (1 + 1 + 5) + 9 + 9, "{}", router.graph_launches() - before);
    for (index, (sequence, start)) in sequences.iter().zip(starts).enumerate() {
        let whole = forward(&mut router, &spec, 1, &[(sequence, 0, 264)], NOTHING);
        for (step, got) in steps.iter().enumerate() {
            assert!(got[index] == whole[start + step], "sequence {index}, step {step}");
        }
    }
}
