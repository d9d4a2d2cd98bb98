//! `cargo xtask bench plan`: the planner without nodes.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::parts;

/// Simulations whose plans have a time limit, in milliseconds: 288 slots over 144 nodes, and 2,000 nodes.
const TIMED: [(&[&str], f64); 2] = [
    (&["--shape", "deepseek-v3", "--nodes", "144", "--extra-replicas", "32"], 250.0),
    (&["--shape", "deepseek-v3", "--nodes", "2000", "--slots", "4"], 2000.0),
];

/// Builds `sirocco`, and prints how long its plans take against their limits and the table of all shapes.
pub(super) fn run() -> Result<()> {
    parts::build_dist(&["--package", "sirocco"])?;
    let sirocco = parts::built("sirocco")?;
    let mut late = 0;
    for (flags, limit_ms) in TIMED {
        let output = simulate(&sirocco).args(flags).args(["-o", "json"]).output().context("start sirocco")?;
        if !output.status.success() {
            bail!("sirocco simulate: {}", String::from_utf8_lossy(&output.stderr));
        }
        let rounds: Vec<Value> = serde_json::from_slice(&output.stdout).context("the rounds")?;
        let slowest = rounds.iter().filter_map(|round| round["plan_ms"].as_f64()).fold(0.0, f64::max);
        let outcome = if slowest <= limit_ms { "ok" } else { "LATE" };
        println!("sirocco simulate {}: {slowest:.0} ms, limit {limit_ms:.0} ms: {outcome}", flags.join(" "));
        late += usize::from(slowest > limit_ms);
    }
    let status = simulate(&sirocco).status().context("start sirocco")?;
    if !status.success() || late > 0 {
        bail!("{late} of {} plans were late; the table ended with {status}", TIMED.len());
    }
    Ok(())
}

/// `sirocco simulate` as it is without settings from the environment.
fn simulate(sirocco: &Path) -> Command {
    let mut command = Command::new(sirocco);
    crate::without_settings(command.arg("simulate"));
    command
}
