//! Measures the bf16 kernels against what the machine can do, in one process, in several interleaved rounds: of few rows and of the
//! head all rounds, each right after reading memory, for a machine's bandwidth may be another a second later; of others the best.
//!
//! `cargo run --release -p sirocco-compute --example kernels [avx2|avx512] [rounds]` prints one JSON object a line:
//! `{"name", "measured", "floor", "unit"}`. Experts are as many as keep their weights from staying in the caches near a core.

mod floors;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use floors::{Memory, multiply_adds};
use sirocco_compute::{ExpertMatrix, ExpertPacker, ExpertWeights, Isa, PackedMatrix, Pool, matmul};
use sirocco_types::ExpertDtype;

const HIDDEN: usize = 1024;
const INTER: usize = 3584;
const EXPERTS: usize = 40;
const EXPERT_BYTES: f64 = (6 * HIDDEN * INTER) as f64;
const ROWS: [usize; 9] = [1, 2, 4, 8, 16, 32, 64, 256, 512];

/// Rows from which on multiplying takes longer than reading.
const MANY: usize = 16;

/// The best value of each measurement so far, or the sum of all.
#[derive(Default)]
struct Values(Vec<(String, f64)>);

impl Values {
    fn keep(&mut self, name: String, value: f64) {
        let best = self.value(name);
        *best = best.max(value);
    }

    fn add(&mut self, name: String, value: f64) {
        *self.value(name) += value;
    }

    fn value(&mut self, name: String) -> &mut f64 {
        let known = self.0.iter().position(|(known, _)| *known == name).unwrap_or_else(|| {
            self.0.push((name, 0.0));
            self.0.len() - 1
        });
        &mut self.0[known].1
    }

    fn get(&self, name: &str) -> f64 {
        self.0.iter().find(|(known, _)| known == name).expect("it was measured").1
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let isa = match arguments.first().map(String::as_str) {
        Some("avx2") => Isa::Avx2,
        Some("avx512") => Isa::Avx512,
        _ => Isa::best(),
    };
    let rounds: usize = arguments.get(1).map_or(7, |rounds| rounds.parse().expect("a number of rounds"));
    let memory = Memory::new();
    let experts: Vec<ExpertWeights> = (0..EXPERTS).map(|seed| expert(seed as u64)).collect();
    let head = matrix(32_000, HIDDEN);
    let mut values = Values::default();
    for _ in 0..rounds {
        for threads in [1, 2] {
            let pool = Pool::with_isa(threads, isa).expect("two threads can be started");
            values.keep(format!("fma {threads}"), multiply_adds(threads, isa) / 1e9);
            for rows in ROWS {
                if rows < MANY {
                    let read = memory.read(threads, isa);
                    values.keep(format!("read bandwidth {threads}"), read / 1e9);
                    values.add(format!("ffn read {rows} {threads}"), EXPERT_BYTES / read);
                    values.add(format!("ffn seconds {rows} {threads}"), ffn(&experts, rows, &pool));
                } else {
                    let operations = rows as f64 * EXPERT_BYTES; // a multiplication and an addition for each weight of two bytes
                    values.keep(format!("ffn flops {rows} {threads}"), operations / ffn(&experts, rows, &pool) / 1e9);
                }
            }
            let x = activations(1);
            let mut out = vec![0.0; head.outputs()];
            values.add(format!("head read {threads}"), head.bytes() as f64 / memory.read(threads, isa));
            let since = Instant::now();
            matmul(&x, &head, &mut out, &pool);
            values.add(format!("head seconds {threads}"), since.elapsed().as_secs_f64());
        }
        values.keep("pack".into(), pack());
    }
    for threads in [1, 2] {
        let (read, fma) = (values.get(&format!("read bandwidth {threads}")), values.get(&format!("fma {threads}")));
        let many = if threads == 1 { "1 thread".to_owned() } else { format!("{threads} threads") };
        print(&format!("read bandwidth, {many}"), read, read, "GB/s");
        print(&format!("fma peak, {many}"), fma, fma, "GFLOP/s");
        for rows in ROWS {
            let name = format!("expert ffn bf16, {rows} row{}, {many}", if rows == 1 { "" } else { "s" });
            if rows < MANY {
                let bandwidth =
                    |what| rounds as f64 * EXPERT_BYTES / values.get(&format!("ffn {what} {rows} {threads}")) / 1e9;
                print(&name, bandwidth("seconds"), bandwidth("read"), "GB/s");
            } else {
                print(&name, values.get(&format!("ffn flops {rows} {threads}")), fma, "GFLOP/s");
            }
        }
        let bandwidth = |what| (rounds * head.bytes()) as f64 / values.get(&format!("head {what} {threads}")) / 1e9;
        let name = format!("head of 32000 outputs bf16, 1 row, {many}");
        print(&name, bandwidth("seconds"), bandwidth("read"), "GB/s");
    }
    print("packing bf16, 2 threads", values.get("pack"), 1.0, "GiB/s");
}

fn print(name: &str, measured: f64, floor: f64, unit: &str) {
    println!(r#"{{"name":"{name}","measured":{measured:.2},"floor":{floor:.2},"unit":"{unit}"}}"#);
}

/// The expert whose turn it is.
static NEXT: AtomicUsize = AtomicUsize::new(0);

/// Seconds of one forward pass, each over the expert that was used longest ago; more passes when they are short.
fn ffn(experts: &[ExpertWeights], rows: usize, pool: &Pool) -> f64 {
    let x = activations(rows);
    let passes = (EXPERTS / rows).max(2);
    let first = NEXT.fetch_add(passes, Ordering::Relaxed) % EXPERTS;
    let since = Instant::now();
    for expert in experts.iter().cycle().skip(first).take(passes) {
        std::hint::black_box(expert.forward(&x, pool));
    }
    since.elapsed().as_secs_f64() / passes as f64
}

/// GiB of bf16 packed per second by two threads, an expert each.
fn pack() -> f64 {
    let since = Instant::now();
    std::thread::scope(|scope| {
        for seed in 0..2 {
            scope.spawn(move || std::hint::black_box(expert(seed)));
        }
    });
    (2 * 6 * HIDDEN * INTER) as f64 / f64::from(1 << 30) / since.elapsed().as_secs_f64()
}

fn activations(rows: usize) -> Vec<f32> {
    (0..rows * HIDDEN).map(|i| (i % 97) as f32 / 97.0 - 0.5).collect()
}

fn expert(seed: u64) -> ExpertWeights {
    let mut packer = ExpertPacker::new(ExpertDtype::Bf16, HIDDEN, INTER);
    for matrix in ExpertMatrix::ALL {
        let (outputs, inputs) = packer.shape(matrix);
        let rows = weights(ExpertPacker::ROWS * inputs, seed);
        for _ in 0..outputs / ExpertPacker::ROWS {
            packer.push_rows(matrix, &rows);
        }
    }
    packer.finish().expect("the CPU has room")
}

fn matrix(outputs: usize, inputs: usize) -> PackedMatrix {
    PackedMatrix::from_bf16(&weights(outputs * inputs, 3), outputs, inputs).expect("as many bytes as the shape takes")
}

/// Small bf16 numbers of both signs.
fn weights(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let value = move |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 63 << 15 | 0x3c00 | state >> 57) as u16).to_le_bytes()
    };
    (0..len).flat_map(value).collect()
}
