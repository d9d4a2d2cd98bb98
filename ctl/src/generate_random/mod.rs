//! `sirocco model generate-random`: a checkpoint of random weights in the public Hugging Face layout, to measure with.
//!
//! Written piece by piece into a folder beside the wanted one, which gets its name when everything is there: a folder of that
//! name is complete, whenever the program was interrupted. The same flags write the same bytes on every machine.

mod texts;
mod weights;

use std::fs::Permissions;
use std::io::{IsTerminal as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, Result, bail, ensure};
use sirocco_model::read_spec;
use sirocco_types::Bytes;

use crate::output;
use crate::terminal::Paint;

/// Flags of `model generate-random`. The defaults are a Mixtral of 1.1 billion parameters.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    /// The checkpoint's folder; refused when there is anything in it
    #[arg(long, env = "SIROCCO_RANDOM_OUTPUT", value_name = "FOLDER")]
    output: PathBuf,
    /// What the weights are drawn from
    #[arg(long, env = "SIROCCO_SEED", value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Width of a hidden state
    #[arg(long, env = "SIROCCO_RANDOM_HIDDEN_SIZE", value_name = "N", default_value_t = 1024, value_parser = WIDTH())]
    hidden_size: u32,
    /// Width inside one expert
    #[arg(long, env = "SIROCCO_RANDOM_INTERMEDIATE_SIZE", value_name = "N", default_value_t = 3584, value_parser = WIDTH())]
    intermediate_size: u32,
    /// Decoder layers
    #[arg(long, env = "SIROCCO_RANDOM_LAYERS", value_name = "N", default_value_t = 12, value_parser = COUNT())]
    layers: u32,
    /// Experts of each layer
    #[arg(long, env = "SIROCCO_RANDOM_EXPERTS", value_name = "N", default_value_t = 8, value_parser = COUNT())]
    experts: u32,
    /// Experts each token goes to
    #[arg(long, env = "SIROCCO_RANDOM_TOP_K", value_name = "N", default_value_t = 2, value_parser = COUNT())]
    top_k: u32,
    /// Query heads
    #[arg(long, env = "SIROCCO_RANDOM_HEADS", value_name = "N", default_value_t = 16, value_parser = COUNT())]
    heads: u32,
    /// Key and value heads
    #[arg(long, env = "SIROCCO_RANDOM_KV_HEADS", value_name = "N", default_value_t = 4, value_parser = COUNT())]
    kv_heads: u32,
    /// Width of a head [default: the hidden size over the query heads]
    #[arg(long, env = "SIROCCO_RANDOM_HEAD_DIM", value_name = "N", value_parser = COUNT())]
    head_dim: Option<u32>,
    /// Token ids; the tokenizer's own are the first 259, the bytes
    #[arg(long, env = "SIROCCO_RANDOM_VOCAB_SIZE", value_name = "N", default_value_t = 32_000, value_parser = clap::value_parser!(u32).range(i64::from(texts::TOKENS)..=1 << 20))]
    vocab_size: u32,
    /// Most bytes of weights in one file; a tensor that is larger has a file of its own
    #[arg(long, env = "SIROCCO_RANDOM_SHARD_BYTES", value_name = "BYTES", default_value_t = 1 << 30, value_parser = clap::value_parser!(u64).range(1..))]
    shard_bytes: u64,
}

/// So wide that no product of them overflows.
const WIDTH: fn() -> clap::builder::RangedI64ValueParser<u32> = || clap::value_parser!(u32).range(1..=65_536);
const COUNT: fn() -> clap::builder::RangedI64ValueParser<u32> = || clap::value_parser!(u32).range(1..=1024);

/// Writes the checkpoint.
pub(crate) async fn run(args: Args) -> Result<()> {
    let began = Instant::now();
    let output = std::path::absolute(&args.output)?;
    ensure_empty(&output)?;
    let (parent, name) =
        output.parent().zip(output.file_name()).context("--output is /, must be a folder in another")?;
    std::fs::create_dir_all(parent).with_context(|| parent.display().to_string())?;
    let mut prefix = std::ffi::OsString::from(".");
    prefix.push(name);
    let folder = tempfile::Builder::new()
        .prefix(&prefix)
        .permissions(Permissions::from_mode(0o755))
        .tempdir_in(parent)
        .with_context(|| parent.display().to_string())?;
    let bytes = write(folder.path(), &args).await?;
    // Atomic; fails when somebody has put something there meanwhile.
    std::fs::rename(folder.path(), &output).with_context(|| output.display().to_string())?;
    // Its folder has another name now; there is nothing left to remove.
    let _ = folder.keep();
    let seconds = began.elapsed().as_secs_f64();
    output::print(&format!("{}: {} of weights in {seconds:.1} s", args.output.display(), Bytes(bytes)))
}

