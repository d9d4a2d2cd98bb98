//! `cargo xtask bench NAME`: release builds, measured, with each figure beside its limit. Fails when a limit is missed.

mod control;
mod plan;
mod serve;

use anyhow::Result;

/// A benchmark: its name on the command line and what it does.
type Bench = (&'static str, fn() -> Result<()>);

const BENCHES: [Bench; 3] = [("plan", plan::run), ("control", control::run), ("serve", serve::run)];

/// What the benchmark called `name` does.
pub(crate) fn find(name: &str) -> Option<fn() -> Result<()>> {
    BENCHES.into_iter().find(|(known, _)| *known == name).map(|(_, run)| run)
}
