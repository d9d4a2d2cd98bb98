//! Measures a model in one process, and served by a router and eight expert nodes on the same cores, against what the machine
//! can do.
//!
//! `model FOLDER` takes a checkpoint's folder, and prints one JSON object a line: `{"name", "measured", "floor", "unit"}`. All of
//! it comes from one run: floors, one process and cluster take turns, and the best of each counts. The cluster must say what
//! the one process says.

mod cluster;
#[path = "../../../crates/compute/examples/floors/mod.rs"]
mod floors;
mod memory;
mod one_process;
mod work;

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context as _, Result};
use cluster::Served;
use one_process::OneProcess;
use serde_json::json;
use sirocco_compute::Isa;
use sirocco_model::Checkpoint;
use work::{Floors, Run};

/// How often everything is measured.
const ROUNDS: usize = 4;

/// Sequences at once, and how many tokens each generates in a round.
const ONE: (usize, usize) = (1, 24);
const MANY: (usize, usize) = (16, 12);

/// Tokens of the prompts that are completed.
const PROMPT: usize = 8;

/// Tokens of the prompt that is computed at once.
const PREFILL: usize = 512;

fn main() -> Result<()> {
    let folder = PathBuf::from(std::env::args_os().nth(1).context("usage: model FOLDER")?);
    let threads = std::thread::available_parallelism()?.get();
    let checkpoint = Checkpoint::open(&folder)?;
    memory::cache_files(&folder)?;
    let prompts = |sequences: usize| -> Vec<Vec<u32>> {
        (0..sequences).map(|sequence| tokens(&checkpoint, sequence + 1, PROMPT)).collect()
    };
    let prompt = tokens(&checkpoint, 0, PREFILL);

    memory::forget_peak()?;
    let began = Instant::now();
    let mut one = OneProcess::load(&checkpoint, threads, PREFILL.max(MANY.0 * (PROMPT + MANY.1)))?;
    let loading = checkpoint.bytes() as f64 / began.elapsed().as_secs_f64() / f64::from(1 << 30);
    report("loading bf16", loading, 1.0, "GiB/s");
    let (expected_one, _) = one.complete(&prompts(ONE.0), ONE.1)?;
    let (expected_many, _) = one.complete(&prompts(MANY.0), MANY.1)?;
    one.prefill(&prompt)?;
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    report("peak memory bf16", mib(memory::peak()?), mib(checkpoint.bytes()), "MiB");

    let served = Served::start(&folder)?;
    let memory = floors::Memory::new();
    let mut floors = Floors::default();
    let (mut decode_one, mut decode_many, mut prefill) = (Vec::new(), Vec::new(), Vec::new());
    let (mut cluster_one, mut cluster_many) = (0.0_f64, 0.0_f64);
    for _ in 0..ROUNDS {
        floors.keep(memory.read(threads, Isa::best()), floors::multiply_adds(threads, Isa::best()));
        decode_one.push(one.complete(&prompts(ONE.0), ONE.1)?.1);
        cluster_one = cluster_one.max(served.complete(&prompts(ONE.0), &expected_one)?);
        decode_many.push(one.complete(&prompts(MANY.0), MANY.1)?.1);
        cluster_many = cluster_many.max(served.complete(&prompts(MANY.0), &expected_many)?);
        prefill.push(one.prefill(&prompt)?);
    }
    for (name, runs) in [
        ("decode of 1 sequence bf16", &decode_one),
        ("decode of 16 sequences bf16", &decode_many),
        ("prefill of 512 bf16", &prefill),
    ] {
        let best = Run::best(runs, &floors).context("there was a round")?;
        report(name, best.rate(), best.roofline(&floors), "tokens/s");
    }
    let fastest = |runs: &[Run]| runs.iter().map(Run::rate).fold(0.0, f64::max);
    report("cluster decode of 1 sequence", cluster_one, fastest(&decode_one), "tokens/s");
    report("cluster decode of 16 sequences", cluster_many, fastest(&decode_many), "tokens/s");
    Ok(())
}

/// A prompt that no other number has.
fn tokens(checkpoint: &Checkpoint, number: usize, len: usize) -> Vec<u32> {
    let vocab = checkpoint.spec().vocab_size;
    (0..len).map(|index| ((number * 7919 + index * 104_729 + 3) % vocab) as u32).collect()
}

fn report(name: &str, measured: f64, floor: f64, unit: &str) {
    println!("{}", json!({"name": name, "measured": measured, "floor": floor, "unit": unit}));
}
