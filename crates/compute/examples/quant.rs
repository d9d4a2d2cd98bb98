//! Measures experts with quantised weights against what the machine can do, in one process, in several interleaved rounds: of one row
//! all rounds, of others the best.
//!
//! `cargo run --release -p sirocco-compute --example quant [avx2|avx512]` prints one JSON object a line:
//! `{"name", "measured", "floor", "unit"}`. Two threads; hidden size 1024, intermediate size 3584. One row reads a different
//! expert from memory each time, and its floor is the read bandwidth; that of more rows is f32 fused multiply-adds.

mod floors;

use std::hint::black_box;
use std::time::Instant;

use floors::{Memory, multiply_adds};
use sirocco_compute::{ExpertMatrix, ExpertPacker, ExpertWeights, Isa, Pool};
use sirocco_types::ExpertDtype;

const HIDDEN: usize = 1024;
const INTER: usize = 3584;
const THREADS: usize = 2;
const ROUNDS: usize = 7;
/// Memory that the experts of one dtype take together: more than the caches near a core hold.
const WORKING_SET: usize = 768 << 20;

fn main() {
    let isa = match std::env::args().nth(1).as_deref() {
        Some("avx2") => Isa::Avx2,
        Some("avx512") => Isa::Avx512,
        _ => Isa::best(),
    };
    let pool = Pool::with_isa(THREADS, isa).expect("two threads can be started");
    let memory = Memory::new();
    for dtype in [ExpertDtype::Int8, ExpertDtype::Int4] {
        let since = Instant::now();
        let first = expert(dtype);
        let packing = (6 * HIDDEN * INTER) as f64 / f64::from(1 << 30) / since.elapsed().as_secs_f64();
        let bytes = first.bytes();
        let mut experts = vec![first];
        experts.resize_with(WORKING_SET / bytes, || expert(dtype));
        let (mut peak, mut speeds) = (0.0_f64, [0.0_f64; 3]);
        // Of all rounds: of one row, and of reading as many bytes right before, for a machine's bandwidth may be another a second later.
        let (mut one_row, mut reading) = (0.0, 0.0);
        for _ in 0..ROUNDS {
            reading += bytes as f64 / memory.read(THREADS, isa);
            one_row += seconds(&experts, 1, &pool);
            peak = peak.max(multiply_adds(THREADS, isa));
            for (speed, rows) in speeds.iter_mut().zip(ROWS) {
                *speed = speed.max(1.0 / seconds(&experts, rows, &pool));
            }
        }
        let all = (ROUNDS * bytes) as f64;
        print(&format!("expert ffn {dtype}, 1 row"), all / one_row, all / reading, "GB/s");
        for (speed, rows) in speeds.into_iter().zip(ROWS) {
            let operations = (6 * rows * HIDDEN * INTER) as f64;
            print(&format!("expert ffn {dtype}, {rows} rows"), operations * speed, peak, "GFLOP/s");
        }
        print(&format!("packing {dtype}, 1 thread"), packing * 1e9, 1e9, "GiB/s");
    }
}

const ROWS: [usize; 3] = [16, 64, 256];

fn print(name: &str, measured: f64, floor: f64, unit: &str) {
    let (measured, floor) = (measured / 1e9, floor / 1e9);
    println!(r#"{{"name":"{name}","measured":{measured:.2},"floor":{floor:.2},"unit":"{unit}"}}"#);
}

/// Seconds of one forward pass, each over another expert.
fn seconds(experts: &[ExpertWeights], rows: usize, pool: &Pool) -> f64 {
    let x: Vec<f32> = (0..rows * HIDDEN).map(|i| (i % 97) as f32 / 97.0 - 0.5).collect();
    let experts = &experts[..(experts.len() / rows).max(2)];
    let since = Instant::now();
    for expert in experts {
        black_box(expert.forward(&x, pool));
    }
    since.elapsed().as_secs_f64() / experts.len() as f64
}

fn expert(dtype: ExpertDtype) -> ExpertWeights {
    let mut packer = ExpertPacker::new(dtype, HIDDEN, INTER);
    for matrix in ExpertMatrix::ALL {
        let (outputs, inputs) = packer.shape(matrix);
        // bf16 between 1/64 and 1/32, of both signs.
        let value = |i: u32| (0x3c80 | (i * 7919 % 128) as u16 | (i as u16 & 1) << 15).to_le_bytes();
        let rows: Vec<u8> = (0..(ExpertPacker::ROWS * inputs) as u32).flat_map(value).collect();
        for _ in 0..outputs / ExpertPacker::ROWS {
            packer.push_rows(matrix, &rows);
        }
    }
    packer.finish().expect("the CPU has room")
}
