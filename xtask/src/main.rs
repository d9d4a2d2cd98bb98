//! `cargo xtask`: builds, runs and tests Sirocco on a machine that has only Rust and apt.
//!
//! Hands every build the `protoc` that etcd-client's build script asks for. Never leaves a service running.
#![forbid(unsafe_code)]

mod bench;
mod chaos;
mod gpu;
mod neon;
mod nvrtc;
mod programs;
mod steps;
mod up;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};

const HELP: &str = "\
Builds, runs and tests Sirocco.

Usage: cargo xtask <COMMAND>

Commands:
  up [ARGS...]   Build the release binaries, then become `sirocco up ARGS...` (`cargo xtask up --help` lists them)
  test           Check everything, as continuous integration does: formatting, lints, binaries, all tests, documentation.
                 Tests start programs: what SIROCCO_<PROGRAM>_BIN names (ETCD, ETCDCTL, CHROMIUM, CHROMEDRIVER, PROMTOOL,
                 PYTHON, NODE, NPM, FAKETIME, CXX), else what is on the path, else Debian's packages, which are installed. GPU
                 kernels are compiled by NVIDIA's compiler: the library that SIROCCO_NVRTC names, else that of a wheel from PyPI
      --no-install   Fail when one is missing instead of installing it
  bench [NAME]   Build as images are built, measure, and print figures beside what they must reach; fails when one does not
                 Without a name, the first four (docs/benchmarks.md)
      kernels    Experts of bf16, int8 and int4 weights over the machine's memory and multiply-adds
      attention  Attention by context over the same
      hop        Round trips to expert nodes over those of bare TCP, by size, and to eight at once
      model      A model of 1.1 billion parameters in one process, and in a cluster of eight expert nodes over that
      plan       How long plans take, and how balanced they are (docs/simulation.md)
      control    Joins, drains and takeovers on a real etcd under load, and how often etcd is written
      serve      Streams, latency, cached prefixes, overload and idling of a cluster with the bundled model
      gpu        Experts and routers on an NVIDIA GPU over its copies and its matrix multiplications
      -o json    Print a list of objects instead of a table; not for plan and control
  chaos          Build for release and put faults into a cluster under load, in an order that a seed decides; fails when a
                 request fails, a byte changes or the cluster does not come to rest (docs/faults.md)
      --seed S       The order, which comes again with the same seed [default: 1]
      --minutes M    How long [default: 10]
  chaos table    The same faults one by one, each measured and printed beside its bar; fails when one is missed
      -o json        Print a list of objects instead of a table
  gpu-check      Check what needs an NVIDIA GPU: kernels, routers and experts, goldens, clusters of GPU and CPU nodes, and
                 memory by compute-sanitizer when it is there. Fails, saying what is missing, where there is no GPU
      --no-install   As for test
  neon           Test the kernels for 64-bit Arm where there is none: the compute crate's tests, compiled for it and run by QEMU
                 (SIROCCO_QEMU_AARCH64_BIN, SIROCCO_AARCH64_GCC_BIN and SIROCCO_CXX_BIN, found or installed as for test). On an
                 Arm machine `test` does that already
      --no-install   As for test
  help           Print this

Exit status: 0 done, 1 failed, 2 usage; `up` ends with the status of `sirocco up`.
";

fn main() -> ExitCode {
    let args: Vec<String> = match std::env::args_os().skip(1).map(std::ffi::OsString::into_string).collect() {
        Ok(args) => args,
        Err(bad) => return usage(&format!("argument {} is not UTF-8", bad.display())),
    };
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let result = match args.as_slice() {
        ["up", rest @ ..] => up::run(rest),
        ["test"] => steps::test(programs::WhenMissing::Install),
        ["test", "--no-install"] => steps::test(programs::WhenMissing::Fail),
        ["gpu-check"] => gpu::check(programs::WhenMissing::Install),
        ["gpu-check", "--no-install"] => gpu::check(programs::WhenMissing::Fail),
        ["neon"] => neon::test(programs::WhenMissing::Install),
        ["neon", "--no-install"] => neon::test(programs::WhenMissing::Fail),
        ["help" | "--help" | "-h"] | ["test" | "bench" | "chaos" | "gpu-check" | "neon", "--help" | "-h"] => {
            print!("{HELP}");
            Ok(())
        }
        ["bench", rest @ ..] => match bench::Request::parse(rest) {
            Ok(request) => request.run(),
            Err(problem) => return usage(&problem),
        },
        ["chaos", rest @ ..] => match chaos::Request::parse(rest) {
            Ok(request) => request.run(),
            Err(problem) => return usage(&problem),
        },
        [] => return usage("a command is missing"),
        [command @ ("test" | "gpu-check" | "neon"), other, ..] => {
            return usage(&format!("`{command}` has no argument {other:?}"));
        }
        [other, ..] => return usage(&format!("there is no command {other:?}")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn usage(problem: &str) -> ExitCode {
    eprint!("xtask: {problem}\n\n{HELP}");
    ExitCode::from(2)
}

/// The workspace's folder.
fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask is a folder of the workspace")
}

/// Where this very build went: `<target>/debug/xtask` is the running program.
fn target_folder() -> Result<PathBuf> {
    let program = std::env::current_exe().context("the path of this program")?;
    let target = program.parent().and_then(Path::parent).context("this program is not in a target folder")?;
    Ok(target.to_owned())
}

/// The cargo that runs this, with a `protoc` for build scripts, in the workspace's folder.
fn cargo(args: &[&str]) -> Result<Command> {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(args).current_dir(root()).env("PROTOC", protoc()?);
    Ok(cargo)
}

/// Takes from `command` what this program's caller set for Sirocco's programs, but for what `command` sets itself.
fn without_settings(command: &mut Command) -> &mut Command {
    let own: Vec<std::ffi::OsString> = command.get_envs().map(|(name, _)| name.to_owned()).collect();
    for (name, _) in std::env::vars_os() {
        if name.as_encoded_bytes().starts_with(b"SIROCCO_") && !own.contains(&name) {
            command.env_remove(name);
        }
    }
    command
}

/// The vendored `protoc`, made executable: some ways of unpacking a crate drop the permission.
fn protoc() -> Result<PathBuf> {
    use std::os::unix::fs::PermissionsExt as _;
    let path = protoc_bin_vendored::protoc_bin_path().context("no protoc is vendored for this machine")?;
    let mut permissions = path.metadata().with_context(|| format!("{}", path.display()))?.permissions();
    if permissions.mode() & 0o111 == 0 {
        permissions.set_mode(permissions.mode() | 0o755);
        std::fs::set_permissions(&path, permissions).with_context(|| format!("make {} executable", path.display()))?;
    }
    Ok(path)
}
