//! `sirocco model`: what a checkpoint is, what its experts lose when they are quantised, and making one.

use std::path::PathBuf;

use anyhow::Result;
use serde::Serialize;
use sirocco_model::{Checkpoint, Tokenizer};
use sirocco_types::{Bytes, ModelIdentity};

use crate::output::{self, Format, column, table};
use crate::{bundled, generate_random, quality};

/// What to do with a checkpoint.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Check a checkpoint's files and show the model's shape
    Inspect {
        /// The checkpoint's folder [default: the bundled model]
        folder: Option<PathBuf>,
        /// How to show it
        #[arg(short, long, env = "SIROCCO_OUTPUT", value_enum, default_value_t)]
        output: Format,
    },
    /// Measure how well a model predicts a text by what its experts are kept as
    Quality(quality::Args),
    /// Write a Mixtral of random weights, to measure with
    GenerateRandom(generate_random::Args),
}

#[derive(Serialize)]
struct Inspection {
    #[serde(flatten)]
    identity: ModelIdentity,
    folder: PathBuf,
    file_bytes: u64,
    expert_bytes: u64,
    all_experts_bytes: u64,
}

/// Runs the command.
pub(crate) async fn run(command: Command) -> Result<()> {
    match command {
        Command::Inspect { folder, output } => inspect(folder, output),
        Command::Quality(args) => quality::run(args).await,
        Command::GenerateRandom(args) => generate_random::run(args).await,
    }
}

fn inspect(folder: Option<PathBuf>, format: Format) -> Result<()> {
    let folder = folder.map_or_else(bundled::folder, Ok)?;
    let checkpoint = Checkpoint::open(&folder)?;
    Tokenizer::load(&folder, checkpoint.spec())?;
    let spec = checkpoint.spec();
    let inspection = Inspection {
        identity: checkpoint.identity().clone(),
        folder,
        file_bytes: checkpoint.bytes(),
        expert_bytes: spec.expert_bytes(),
        all_experts_bytes: spec.expert_bytes() * spec.experts().count() as u64,
    };
    output::print(&output::one(format, &inspection, || text(&inspection))?)
}

fn text(inspection: &Inspection) -> String {
    let spec = &inspection.identity.spec;
    let rows = [
        ("name", inspection.identity.name.clone()),
        ("folder", inspection.folder.display().to_string()),
        ("fingerprint", inspection.identity.fingerprint.to_string()),
        ("family", spec.model_type.clone()),
        ("files", Bytes(inspection.file_bytes).to_string()),
        ("layers", spec.num_hidden_layers.to_string()),
        ("hidden size", spec.hidden_size.to_string()),
        (
            "attention",
            format!(
                "{} heads, {} key/value heads, {} wide",
                spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim
            ),
        ),
        ("experts", format!("{} a layer, {} for each token", spec.num_local_experts, spec.num_experts_per_tok)),
        ("expert", format!("{} wide, {}", spec.intermediate_size, Bytes(inspection.expert_bytes))),
        ("all experts", Bytes(inspection.all_experts_bytes).to_string()),
        ("vocabulary", spec.vocab_size.to_string()),
        ("context", format!("{} tokens", spec.max_position_embeddings)),
        ("weights", spec.dtype.to_string()),
    ];
    table(&[column(""), column("")], &rows.map(|(name, value)| vec![name.to_owned(), value]), false).trim().to_owned()
}