fn ensure_empty(folder: &Path) -> Result<()> {
    match std::fs::read_dir(folder) {
        Ok(mut entries) => ensure!(entries.next().is_none(), "{} is not empty", folder.display()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => bail!("{}: {error}", folder.display()),
    }
    Ok(())
}

/// Writes every file into `folder`; returns the bytes of all weights.
async fn write(folder: &Path, args: &Args) -> Result<u64> {
    for (name, contents) in texts::files(args) {
        std::fs::write(folder.join(name), serde_json::to_vec_pretty(&contents)?)?;
    }
    // What no model can be is refused by who reads it.
    let spec = read_spec(folder)?;
    let shards = weights::Shards::plan(&spec, args.shard_bytes);
    let mut progress = Progress::start(shards.bytes());
    shards.write(folder, args.seed, |bytes| progress.step(bytes)).await?;
    progress.finish();
    Ok(shards.bytes())
}

/// A line on the terminal. Nothing is written when standard error is no terminal.
struct Progress {
    visible: bool,
    started: Instant,
    done: u64,
    all: u64,
}

impl Progress {
    fn start(all: u64) -> Self {
        Self { visible: std::io::stderr().is_terminal(), started: Instant::now(), done: 0, all }
    }

    /// `bytes` more are written.
    fn step(&mut self, bytes: u64) {
        self.done += bytes;
        if self.visible {
            // A terminal that cannot be written to has nobody to inform.
            let _ = write!(std::io::stderr(), "\r\x1b[2K{}", self.line());
        }
    }

    fn finish(self) {
        if self.visible {
            let _ = writeln!(std::io::stderr());
        }
    }

    fn line(&self) -> String {
        let rate = self.done as f64 / self.started.elapsed().as_secs_f64().max(1e-3);
        let left = (self.all - self.done) as f64 / rate.max(1.0);
        let bar = Paint::here().bar(self.done as f64 / self.all as f64, 24);
        let (done, all, rate) = (Bytes(self.done), Bytes(self.all), Bytes(rate as u64));
        format!("{bar} {done} of {all}, {rate}/s, {left:.0} s left")
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use clap::Parser;
    use futures::executor::block_on;
    use sirocco_compute::{Pool, RouterDevice};
    use sirocco_model::{Checkpoint, LocalExperts, Logits, Model, SequenceChunk, Tokenizer};
    use sirocco_types::ExpertDtype;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    /// Generates a small model, but for what is changed, into a folder of its own.
    async fn generate(changes: &[(&str, &str)]) -> (tempfile::TempDir, Result<()>) {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("models").join("random");
        let mut flags = BTreeMap::from([
            ("--hidden-size", "48"),
            ("--intermediate-size", "80"),
            ("--layers", "2"),
            ("--experts", "5"),
            ("--heads", "6"),
            ("--kv-heads", "2"),
            ("--vocab-size", "300"),
            ("--shard-bytes", "60000"),
            ("--output", folder.to_str().unwrap()),
        ]);
        flags.extend(changes.iter().copied());
        let line = flags.into_iter().flat_map(|(flag, value)| [flag, value]);
        let result = run(Line::parse_from(["generate-random"].into_iter().chain(line)).args).await;
        (dir, result)
    }

    fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
        let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
        entries.map(|entry| (entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap())).collect()
    }

    /// The ids that follow a prompt when the most likely one is always taken.
    fn greedy(folder: &Path, threads: usize) -> Vec<u32> {
        let checkpoint = Checkpoint::open(folder).unwrap();
        let pool = Pool::new(threads).unwrap();
        let device = RouterDevice::Cpu { pool: pool.clone(), kv_blocks: 4 };
        let mut model = Model::load(&checkpoint, device).unwrap();
        let experts = LocalExperts::load(&checkpoint, ExpertDtype::Bf16, pool).unwrap();
        let prompt = Tokenizer::load(folder, checkpoint.spec()).unwrap().encode("Byte by byte: ä", true).unwrap();
        assert_eq!(prompt.len(), 1 + "Byte by byte: ä".len(), "a beginning, then each byte");
        let mut ids = prompt;
        let (mut start, mut generated) = (0, Vec::new());
        for _ in 0..8 {
            let chunk = SequenceChunk {
                blocks: &[2, 0, 3, 1],
                start,
                tokens: &ids[start..],
                logits: Logits::Last,
                until: None,
            };
            let output = block_on(model.forward(&[&[chunk]], &experts)).unwrap();
            let best = (0..300_u32).max_by(|a, b| {
                let at = |id: &u32| output.logits[0][*id as usize];
                at(a).total_cmp(&at(b))
            });
            start = ids.len();
            ids.push(best.unwrap());
            generated.push(best.unwrap());
        }
        generated
    }

    #[tokio::test]
    async fn the_same_seed_gives_the_same_checkpoint_which_generates_the_same_ids() {
        let (first, second) = (generate(&[]).await, generate(&[]).await);
        let (first, second) = (first.0.path().join("models/random"), second.0.path().join("models/random"));
        assert_eq!(files(&first), files(&second));
        assert!(files(&first).contains_key("model.safetensors.index.json"));
        assert_eq!(greedy(&first, 1), greedy(&second, 3));

        let other = generate(&[("--seed", "1")]).await;
        let other = other.0.path().join("models/random");
        assert_ne!(greedy(&first, 1), greedy(&other, 1));
        assert_ne!(
            Checkpoint::open(&first).unwrap().identity().fingerprint,
            Checkpoint::open(&other).unwrap().identity().fingerprint
        );
    }

    #[tokio::test]
    async fn the_size_of_shards_changes_no_weight() {
        let (many, one) = (generate(&[]).await, generate(&[("--shard-bytes", "100000000")]).await);
        let (many, one) = (many.0.path().join("models/random"), one.0.path().join("models/random"));
        assert!(files(&one).contains_key("model.safetensors"));
        assert_eq!(greedy(&many, 1), greedy(&one, 1));
    }

    #[tokio::test]
    async fn what_is_there_is_kept_and_what_no_model_can_be_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().to_str().unwrap();
        std::fs::write(dir.path().join("mine"), "").unwrap();
        let line = Line::parse_from(["generate-random", "--output", folder]);
        assert_eq!(run(line.args).await.unwrap_err().to_string(), format!("{folder} is not empty"));
        assert_eq!(files(dir.path()).len(), 1);

        let (dir, result) = generate(&[("--kv-heads", "4")]).await;
        let problem = "config.json: num_key_value_heads is 4, must divide num_attention_heads, 6";
        assert_eq!(result.unwrap_err().to_string(), problem);
        assert_eq!(std::fs::read_dir(dir.path().join("models")).unwrap().count(), 0);
    }
}
