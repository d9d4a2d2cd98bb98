//! `cargo xtask gpu-check`: everything that only a machine with an NVIDIA GPU can show, one after the other, up to the first that
//! fails. Where there is no GPU, it says what is missing and fails.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use crate::nvrtc;
use crate::programs::{self, WhenMissing};
use crate::steps::{step, succeed};

/// Tests of `crates/compute/tests/gpu.rs` that are short enough to be run under a tool that slows them down a hundred times.
const SANITISED: [&str; 3] =
    ["small_shapes_are_computed_as_the_cpu_does_it", "a_batch_of_many_waves", "a_router_computes_what_the_cpus_does"];

/// What compute-sanitizer looks for: memory, races in shared memory, barriers that not all reach.
const TOOLS: [&str; 3] = ["memcheck", "racecheck", "synccheck"];

/// Runs all checks.
pub(crate) fn check(when_missing: WhenMissing) -> Result<()> {
    let found = programs::ensure(&["etcd", "etcdctl", "python3"], when_missing)?;
    let library = nvrtc::ensure(&found, when_missing)?;
    let cargo = |args: &[&str]| -> Result<Command> {
        let mut command = crate::cargo(args)?;
        found.export(&mut command);
        command.env(nvrtc::VARIABLE, &library);
        Ok(command)
    };
    step("a GPU that can be used", || succeed(&mut cargo(&[&GPU_EXAMPLE[..], &["--", "probe"]].concat())?))?;
    step("kernels against the CPU, bits of a row alone, among others and by graphs, a full GPU", || {
        succeed(&mut cargo(&[
            "test",
            "--locked",
            "-p",
            "sirocco-compute",
            "--test",
            "gpu",
            "--",
            "--ignored",
            "--test-threads=1",
        ])?)
    })?;
    step("programs", || succeed(&mut cargo(&["build", "--locked", "--workspace", "--bins"])?))?;
    step("goldens with routers and experts on a GPU, and beside routers and experts on CPUs", || {
        let test = ["test", "--locked", "-p", "sirocco-testkit", "--test", "e2e", "--", "--ignored", "control::gpu::"];
        succeed(&mut cargo(&test)?)
    })?;
    match sanitizer() {
        None => println!("xtask: compute-sanitizer is neither on the path nor in /usr/local/cuda/bin: not run"),
        Some(sanitizer) => {
            let tests = test_program(cargo(&[
                "test",
                "--locked",
                "-p",
                "sirocco-compute",
                "--test",
                "gpu",
                "--no-run",
                "--message-format=json",
            ])?)?;
            for (tool, test) in TOOLS.iter().flat_map(|tool| SANITISED.map(|test| (tool, test))) {
                step(&format!("compute-sanitizer {tool}, {test}"), || {
                    let mut command = Command::new(&sanitizer);
                    command.args(["--tool", tool, "--error-exitcode", "1"]).arg(&tests).args(["--ignored", test]);
                    succeed(command.env(nvrtc::VARIABLE, &library))
                })?;
            }
        }
    }
    println!("xtask: all that needs a GPU passed; `cargo xtask bench gpu` measures");
    Ok(())
}

/// Runs the program that measures, or says what the GPU is.
pub(crate) const GPU_EXAMPLE: [&str; 7] = ["run", "--locked", "--release", "-p", "sirocco-compute", "--example", "gpu"];

/// NVIDIA's tool that looks over a kernel's shoulder.
fn sanitizer() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders =
        std::env::split_paths(&path).chain(["/usr/local/cuda/bin".into(), "/usr/local/cuda/compute-sanitizer".into()]);
    folders.map(|folder| folder.join("compute-sanitizer")).find(|file| file.is_file())
}

/// The program that `build`, a `cargo test --no-run` with messages in JSON, makes.
fn test_program(mut build: Command) -> Result<PathBuf> {
    let output = build.stderr(std::process::Stdio::inherit()).output().context("start cargo")?;
    ensure!(output.status.success(), "cargo ended with {}", output.status);
    let messages = String::from_utf8(output.stdout)?;
    let executable = |line: &str| {
        let message: Value = serde_json::from_str(line).ok()?;
        (message["target"]["name"] == "gpu").then(|| message["executable"].as_str().map(PathBuf::from))?
    };
    let Some(program) = messages.lines().find_map(executable) else { bail!("cargo names no test program") };
    Ok(program)
}
