//! `sirocco keys`: makes, lists and revokes the API keys of routers, in the file they read with `--api-keys`. A key is shown once,
//! when it is made; only its hash is kept.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow, bail};
use serde::Serialize;
use sirocco_router_node::keys::{self, Entry, NewKey};
use toml_edit::DocumentMut;

use crate::output::{self, Format, column};

/// What to do with API keys.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Make a key, show it once, and add its hash to the file
    Create {
        /// Names the caller in logs: letters, digits and . _ @ -
        name: String,
        /// The file; made when there is none [default: the entry is shown, to be added by hand]
        #[arg(long, env = "SIROCCO_API_KEYS", value_name = "FILE")]
        file: Option<PathBuf>,
    },
    /// Show who has a key and what they may take
    List {
        /// The file
        #[arg(long, env = "SIROCCO_API_KEYS", value_name = "FILE")]
        file: PathBuf,
        /// How to show them
        #[arg(short, long, env = "SIROCCO_OUTPUT", value_enum, default_value_t)]
        output: Format,
    },
    /// Take a caller's key out of the file
    Revoke {
        /// The caller
        name: String,
        /// The file
        #[arg(long, env = "SIROCCO_API_KEYS", value_name = "FILE")]
        file: PathBuf,
    },
}

/// An entry as it is shown.
#[derive(Serialize)]
struct Shown {
    name: String,
    requests_per_minute: Option<u32>,
    tokens_per_minute: Option<u32>,
    concurrent_requests: Option<u32>,
    max_priority: sirocco_types::Priority,
    expires: Option<String>,
}

/// Runs the command.
pub(crate) fn run(command: Command) -> Result<()> {
    match command {
        Command::Create { name, file } => create(&name, file.as_deref()),
        Command::List { file, output } => list(&file, output),
        Command::Revoke { name, file } => revoke(&name, &file),
    }
}

fn create(name: &str, file: Option<&Path>) -> Result<()> {
    keys::check_name(name).map_err(|problem| anyhow!("the name {problem}"))?;
    let key = NewKey::generate().context("the system has no randomness")?;
    let entry = format!("[[key]]\nname = \"{name}\"\nhash = \"{}\"\n", key.hash);
    let Some(file) = file else { return output::print(&format!("{}\n\n{entry}", key.secret)) };
    let mut text = match std::fs::read_to_string(file) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
        read => read.with_context(|| file.display().to_string())?,
    };
    if entries(file, &text)?.iter().any(|entry| entry.name == name) {
        bail!("{}: {name:?} has a key already; revoke it or choose another name", file.display());
    }
    if !text.is_empty() {
        text += if text.ends_with('\n') { "\n" } else { "\n\n" };
    }
    write(file, &(text + &entry))?;
    output::print(&key.secret)
}

fn list(file: &Path, format: Format) -> Result<()> {
    let text = read(file)?;
    let shown: Vec<Shown> = entries(file, &text)?.into_iter().map(Shown::from).collect();
    let columns = ["name", "requests/min", "tokens/min", "at once", "max priority", "expires"].map(column);
    output::print(&output::list(format, &columns, &shown, Shown::row)?)
}

fn revoke(name: &str, file: &Path) -> Result<()> {
    let text = read(file)?;
    entries(file, &text)?;
    let mut document: DocumentMut = text.parse().with_context(|| file.display().to_string())?;
    let is_theirs = |entry: &toml_edit::Table| entry.get("name").and_then(|own| own.as_str()) == Some(name);
    let callers = document.get_mut("key").and_then(|key| key.as_array_of_tables_mut());
    match callers {
        Some(callers) if callers.iter().any(is_theirs) => callers.retain(|entry| !is_theirs(entry)),
        _ => bail!("{}: {name:?} has no key there", file.display()),
    }
    write(file, &document.to_string())
}

fn read(file: &Path) -> Result<String> {
    std::fs::read_to_string(file).with_context(|| file.display().to_string())
}

fn entries(file: &Path, text: &str) -> Result<Vec<Entry>> {
    keys::parse(text).with_context(|| file.display().to_string())
}

/// Replaces the file in one step, for its owner's eyes only, so that a router never reads half of it.
fn write(file: &Path, text: &str) -> Result<()> {
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let replace = || -> std::io::Result<()> {
        let mut new = tempfile::Builder::new().prefix(".api-keys").tempfile_in(folder)?;
        new.write_all(text.as_bytes())?;
        new.as_file().sync_all()?;
        new.persist(file)?;
        Ok(())
    };
    replace().with_context(|| format!("cannot write {}", file.display()))
}

impl From<Entry> for Shown {
    fn from(entry: Entry) -> Self {
        let limits = entry.limits;
        Self {
            name: entry.name,
            requests_per_minute: limits.requests_per_minute.map(Into::into),
            tokens_per_minute: limits.tokens_per_minute.map(Into::into),
            concurrent_requests: limits.concurrent_requests.map(Into::into),
            max_priority: entry.max_priority,
            expires: entry.expires.map(|at| at.to_string()),
        }
    }
}

impl Shown {
    fn row(&self) -> Vec<String> {
        let limit = |limit: Option<u32>| limit.map_or("-".to_owned(), |limit| limit.to_string());
        let priority = format!("{:?}", self.max_priority).to_ascii_lowercase();
        vec![
            self.name.clone(),
            limit(self.requests_per_minute),
            limit(self.tokens_per_minute),
            limit(self.concurrent_requests),
            priority,
            self.expires.clone().unwrap_or_else(|| "-".to_owned()),
        ]
    }
}
