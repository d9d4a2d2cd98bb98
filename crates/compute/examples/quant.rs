//! Measures quantised experts of hidden size 1024 and intermediate size 3584 on two threads, beside what the machine can do.
//!
//! Prints one JSON object a line: `{"name", "measured", "floor", "unit"}`. With one row the weights come from memory, a different
//! expert each time, and the floor is the read bandwidth; with more it is the f32 fused multiply-adds of the processor. Floors are
//! taken between the measurements, and the best of each counts.

use std::hint::black_box;
use std::time::{Duration, Instant};

use sirocco_compute::{Pool, QuantExpert, QuantMatrix, QuantPacker, QuantWidth};

const HIDDEN: usize = 1024;
const INTER: usize = 3584;
const THREADS: usize = 2;
/// Memory that the experts of one width take together: more than caches hold.
const WORKING_SET: usize = 1 << 30;
const REPETITIONS: usize = 7;

fn main() {
    let pool = Pool::new(THREADS).expect("the system has two threads to give");
    let memory = vec![1_u64; WORKING_SET / 8];
    for (name, width) in [("int8", QuantWidth::Int8), ("int4", QuantWidth::Int4)] {
        let bytes = expert(width).bytes();
        let experts: Vec<QuantExpert> = (0..WORKING_SET / bytes).map(|_| expert(width)).collect();
        let x: Vec<f32> = (0..256 * HIDDEN).map(|i| (i as f32 * 0.37).cos()).collect();
        let (mut bandwidth, mut peak) = (0.0_f64, 0.0_f64);
        let mut times = [Duration::MAX; 3];
        for _ in 0..REPETITIONS {
            bandwidth = bandwidth.max(read_bandwidth(&memory));
            peak = peak.max(fma_peak());
            for (time, rows, count) in [(0, 1, experts.len()), (1, 16, 16), (2, 256, 2)].map(|(i, r, c)| (i, r, c)) {
                let start = Instant::now();
                for expert in &experts[..count] {
                    black_box(expert.forward(&x[..rows * HIDDEN], &pool));
                }
                times[time] = times[time].min(start.elapsed() / count as u32);
            }
        }
        println!(
            "{}",
            line(&format!("{name} expert, 1 row"), bytes as f64 / times[0].as_secs_f64() / 1e9, bandwidth, "GB/s")
        );
        for (time, rows) in [(times[1], 16), (times[2], 256)] {
            let flops = 2.0 * (3 * rows * HIDDEN * INTER) as f64 / time.as_secs_f64() / 1e9;
            println!("{}", line(&format!("{name} expert, {rows} rows"), flops, peak, "GFLOP/s"));
        }
    }
}

fn line(name: &str, measured: f64, floor: f64, unit: &str) -> String {
    format!(r#"{{"name":"{name}","measured":{measured:.2},"floor":{floor:.2},"unit":"{unit}"}}"#)
}

fn expert(width: QuantWidth) -> QuantExpert {
    let matrix = |outputs: usize, inputs: usize| -> QuantMatrix {
        let row: Vec<u8> = (0..inputs as u32)
            .flat_map(|i| (0x3c00 | (i * 7919 % 512) as u16 ^ (i % 2 << 15) as u16).to_le_bytes())
            .collect();
        let mut packer = QuantPacker::new(width, outputs, inputs);
        (0..outputs).for_each(|_| packer.push_rows(&row));
        packer.finish()
    };
    QuantExpert { gate: matrix(INTER, HIDDEN), up: matrix(INTER, HIDDEN), down: matrix(HIDDEN, INTER) }
}

/// GB/s of reading `memory` once.
fn read_bandwidth(memory: &[u64]) -> f64 {
    let start = Instant::now();
    on_all(|thread| {
        let part = &memory[memory.len() / THREADS * thread..][..memory.len() / THREADS];
        black_box(part.chunks_exact(64).fold([0_u64; 64], |mut sums, values| {
            sums.iter_mut().zip(values).for_each(|(sum, value)| *sum ^= value);
            sums
        }));
    });
    size_of_val(memory) as f64 / start.elapsed().as_secs_f64() / 1e9
}

/// GFLOP/s of f32 fused multiply-adds.
fn fma_peak() -> f64 {
    const STEPS: usize = 2_000_000;
    const SUMS: usize = 256;
    let start = Instant::now();
    on_all(|_| {
        #[cfg(target_arch = "x86_64")]
        {
            #[target_feature(enable = "avx512f")]
            fn avx512() -> [f32; SUMS] {
                fmas()
            }
            #[target_feature(enable = "avx2,fma")]
            fn avx2() -> [f32; SUMS] {
                fmas()
            }
            if is_x86_feature_detected!("avx512f") {
                // SAFETY: it was just found.
                black_box(unsafe { avx512() });
                return;
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                // SAFETY: they were just found.
                black_box(unsafe { avx2() });
                return;
            }
        }
        black_box(fmas());
    });
    #[inline(always)]
    fn fmas() -> [f32; SUMS] {
        let (mut sums, factor) = (black_box([1.0_f32; SUMS]), black_box(0.999_f32));
        for _ in 0..STEPS / 8 {
            for sum in &mut sums {
                *sum = sum.mul_add(factor, factor);
            }
        }
        sums
    }
    2.0 * (STEPS / 8 * SUMS * THREADS) as f64 / start.elapsed().as_secs_f64() / 1e9
}

fn on_all(task: impl Fn(usize) + Sync) {
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let task = &task;
            scope.spawn(move || task(thread));
        }
    });
}
