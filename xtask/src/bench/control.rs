//! `cargo xtask bench control`: release processes on a real etcd, and how long the control plane takes.
//!
//! The measurement itself is a test that other runs leave out: it starts clusters as the end-to-end tests do.

use anyhow::{Context as _, Result, ensure};

use super::parts;
use crate::programs::{self, WhenMissing};

/// The test that measures, in package `sirocco-testkit`.
const MEASUREMENT: &str = "control::measure::joins_takeovers_and_writes_keep_their_limits";

/// Builds the programs and the measurement, then runs it; what it prints is shown as it comes.
pub(super) fn run() -> Result<()> {
    let etcd = programs::ensure(&["etcd", "etcdctl"], WhenMissing::Install)?;
    let packages = crate::up::PACKAGES.iter().flat_map(|package| ["--package", package]);
    parts::build("release", &["--bins"].into_iter().chain(packages).collect::<Vec<_>>())?;
    let test = ["test", "--locked", "--release", "--package", "sirocco-testkit", "--test", "e2e", "--"];
    let mut measure = crate::cargo(&test)?;
    measure.args(["--ignored", "--exact", MEASUREMENT, "--nocapture"]);
    etcd.export(&mut measure);
    let status = measure.status().context("start cargo")?;
    ensure!(status.success(), "cargo ended with {status}");
    Ok(())
}
