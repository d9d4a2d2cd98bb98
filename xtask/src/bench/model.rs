//! The model of 1.1 billion parameters: made once, then measured in one process and served by processes.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use super::parts::{self, Lines};
use crate::programs::{self, WhenMissing};

/// What is built: together, so that every crate is built once.
const TARGETS: [&str; 5] = ["--package", "sirocco-testkit", "--bins", "--example", "model"];

/// Measures it with experts kept as `dtype`; the cluster is of the nodes' own programs and on a real etcd.
pub(super) fn run(dtype: &str) -> Result<Lines> {
    let etcd = programs::ensure(&["etcd"], WhenMissing::Install)?;
    let packages = crate::up::PACKAGES.iter().flat_map(|package| ["--package", package]);
    parts::build_dist(&packages.chain(TARGETS).collect::<Vec<_>>())?;
    let folder = checkpoint()?;
    let mut measure = Command::new(parts::built("examples/model")?);
    etcd.export(measure.arg(folder).arg(dtype));
    parts::lines(&mut measure)
}

/// The checkpoint's folder. It has its name only once it is complete.
fn checkpoint() -> Result<PathBuf> {
    let folder = crate::target_folder()?.join("bench/mixtral-1.1b");
    if !folder.exists() {
        let mut generate = Command::new(parts::built("sirocco")?);
        generate.args(["model", "generate-random", "--output"]).arg(&folder).stdout(std::io::stderr());
        let status = crate::without_settings(&mut generate).status().context("start sirocco")?;
        ensure!(status.success(), "sirocco model generate-random ended with {status}");
    }
    Ok(folder)
}
