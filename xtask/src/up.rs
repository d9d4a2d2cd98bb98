//! `cargo xtask up`: a release build, then this process becomes `sirocco up`, so that signals and the exit status are its own.

use std::io::stderr;
use std::os::fd::AsFd as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// The packages of the programs a cluster consists of. `sirocco up --processes` starts the nodes' own.
pub(crate) const PACKAGES: [&str; 4] = ["sirocco", "sirocco-coordinator", "sirocco-expert-node", "sirocco-router-node"];

/// Returns only on failure. The build prints to standard error, so that standard output is the program's alone.
pub(crate) fn run(args: &[&str]) -> Result<()> {
    let mut build = crate::cargo(&["build", "--release", "--bins"])?;
    build.args(PACKAGES.iter().flat_map(|package| ["--package", package]));
    build.stdout(Stdio::from(stderr().as_fd().try_clone_to_owned().context("standard error")?));
    let status = build.status().context("start cargo")?;
    if !status.success() {
        bail!("the build ended with {status}");
    }
    let program = crate::target_folder()?.join("release/sirocco");
    let error = Command::new(&program).arg("up").args(args).exec();
    Err(error).with_context(|| format!("run {}", program.display()))
}
