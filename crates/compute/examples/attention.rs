//! Measures attention beside what the machine can do at best. A JSON line each: name, measured, floor, unit.
//!
//! Keys and values take more memory than any cache, and each step reads others, as the layers of a model do.

mod floors;

use std::hint::black_box;
use std::time::Instant;

use sirocco_compute::{AttentionShape, BLOCK_TOKENS, Isa, KvLayer, Pool, Queries, attend};

const SHAPE: AttentionShape = AttentionShape { heads: 16, kv_heads: 4, head_dim: 64, window: None };
const THREADS: usize = 2;
/// Tokens in the cache: 1.25 GiB of keys and values.
const TOKENS: usize = 640 << 10;
const REPETITIONS: usize = 5;

/// A step: several sequences with as many tokens before, each going on by as many.
struct Step {
    name: &'static str,
    sequences: usize,
    start: usize,
    tokens: usize,
}

impl Step {
    /// Positions that its tokens see.
    fn seen(&self) -> usize {
        (self.start + 1..=self.start + self.tokens).sum()
    }

    /// Bytes of keys and values that decoding reads.
    fn bytes(&self) -> f64 {
        (self.sequences * self.seen() * 2 * SHAPE.kv_heads * SHAPE.head_dim * size_of::<f32>()) as f64
    }
}

const STEPS: [Step; 6] = [
    Step { name: "attention decode, 1 sequence of 2k", sequences: 1, start: 2047, tokens: 1 },
    Step { name: "attention decode, 1 sequence of 8k", sequences: 1, start: 8191, tokens: 1 },
    Step { name: "attention decode, 1 sequence of 32k", sequences: 1, start: 32767, tokens: 1 },
    Step { name: "attention decode, 16 sequences of 2k", sequences: 16, start: 2047, tokens: 1 },
    Step { name: "attention prefill of 512", sequences: 1, start: 0, tokens: 512 },
    Step { name: "attention prefill of 512 after 4k", sequences: 1, start: 4096, tokens: 512 },
];

fn main() {
    let width = SHAPE.kv_heads * SHAPE.head_dim;
    let noise = |len: usize| -> Vec<f32> { (0..len).map(|i| (i * 7919 % 1009) as f32 / 5e3 - 0.1).collect() };
    let row = noise(width * 2);
    let blocks: Vec<u32> = (0..(TOKENS / BLOCK_TOKENS) as u32).collect();
    let mut layer = KvLayer::new(SHAPE, blocks.len());
    for t in 0..TOKENS {
        layer.store((t / BLOCK_TOKENS) as u32, t % BLOCK_TOKENS, &row[t % width..][..width], &row[t % 7..][..width]);
    }
    let q = noise(512 * SHAPE.heads * SHAPE.head_dim);

    let memory = floors::Memory::new();
    for isa in Isa::available().into_iter().skip(1).rev() {
        let pool = Pool::with_isa(THREADS, isa).expect("two threads");
        let mut fma = 0.0_f64;
        let mut best = [f64::INFINITY; STEPS.len()];
        // Of all repetitions: of decoding, and of reading as many bytes right before, for a machine's bandwidth may be another a second
        // later.
        let mut decoding = [(0.0, 0.0); STEPS.len()];
        for _ in 0..REPETITIONS {
            fma = fma.max(floors::multiply_adds(THREADS, isa));
            for ((best, decoding), step) in best.iter_mut().zip(&mut decoding).zip(&STEPS) {
                let read = memory.read(THREADS, isa);
                let seconds = seconds(step, &layer, &blocks, &q, &pool);
                *best = best.min(seconds);
                *decoding = (decoding.0 + seconds, decoding.1 + step.bytes() / read);
            }
        }
        // The best instruction set goes by no name.
        let suffix = if isa == Isa::best() { String::new() } else { format!(", {isa:?}") };
        for ((best, decoding), step) in best.iter().zip(decoding).zip(&STEPS) {
            let name = format!("{}{suffix}", step.name);
            if step.tokens > 1 {
                print(&name, (4 * step.seen() * SHAPE.heads * SHAPE.head_dim) as f64 / best, fma, "GFLOP/s");
            } else {
                let all = REPETITIONS as f64 * step.bytes();
                print(&name, all / decoding.0, all / decoding.1, "GB/s");
            }
        }
    }
}

fn print(name: &str, measured: f64, floor: f64, unit: &str) {
    println!(r#"{{"name":"{name}","measured":{:.2},"floor":{:.2},"unit":"{unit}"}}"#, measured / 1e9, floor / 1e9);
}

/// Seconds that a step takes, of as many as the cache has room for.
fn seconds(step: &Step, layer: &KvLayer, blocks: &[u32], q: &[f32], pool: &Pool) -> f64 {
    let per_sequence = (step.start + step.tokens).div_ceil(BLOCK_TOKENS);
    let places = blocks.chunks_exact(per_sequence * step.sequences);
    let rounds = if step.tokens > 1 { 4 } else { places.len() };
    let q = &q[..step.sequences * step.tokens * SHAPE.heads * SHAPE.head_dim];
    let mut out = vec![0.0; q.len()];
    let since = Instant::now();
    for place in places.take(rounds) {
        let queries = |blocks| Queries { blocks, start: step.start, len: step.tokens };
        let queries: Vec<Queries> = place.chunks(per_sequence).map(queries).collect();
        attend(layer, q, &queries, &mut out, pool);
    }
    black_box(out);
    since.elapsed().as_secs_f64() / rounds as f64
}
