//! Measures a model in one process, and served by a router and eight expert nodes on the same cores, against what the machine
//! can do.
//!
//! `model FOLDER [bf16|int8|int4]` takes a checkpoint's folder and what its experts are kept as, and prints one JSON object a
//! line: `{"name", "measured", "floor", "unit"}`. All of it comes from one run: floors and one process take turns step by
//! step, one process and cluster round by round. The cluster, which is measured with bf16, must say what the one process says.

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
use sirocco_model::Checkpoint;
use sirocco_types::ExpertDtype;
use work::{Floors, Rate, Run};

/// How often everything is measured.
const ROUNDS: usize = 6;

/// How often floors are measured in a round: they are short.
const FLOORS: usize = 4;

/// Sequences at once, and how many tokens each generates in a round.
const ONE: (usize, usize) = (1, 24);
const MANY: (usize, usize) = (16, 12);

/// Tokens of the prompts that are completed.
const PROMPT: usize = 8;

/// Tokens of the prompt that is computed at once.
const PREFILL: usize = 512;

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let folder = PathBuf::from(args.next().context("usage: model FOLDER [bf16|int8|int4]")?);
    let dtype: ExpertDtype = args.next().as_deref().unwrap_or("bf16").parse()?;
    let threads = std::thread::available_parallelism()?.get();
    let checkpoint = Checkpoint::open(&folder)?;
    let prompts = |sequences: usize| -> Vec<Vec<u32>> {
        (0..sequences).map(|sequence| tokens(&checkpoint, sequence + 1, PROMPT)).collect()
    };
    let prompt = [tokens(&checkpoint, 0, PREFILL)];

    memory::cache_files(&folder)?;
    let plain = memory::plain_read(&folder, threads)?;
    // The first use of memory on a virtual machine takes as long as its host likes, and again seconds after it was given back. In
    // huge pages, as weights are kept, it is at hand for what loads next; the KV cache and such come with the tenth more.
    let began = Instant::now();
    let bytes = checkpoint.bytes() / 10 * 11;
    drop(floors::Memory::of(bytes as usize));
    let first_use = gib_per_second(bytes, began);
    memory::forget_peak()?;
    let began = Instant::now();
    let mut one = OneProcess::load(&checkpoint, dtype, threads, PREFILL.max(MANY.0 * (PROMPT + MANY.1)))?;
    let loading = gib_per_second(checkpoint.bytes(), began);
    report(&format!("loading {dtype}"), loading, 1.0, "GiB/s");
    report(&format!("loading {dtype}, over a plain read of the files"), loading, plain, "GiB/s");
    report(&format!("loading {dtype}, over the first use of memory, 1 thread"), loading, first_use, "GiB/s");
    let mut warming = Run::default();
    let expected_one = one.complete(&prompts(ONE.0), ONE.1, &mut warming, None)?;
    let expected_many = one.complete(&prompts(MANY.0), MANY.1, &mut warming, None)?;
    one.step(&[0], &prompt, &mut warming, None)?;
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    report(&format!("peak memory {dtype}"), mib(memory::peak()?), mib(checkpoint.bytes()), "MiB");

    let served = if dtype == ExpertDtype::Bf16 { Some(Served::start(&folder)?) } else { None };
    let mut floors = Floors::new(threads);
    let (mut decode_one, mut decode_many, mut prefill) = (Run::default(), Run::default(), Run::default());
    let (mut cluster_one, mut cluster_many) = (Rate::default(), Rate::default());
    for _ in 0..ROUNDS {
        for _ in 0..FLOORS {
            floors.multiply();
        }
        for (sequences, expected, run, cluster) in [
            (ONE, &expected_one, &mut decode_one, &mut cluster_one),
            (MANY, &expected_many, &mut decode_many, &mut cluster_many),
        ] {
            one.complete(&prompts(sequences.0), sequences.1, run, Some(&floors))?;
            if let Some(served) = &served {
                *cluster = *cluster + served.complete(&prompts(sequences.0), expected)?;
            }
        }
        one.step(&[0], &prompt, &mut prefill, Some(&floors))?;
    }
    for (name, run) in
        [("decode of 1 sequence", &decode_one), ("decode of 16 sequences", &decode_many), ("prefill of 512", &prefill)]
    {
        report(&format!("{name} {dtype}"), run.rate().per_second(), run.roofline(&floors), "tokens/s");
    }
    if served.is_some() {
        for (name, cluster, run) in [
            ("cluster decode of 1 sequence", cluster_one, &decode_one),
            ("cluster decode of 16 sequences", cluster_many, &decode_many),
        ] {
            report(name, cluster.per_second(), run.rate().per_second(), "tokens/s");
        }
    }
    Ok(())
}

fn gib_per_second(bytes: u64, began: Instant) -> f64 {
    bytes as f64 / began.elapsed().as_secs_f64() / f64::from(1 << 30)
}

/// A prompt that no other number has.
fn tokens(checkpoint: &Checkpoint, number: usize, len: usize) -> Vec<u32> {
    let vocab = checkpoint.spec().vocab_size;
    (0..len).map(|index| ((number * 7919 + index * 104_729 + 3) % vocab) as u32).collect()
}

fn report(name: &str, measured: f64, floor: f64, unit: &str) {
    println!("{}", json!({"name": name, "measured": measured, "floor": floor, "unit": unit}));
}
