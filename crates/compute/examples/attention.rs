//! Measures attention against what this machine can do at most, in one run. Prints a JSON line for each: what was measured, the
//! floor it stands against and the unit of both.
//!
//! Keys and values take more memory than any cache, and each step reads others, as the layers of a model do.

use std::hint::black_box;
use std::time::Instant;

use sirocco_compute::{AttentionShape, BLOCK_TOKENS, KvBlocks, Pool, Queries, attend};

const SHAPE: AttentionShape = AttentionShape { heads: 16, kv_heads: 4, head_dim: 64, window: None };
const THREADS: usize = 2;
/// f32 in the keys of the whole cache, and in its values: 640 MiB each.
const LEN: usize = 160 << 20;
const REPETITIONS: usize = 5;

/// A step: several sequences with as many tokens before, each going on by as many.
struct Step {
    name: &'static str,
    sequences: usize,
    start: usize,
    tokens: usize,
}

const STEPS: [Step; 6] = [
    Step { name: "attention decode 2k", sequences: 1, start: 2047, tokens: 1 },
    Step { name: "attention decode 8k", sequences: 1, start: 8191, tokens: 1 },
    Step { name: "attention decode 32k", sequences: 1, start: 32767, tokens: 1 },
    Step { name: "attention decode 16 x 2k", sequences: 16, start: 2047, tokens: 1 },
    Step { name: "attention prefill 512", sequences: 1, start: 0, tokens: 512 },
    Step { name: "attention prefill 512 at 4k", sequences: 1, start: 4096, tokens: 512 },
];

fn main() {
    let pool = Pool::new(THREADS).expect("two threads");
    let noise =
        |len: usize| -> Vec<f32> { (0..len as u32).map(|i| (i.wrapping_mul(0x9e37_79b9) >> 8) as f32 / 1e8).collect() };
    let (keys, values, q) = (noise(LEN), noise(LEN), noise(512 * SHAPE.heads * SHAPE.head_dim));
    let kv = KvBlocks { keys: &keys, values: &values };
    let blocks: Vec<u32> = (0..(LEN / SHAPE.block_len()) as u32).collect();

    let (mut bandwidth, mut peak) = (0.0_f64, 0.0_f64);
    let mut best = [f64::INFINITY; STEPS.len()];
    for _ in 0..REPETITIONS {
        bandwidth = bandwidth.max(2.0 * LEN as f64 * 4.0 / seconds(|| read(&keys, &values)));
        peak = peak.max(fma_peak());
        for (best, step) in best.iter_mut().zip(&STEPS) {
            let per_sequence = (step.start + step.tokens).div_ceil(BLOCK_TOKENS);
            let mut places = blocks.chunks_exact(per_sequence * step.sequences).cycle();
            let rounds = if step.tokens > 1 { 3 } else { blocks.len() / (per_sequence * step.sequences) };
            let took = seconds(|| {
                for _ in 0..rounds {
                    let place = places.next().expect("a cycle has no end");
                    let queries: Vec<Queries> = place
                        .chunks(per_sequence)
                        .map(|blocks| Queries { blocks, start: step.start, len: step.tokens })
                        .collect();
                    let q = &q[..step.sequences * step.tokens * SHAPE.heads * SHAPE.head_dim];
                    black_box(attend(&SHAPE, q, &queries, kv, &pool));
                }
            });
            *best = best.min(took / rounds as f64);
        }
    }
    print("read bandwidth, 2 threads", bandwidth, bandwidth, "B/s");
    print("fma peak, 2 threads", peak, peak, "FLOP/s");
    for (best, step) in best.iter().zip(&STEPS) {
        let width = SHAPE.heads * SHAPE.head_dim;
        let seen: usize = (step.start + 1..=step.start + step.tokens).sum();
        if step.tokens > 1 {
            print(step.name, (4 * seen * width) as f64 / best, peak, "FLOP/s");
        } else {
            let bytes = step.sequences * seen * 2 * SHAPE.kv_heads * SHAPE.head_dim * 4;
            print(step.name, bytes as f64 / best, bandwidth, "B/s");
        }
    }
}

fn print(name: &str, measured: f64, floor: f64, unit: &str) {
    println!(r#"{{"name":"{name}","measured":{measured:.0},"floor":{floor:.0},"unit":"{unit}"}}"#);
}

fn seconds(task: impl FnOnce()) -> f64 {
    let began = Instant::now();
    task();
    began.elapsed().as_secs_f64()
}

/// Reads both, each thread its half of each.
fn read(keys: &[f32], values: &[f32]) {
    std::thread::scope(|scope| {
        for (keys, values) in keys.chunks(LEN / THREADS).zip(values.chunks(LEN / THREADS)) {
            scope.spawn(move || black_box(largest(keys).max(largest(values))));
        }
    });
}

/// The largest bits, compiled for the widest registers.
fn largest(values: &[f32]) -> u32 {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2")]
        fn wide(values: &[f32]) -> u32 {
            values.iter().fold(0, |max, value| max.max(value.to_bits()))
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: AVX2 was just found.
            return unsafe { wide(values) };
        }
    }
    values.iter().fold(0, |max, value| max.max(value.to_bits()))
}

/// FLOP/s of fused multiply-adds on all threads.
fn fma_peak() -> f64 {
    const ROUNDS: usize = 4_000_000;
    let took = seconds(|| {
        std::thread::scope(|scope| {
            for _ in 0..THREADS {
                scope.spawn(|| black_box(multiply_adds(ROUNDS)));
            }
        });
    });
    (THREADS * ROUNDS * 192 * 2) as f64 / took
}

/// `rounds` times 192 independent multiply-adds.
fn multiply_adds(rounds: usize) -> [f32; 192] {
    #[inline(always)]
    fn chains(rounds: usize) -> [f32; 192] {
        let mut sums = [1.0_f32; 192];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = sum.mul_add(0.999, 0.001);
            }
        }
        sums
    }
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f")]
        fn widest(rounds: usize) -> [f32; 192] {
            chains(rounds)
        }
        #[target_feature(enable = "avx2,fma")]
        fn wide(rounds: usize) -> [f32; 192] {
            chains(rounds)
        }
        // SAFETY: each is called where its instruction set was just found.
        if is_x86_feature_detected!("avx512f") {
            return unsafe { widest(rounds) };
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            return unsafe { wide(rounds) };
        }
    }
    chains(rounds)
}
