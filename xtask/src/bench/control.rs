//! `cargo xtask bench control`: release processes on a real etcd, and how long the control plane takes.
//!
//! The measurement itself is a test that other runs leave out: it starts clusters as the end-to-end tests do.

use anyhow::{Context as _, Result, bail};

use crate::programs::{self, WhenMissing};

/// The test that measures, in package `sirocco-testkit`.
const MEASUREMENT: &str = "control::measure::joins_takeovers_and_writes_keep_their_limits";

/// Builds the programs and the measurement, then runs it; what it prints is shown as it comes.
pub(super) fn run() -> Result<()> {
    let etcd = programs::ensure(&["etcd", "etcdctl"], WhenMissing::Install)?;
    let mut build = crate::cargo(&["build", "--locked", "--release", "--bins"])?;
    build.args(crate::up::PACKAGES.iter().flat_map(|package| ["--package", package]));
    let test = ["test", "--locked", "--release", "--package", "sirocco-testkit", "--test", "e2e", "--"];
    let mut measure = crate::cargo(&test)?;
    measure.args(["--ignored", "--exact", MEASUREMENT, "--nocapture"]);
    etcd.export(&mut measure);
    for mut command in [build, measure] {
        let status = command.status().context("start cargo")?;
        if !status.success() {
            bail!("cargo ended with {status}");
        }
    }
    Ok(())
}
