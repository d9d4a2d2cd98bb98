//! `sirocco model quality`: what a model's answers lose when its experts are kept as fewer bits.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use serde::Serialize;
use sirocco_model::{Checkpoint, quality};
use sirocco_types::{Bytes, ExpertDtype};

use crate::bundled;
use crate::output::{self, Column, Format, column};

/// Paragraphs of the World English Bible (public domain) that the bundled model was not trained on.
const HELD_OUT: &str = include_str!("../../models/heldout.en.txt");

const COLUMNS: [Column; 4] = [column("EXPERTS"), column("BITS PER BYTE"), column("LOSS"), column("ALL EXPERTS")];

/// Flags of `model quality`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The checkpoint's folder [default: the bundled model]
    folder: Option<PathBuf>,
    /// Text to predict, better one that the model was not trained on [default: English that the bundled model was not trained on]
    #[arg(long, env = "SIROCCO_TEXT", value_name = "FILE")]
    text: Option<PathBuf>,
    /// Compute threads
    #[arg(long, env = "SIROCCO_THREADS", value_name = "N", default_value_t = sirocco_process::default_threads())]
    threads: usize,
    /// How to show it
    #[arg(short, long, env = "SIROCCO_OUTPUT", value_enum, default_value_t)]
    output: Format,
}

/// What experts kept as one dtype are worth.
#[derive(Serialize)]
struct Quality {
    expert_dtype: ExpertDtype,
    /// Fewer are better.
    bits_per_byte: f64,
    /// How many more than with bf16, in percent.
    loss_percent: f64,
    all_experts_bytes: u64,
}

/// Runs the command.
pub(crate) async fn run(args: Args) -> Result<()> {
    let folder = args.folder.map_or_else(bundled::folder, Ok)?;
    let text = match &args.text {
        Some(file) => std::fs::read_to_string(file).with_context(|| format!("--text {}", file.display()))?,
        None => HELD_OUT.to_owned(),
    };
    let checkpoint = Checkpoint::open(&folder)?;
    let spec = checkpoint.spec();
    let measured = quality(&checkpoint, &text, args.threads).await?;
    let stored = measured[0].1;
    let qualities = measured.map(|(expert_dtype, bits_per_byte)| Quality {
        expert_dtype,
        bits_per_byte,
        loss_percent: (bits_per_byte / stored - 1.0) * 100.0,
        all_experts_bytes: spec.expert_bytes_as(expert_dtype) * spec.experts().count() as u64,
    });
    output::print(&output::list(args.output, &COLUMNS, &qualities, |quality| {
        vec![
            quality.expert_dtype.to_string(),
            format!("{:.4}", quality.bits_per_byte),
            format!("{:.2} %", quality.loss_percent),
            Bytes(quality.all_experts_bytes).to_string(),
        ]
    })?)
}
