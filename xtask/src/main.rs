//! Builds, runs and tests Sirocco: `cargo xtask up | test`. Needs Rust and, for the tests, Debian's apt or an etcd.
#![forbid(unsafe_code)]

mod etcd;

use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context as _, Result, bail};

const USAGE: &str = "\
Usage: cargo xtask COMMAND

Commands:
  up [ARGS]   Build a release and run `sirocco up ARGS`: a whole cluster, by default with the bundled model
  test        Run every check: format, lints, unit, integration and end-to-end tests with a real etcd, docs
  help        Print this

`up --help` lists the arguments of `sirocco up`. `test` uses the etcd that SIROCCO_ETCD_BIN names or PATH has, else it
installs Debian's etcd-server.";

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let result = match args.next().as_deref() {
        Some("up") => up(args.collect()),
        Some("test") => test(),
        Some("help" | "--help" | "-h") => {
            println!("{USAGE}");
            Ok(())
        }
        other => {
            let problem = other.map_or("no command".to_owned(), |other| format!("unknown command {other:?}"));
            eprintln!("xtask: {problem}\n\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Builds a release and becomes `sirocco up`.
fn up(args: Vec<String>) -> Result<()> {
    // The build's words go to standard error, so that standard output is the program's alone.
    cargo(&["build", "--release", "--workspace", "--bins", "--exclude", "xtask", "--exclude", "sirocco-testkit"])?;
    let program = target_directory()?.join("release/sirocco");
    let error = Command::new(&program).arg("up").args(args).exec();
    Err(error).with_context(|| format!("cannot run {}", program.display()))
}

/// Runs every check, one after the other, and stops at the first that fails.
fn test() -> Result<()> {
    let started = Instant::now();
    let etcd = etcd::find_or_install()?;
    let checks: [(&str, &[&str]); 5] = [
        ("format", &["fmt", "--all", "--check"]),
        ("lints", &["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]),
        ("programs", &["build", "--workspace", "--bins"]),
        ("tests", &["test", "--workspace"]),
        ("docs", &["doc", "--workspace", "--no-deps"]),
    ];
    for (name, args) in checks {
        let start = Instant::now();
        let mut command = command(args)?;
        command.env("SIROCCO_ETCD_BIN", &etcd.server).env("SIROCCO_ETCDCTL_BIN", &etcd.client);
        command.env("RUSTDOCFLAGS", "-D warnings");
        run(command)?;
        eprintln!("xtask: {name} passed in {:.0} s", start.elapsed().as_secs_f64());
    }
    eprintln!("xtask: everything passed in {:.0} s", started.elapsed().as_secs_f64());
    Ok(())
}

fn cargo(args: &[&str]) -> Result<()> {
    run(command(args)?)
}

/// Cargo with the protobuf compiler that etcd-client's build script asks for.
fn command(args: &[&str]) -> Result<Command> {
    let protoc = protoc_bin_vendored::protoc_bin_path().context("no protoc for this machine")?;
    let mut permissions = std::fs::metadata(&protoc)?.permissions();
    if permissions.mode() & 0o111 == 0 {
        permissions.set_mode(0o755);
        std::fs::set_permissions(&protoc, permissions)?;
    }
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command
        .args(args)
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
        .env("PROTOC", protoc)
        .stdin(Stdio::null());
    Ok(command)
}

fn run(mut command: Command) -> Result<()> {
    let words: Vec<String> = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| word.to_string_lossy().into_owned())
        .collect();
    let status = command.status().with_context(|| format!("cannot run {}", words[0]))?;
    if !status.success() {
        bail!("`cargo {}` failed ({status})", words[1..].join(" "));
    }
    Ok(())
}

/// Where builds go: this very program is `<target>/debug/xtask`.
fn target_directory() -> Result<PathBuf> {
    let program = std::env::current_exe()?;
    let target = program.parent().and_then(Path::parent).context("xtask is not in a target folder")?;
    Ok(target.to_owned())
}
