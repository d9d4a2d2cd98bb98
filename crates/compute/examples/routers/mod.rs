//! Attention and whole steps of a router at Mixtral 8x7B's sizes, over the card's copies and matrix multiplications.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use sirocco_compute::{
    BLOCK_TOKENS, CudaRouter, Draw, KernelSettings, KvBlocks, Queries, RouterBackend, RouterLimits, RouterMatrix,
    RouterVector,
};
use sirocco_types::{Dtype, ModelSpec};

use super::{Failure, ROUNDS, RUNS, print};

/// Tokens of a prompt's last part.
const PART: usize = 512;

/// Rows that are drawn from at once.
const DRAWN: usize = 64;

/// Steps of which the best counts.
const STEPS: usize = 20;

fn mixtral() -> ModelSpec {
    ModelSpec {
        model_type: "mixtral".into(),
        hidden_size: super::HIDDEN,
        intermediate_size: super::INTER,
        num_hidden_layers: 32,
        num_local_experts: super::EXPERTS,
        num_experts_per_tok: 2,
        num_attention_heads: 32,
        num_key_value_heads: 8,
        head_dim: 128,
        vocab_size: 32_000,
        max_position_embeddings: 32_768,
        sliding_window: None,
        rms_norm_eps: 1e-5,
        rope_theta: 1e6,
        tie_word_embeddings: false,
        bos_token_id: None,
        eos_token_ids: Vec::new(),
        dtype: Dtype::Bf16,
    }
}

/// Small weights of both signs.
fn open(spec: &ModelSpec) -> Result<CudaRouter, Failure> {
    let settings = KernelSettings { nvrtc: std::env::var_os("SIROCCO_NVRTC").map(PathBuf::from), ..Default::default() };
    let kv_blocks = KvBlocks::Exactly(spec.max_position_embeddings / BLOCK_TOKENS);
    let limits = RouterLimits { step_tokens: PART, step_sequences: 16, kv_blocks };
    let mut router = CudaRouter::open(0, &settings, spec, limits)?;
    let mut state = 7_u64;
    let value = |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 63 << 15 | 0x3c00 | state >> 57) as u16).to_le_bytes()
    };
    let weights: Vec<u8> = (0..spec.vocab_size * spec.hidden_size).flat_map(value).collect();
    for matrix in RouterMatrix::all(spec) {
        let (outputs, inputs) = matrix.shape(spec);
        router.load_matrix(matrix, &weights[..outputs * inputs * 2])?;
    }
    for vector in RouterVector::all(spec) {
        router.load_vector(vector, &vec![1.0; spec.hidden_size])?;
    }
    Ok(router)
}

/// Measures; `copy` in 10^9 bytes, `peak` in 10^12 operations a second.
pub(super) fn measure(copy: f64, peak: f64) -> Result<(), Failure> {
    let spec = mixtral();
    let mut router = open(&spec)?;
    let blocks: Vec<u32> = (0..(spec.max_position_embeddings / BLOCK_TOKENS) as u32).collect();
    let token_bytes = router.kv_token_bytes() as f64;
    for (name, tokens, sequences) in
        [("1 sequence of 2k", 2048, 1), ("16 sequences of 2k", 2048, 16), ("1 sequence of 32k", 32_768, 1)]
    {
        let last = queries(&blocks, tokens, sequences, 1);
        let seconds = best(ROUNDS, || Ok(router.attention_time(&last, RUNS)?))?;
        let bytes = (tokens * sequences) as f64 * token_bytes;
        print(&format!("gpu attention decode, {name}"), bytes / seconds / 1e9, copy, "GB/s");
    }
    for (name, tokens) in [("2k", 2048), ("32k", 32_768)] {
        let part = queries(&blocks, tokens, 1, PART);
        let seconds = best(ROUNDS, || Ok(router.attention_time(&part, RUNS)?))?;
        let seen: usize = (tokens - PART + 1..=tokens).sum();
        let operations = 4.0 * (seen * spec.num_attention_heads * spec.head_dim) as f64;
        print(&format!("gpu attention of a prompt's last 512, {name}"), operations / seconds / 1e12, peak, "TFLOP/s");
    }
    // With the experts' answers at once: every layer's copies, waits and launches, but nobody else's time.
    let read = (router.weight_bytes() - spec.vocab_size * spec.hidden_size * 2) as f64;
    for (name, sequences) in [("1 sequence of 2k", 1), ("16 sequences of 2k", 16)] {
        let last = queries(&blocks, 2048, sequences, 1);
        let combined = vec![0.0; sequences * spec.hidden_size];
        let rows: Vec<u32> = (0..sequences as u32).collect();
        let greedy = Draw::default();
        let draws = vec![&greedy; sequences];
        let mut normed = Vec::new();
        for (how, graphs) in [("decode step", true), ("decode step without graphs", false)] {
            router.use_graphs(graphs);
            let seconds = best(STEPS, || {
                let since = Instant::now();
                router.begin(0, &vec![1; sequences], &last)?;
                for layer in spec.layers() {
                    router.attend(0, layer, &mut normed)?;
                    router.add_experts(0, layer, &combined)?;
                }
                router.sample(0, &rows, &draws)?;
                Ok(since.elapsed())
            })?;
            let bytes = read + (2048 * sequences * spec.num_hidden_layers) as f64 * token_bytes;
            print(&format!("gpu router {how}, {name}"), bytes / seconds / 1e9, copy, "GB/s");
        }
    }
    draw(&mut router, &spec, &blocks, copy)
}

/// Measures drawing from a prompt's last logits.
fn draw(router: &mut CudaRouter, spec: &ModelSpec, blocks: &[u32], copy: f64) -> Result<(), Failure> {
    let rows: Vec<u32> = (0..DRAWN as u32).collect();
    router.begin(0, &rows, &queries(blocks, DRAWN, 1, DRAWN))?;
    let combined = vec![0.0; DRAWN * spec.hidden_size];
    let mut normed = Vec::new();
    for layer in spec.layers() {
        router.attend(0, layer, &mut normed)?;
        router.add_experts(0, layer, &combined)?;
    }
    let draws =
        (0..DRAWN).map(|row| Draw { temperature: 0.8, top_p: 0.9, uniform: (row as u64) << 58, ..Draw::default() });
    let draws: Vec<Draw> = draws.collect();
    let draws: Vec<&Draw> = draws.iter().collect();
    router.sample(0, &rows, &draws)?;
    let seconds = best(ROUNDS, || Ok(router.sample_time(&draws, RUNS)?))?;
    let bytes = (DRAWN * spec.vocab_size * 4) as f64;
    print("gpu sampling, 64 rows of 32000 at top_p 0.9", bytes / seconds / 1e9, copy, "GB/s");
    Ok(())
}

/// The last `len` of `tokens` of each of `sequences`, whose blocks follow each other.
fn queries(blocks: &[u32], tokens: usize, sequences: usize, len: usize) -> Vec<Queries<'_>> {
    let own = tokens / BLOCK_TOKENS;
    blocks.chunks_exact(own).take(sequences).map(|blocks| Queries { blocks, start: tokens - len, len }).collect()
}

/// The shortest of some times, seconds.
fn best(rounds: usize, mut run: impl FnMut() -> Result<Duration, Failure>) -> Result<f64, Failure> {
    let times = (0..rounds).map(|_| run()).collect::<Result<Vec<_>, _>>()?;
    Ok(times.into_iter().min().unwrap_or_default().as_secs_f64())
}
