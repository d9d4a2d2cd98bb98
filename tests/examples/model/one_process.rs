//! The whole model in this process: completions and prompts, timed, with what each step has to do.

use std::collections::HashSet;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use futures::executor::block_on;
use sirocco_compute::{BLOCK_TOKENS, Pool, RouterDevice, kv_block_bytes};
use sirocco_model::{Checkpoint, LocalExperts, Logits, Model, SequenceChunk, StepOutput};
use sirocco_types::{ExpertDtype, ModelSpec};

use crate::work::{Floors, Run, Work};

pub(crate) struct OneProcess {
    model: Model,
    experts: LocalExperts,
    /// Blocks of the KV cache, which sequences share among them.
    blocks: Vec<u32>,
    expert_bytes: usize,
}

impl OneProcess {
    /// Loads everything, its experts as `dtype`, with room for `tokens` tokens in the KV cache.
    pub(crate) fn load(checkpoint: &Checkpoint, dtype: ExpertDtype, threads: usize, tokens: usize) -> Result<Self> {
        let (spec, pool) = (checkpoint.spec(), Pool::new(threads)?);
        // The last block of each sequence may not be full.
        let blocks = tokens.div_ceil(BLOCK_TOKENS) + 16;
        let first = spec.experts().next().context("a model has experts")?;
        Ok(Self {
            expert_bytes: checkpoint.load_expert(first, dtype)?.bytes(),
            model: Model::load(checkpoint, RouterDevice::Cpu { pool: pool.clone(), kv_blocks: blocks })?,
            experts: LocalExperts::load(checkpoint, dtype, pool)?,
            blocks: (0..blocks as u32).collect(),
        })
    }

    /// Goes on after `prompts` with the most likely `tokens` tokens each, all sequences together. Returns the ids; adds to `run` all
    /// steps but the first one, which computes the prompts.
    pub(crate) fn complete(
        &mut self,
        prompts: &[Vec<u32>],
        tokens: usize,
        run: &mut Run,
        floors: Option<&Floors>,
    ) -> Result<Vec<Vec<u32>>> {
        let mut ids = vec![Vec::new(); prompts.len()];
        let mut first = Run::default();
        let mut starts = vec![0; prompts.len()];
        let mut inputs = prompts.to_vec();
        while ids[0].len() < tokens {
            let run = if ids[0].is_empty() { &mut first } else { &mut *run };
            let chosen = self.step(&starts, &inputs, run, floors)?;
            for (sequence, id) in chosen.into_iter().enumerate() {
                starts[sequence] += inputs[sequence].len();
                inputs[sequence] = vec![id];
                ids[sequence].push(id);
            }
        }
        Ok(ids)
    }

    /// Computes the next `inputs` of sequences of which `starts` tokens are known: the most likely token after each. Adds the step to
    /// `run`.
    pub(crate) fn step(
        &mut self,
        starts: &[usize],
        inputs: &[Vec<u32>],
        run: &mut Run,
        floors: Option<&Floors>,
    ) -> Result<Vec<u32>> {
        let read = floors.map_or(f64::NAN, Floors::read);
        let began = Instant::now();
        let output = self.forward(starts, inputs)?;
        let chosen = output.logits.iter().map(|logits| most_likely(logits)).collect();
        let seconds = began.elapsed().as_secs_f64();
        run.push(inputs.iter().map(Vec::len).sum(), seconds, self.work(&output, starts, inputs), read);
        Ok(chosen)
    }

    fn forward(&mut self, starts: &[usize], inputs: &[Vec<u32>]) -> Result<StepOutput> {
        let share = self.blocks.len() / inputs.len();
        let longest = starts.iter().zip(inputs).map(|(start, tokens)| start + tokens.len()).max().unwrap_or(0);
        ensure!(longest <= share * BLOCK_TOKENS, "{longest} tokens, the KV cache has room for {share} blocks");
        let chunks: Vec<SequenceChunk<'_>> = inputs
            .iter()
            .zip(starts)
            .zip(self.blocks.chunks(share))
            .map(|((tokens, &start), blocks)| SequenceChunk {
                blocks,
                start,
                tokens,
                logits: Logits::Last,
                until: None,
            })
            .collect();
        Ok(block_on(self.model.forward(&[&chunks], &self.experts))?)
    }

    /// What a step had to do.
    fn work(&self, output: &StepOutput, starts: &[usize], inputs: &[Vec<u32>]) -> Work {
        let spec = self.model.spec();
        let layers = spec.num_hidden_layers;
        let tokens: usize = inputs.iter().map(Vec::len).sum();
        let experts: usize =
            output.routing.iter().map(|layer| layer.experts.iter().collect::<HashSet<_>>().len()).sum();
        // Positions that are read once by each sequence, and those that each token looks at.
        let read: usize = starts.iter().zip(inputs).map(|(start, tokens)| start + tokens.len()).sum();
        let seen: usize = starts.iter().zip(inputs).flat_map(|(start, tokens)| start + 1..=start + tokens.len()).sum();

        let (layer, head) = (layer_weights(spec), spec.vocab_size * spec.hidden_size);
        let chosen = spec.num_experts_per_tok * 3 * spec.hidden_size * spec.intermediate_size;
        let kv = kv_block_bytes(spec) / BLOCK_TOKENS;
        let bytes = (layers * layer + head) * spec.dtype.size() + experts * self.expert_bytes + read * kv;
        let weights = tokens * layers * (layer + chosen) + output.logits.len() * head;
        let attention = 2 * layers * spec.num_attention_heads * spec.head_dim * seen;
        Work { bytes: bytes as f64, flops: 2.0 * (weights + attention) as f64 }
    }
}

/// Weights of a layer's matrices that are no expert's: queries, keys, values, output and gate.
fn layer_weights(spec: &ModelSpec) -> usize {
    let heads = 2 * spec.num_attention_heads + 2 * spec.num_key_value_heads;
    (heads * spec.head_dim + spec.num_local_experts) * spec.hidden_size
}

/// The first of the highest.
fn most_likely(logits: &[f32]) -> u32 {
    let best = logits.iter().enumerate().rev().max_by(|(_, a), (_, b)| a.total_cmp(b));
    best.map_or(0, |(id, _)| id as u32)
}
