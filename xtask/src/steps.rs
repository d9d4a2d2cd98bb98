//! `cargo xtask test`: every check, one after the other, up to the first that fails.

use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::nvrtc;
use crate::programs::{self, WhenMissing};

/// Cargo's arguments for each check. Tests start the built binaries, so these are built first; `cargo test` covers unit,
/// integration, end-to-end and documentation tests.
const CHECKS: [&[&str]; 5] = [
    &["fmt", "--all", "--check"],
    &["clippy", "--locked", "--workspace", "--all-targets", "--", "-D", "warnings"],
    &["build", "--locked", "--workspace", "--bins"],
    &["test", "--locked", "--workspace"],
    &["doc", "--locked", "--workspace", "--no-deps"],
];

/// Runs all checks; what a check prints is shown as it comes, with a line of our own before and after.
pub(crate) fn test(when_missing: WhenMissing) -> Result<()> {
    let began = Instant::now();
    need_component("rustfmt", "fmt")?;
    need_component("clippy", "clippy")?;
    let found = step("programs that tests start", || programs::ensure(&programs::all(), when_missing))?;
    let library = step("NVIDIA's compiler, for GPU kernels", || nvrtc::ensure(&found, when_missing))?;
    for check in CHECKS {
        let mut command = crate::cargo(check)?;
        found.export(&mut command);
        command.env(nvrtc::VARIABLE, &library);
        if check[0] == "doc" {
            command.env("RUSTDOCFLAGS", "-D warnings");
        }
        step(&format!("cargo {}", check.join(" ")), || succeed(&mut command))?;
    }
    println!("xtask: all {} checks passed in {:.1} s", CHECKS.len(), began.elapsed().as_secs_f64());
    Ok(())
}

/// Says what is done, does it, and says how it went.
pub(crate) fn step<T>(name: &str, run: impl FnOnce() -> Result<T>) -> Result<T> {
    println!("xtask: {name}");
    let began = Instant::now();
    let result = run();
    let outcome = if result.is_ok() { "ok" } else { "FAILED" };
    println!("xtask: {name}: {outcome} in {:.1} s", began.elapsed().as_secs_f64());
    result.with_context(|| format!("failed: {name}"))
}

/// Runs a program to its end, which must be a good one.
pub(crate) fn succeed(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("start {}", command.get_program().display()))?;
    if !status.success() {
        bail!("it ended with {status}");
    }
    Ok(())
}

/// Checks that `cargo SUBCOMMAND` is there, which rustup leaves out in its minimal profile.
fn need_component(component: &str, subcommand: &str) -> Result<()> {
    let output = crate::cargo(&[subcommand, "--version"])?.output().context("start cargo")?;
    if !output.status.success() {
        bail!("`cargo {subcommand}` is missing; install it with: rustup component add {component}");
    }
    Ok(())
}
