//! `cargo xtask neon`: tests the kernels for 64-bit Arm on a machine of another kind, compiled for Linux on Arm and run by QEMU, which
//! does what each of their instructions does. That takes minutes and says nothing of speed.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};

use crate::nvrtc;
use crate::programs::{self, WhenMissing};
use crate::steps::{step, succeed};

/// What the tests are compiled for.
const TARGET: &str = "aarch64-unknown-linux-gnu";

/// Where Debian's packages put Arm's loader and libraries.
const LIBRARIES: &str = "/usr/aarch64-linux-gnu";

/// Runs the tests. On Arm it only says that `cargo xtask test` does.
pub(crate) fn test(when_missing: WhenMissing) -> Result<()> {
    if cfg!(target_arch = "aarch64") {
        println!("xtask: this is an Arm machine: `cargo xtask test` tests these kernels, without an emulator");
        return Ok(());
    }
    let found = step("programs", || programs::ensure(&programs::for_arm(), when_missing))?;
    step(&format!("Rust's libraries for {TARGET}"), || ensure_target(when_missing))?;
    let (qemu, linker) = (found.path("qemu-aarch64")?, found.path("aarch64-linux-gnu-gcc")?);
    let mut cargo = crate::cargo(&["test", "--locked", "-p", "sirocco-compute", "--target", TARGET])?;
    found.export(&mut cargo);
    cargo.env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER", linker);
    cargo.env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER", runner(qemu)?);
    // It would be this machine's library, which cannot be loaded there.
    cargo.env_remove(nvrtc::VARIABLE);
    let passed = step("tests of the compute crate", || passed(&mut cargo))?;
    println!("xtask: {passed} tests passed on an emulated 64-bit Arm");
    Ok(())
}

/// Cargo splits it at spaces.
fn runner(qemu: &Path) -> Result<String> {
    let qemu = qemu.to_str().filter(|path| !path.contains(' ')).context("a path to QEMU without spaces is needed")?;
    Ok(format!("{qemu} -L {LIBRARIES}"))
}

/// Finds the standard library for [`TARGET`], or has rustup install it.
fn ensure_target(when_missing: WhenMissing) -> Result<()> {
    let install = ["target", "add", TARGET];
    if libraries()?.is_dir() {
        return Ok(());
    }
    if when_missing == WhenMissing::Fail {
        bail!("missing: the target {TARGET}; run: rustup {}", install.join(" "));
    }
    succeed(Command::new("rustup").args(install).current_dir(crate::root()))
}

/// Where the compiler looks for them.
fn libraries() -> Result<PathBuf> {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let mut command = Command::new(rustc);
    command.args(["--print", "target-libdir", "--target", TARGET]).current_dir(crate::root());
    let output = command.output().context("start rustc")?;
    ensure!(output.status.success(), "rustc ended with {}", output.status);
    Ok(PathBuf::from(String::from_utf8(output.stdout)?.trim_end()))
}

/// Runs `cargo test`, shows what it prints as it comes, and gives how many tests passed; all must.
fn passed(cargo: &mut Command) -> Result<u64> {
    let mut child = cargo.stdout(Stdio::piped()).spawn().context("start cargo")?;
    let output = child.stdout.take().context("standard output")?;
    let mut passed = 0;
    for line in BufReader::new(output).lines() {
        let line = line?;
        println!("{line}");
        passed += passed_of(&line);
    }
    let status = child.wait()?;
    ensure!(status.success(), "it ended with {status}");
    ensure!(passed > 0, "no test was run");
    Ok(passed)
}

/// How many tests a line says passed: the one that ends a program's tests.
fn passed_of(line: &str) -> u64 {
    let count = line.strip_prefix("test result: ok. ").and_then(|rest| rest.split_once(" passed;"));
    count.and_then(|(count, _)| count.parse().ok()).unwrap_or(0)
}
