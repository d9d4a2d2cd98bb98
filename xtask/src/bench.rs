//! `cargo xtask bench NAME`: release builds, measured, with each figure beside its limit. Fails when a limit is missed.

use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// A benchmark: its name on the command line and what it does with the path of the release `sirocco`.
type Bench = (&'static str, fn(&str) -> Result<()>);

const BENCHES: [Bench; 1] = [("plan", plan)];

/// The benchmark called `name`.
pub(crate) fn find(name: &str) -> Option<Bench> {
    BENCHES.into_iter().find(|(known, _)| *known == name)
}

/// Builds the release binaries and runs the benchmark called `name`.
pub(crate) fn run(name: &str) -> Result<()> {
    let (_, bench) = find(name).with_context(|| format!("there is no benchmark {name:?}"))?;
    let status = crate::cargo(&["build", "--release", "--package", "sirocco"])?.status().context("start cargo")?;
    if !status.success() {
        bail!("the build ended with {status}");
    }
    let program = crate::target_folder()?.join("release/sirocco");
    bench(program.to_str().context("the path of sirocco is UTF-8")?)
}

/// Simulations whose plans have a time limit, in milliseconds: 288 slots over 144 nodes, and 2,000 nodes.
const TIMED: [(&[&str], f64); 2] = [
    (&["--shape", "deepseek-v3", "--nodes", "144", "--extra-replicas", "32"], 250.0),
    (&["--shape", "deepseek-v3", "--nodes", "2000", "--slots", "4"], 2000.0),
];

/// How long plans take against their limits, then the table of all shapes.
fn plan(sirocco: &str) -> Result<()> {
    let mut late = 0;
    for (flags, limit_ms) in TIMED {
        let output = simulate(sirocco).args(flags).args(["-o", "json"]).output().context("start sirocco")?;
        if !output.status.success() {
            bail!("sirocco simulate: {}", String::from_utf8_lossy(&output.stderr));
        }
        let rounds: Vec<Value> = serde_json::from_slice(&output.stdout).context("the rounds")?;
        let slowest = rounds.iter().filter_map(|round| round["plan_ms"].as_f64()).fold(0.0, f64::max);
        let outcome = if slowest <= limit_ms { "ok" } else { "LATE" };
        println!("sirocco simulate {}: {slowest:.0} ms, limit {limit_ms:.0} ms: {outcome}", flags.join(" "));
        late += usize::from(slowest > limit_ms);
    }
    let status = simulate(sirocco).status().context("start sirocco")?;
    if !status.success() || late > 0 {
        bail!("{late} of {} plans were late; the table ended with {status}", TIMED.len());
    }
    Ok(())
}

/// `sirocco simulate` as it is without settings from the environment.
fn simulate(sirocco: &str) -> Command {
    let mut command = Command::new(sirocco);
    command.arg("simulate");
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.as_encoded_bytes().starts_with(b"SIROCCO_")) {
        command.env_remove(name);
    }
    command
}
