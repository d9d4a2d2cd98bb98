//! Public clients, unmodified and pinned, against real clusters: tests/clients has what is installed and a script for each.
//!
//! They are installed from their registries, once for each set of versions. A client that cannot be had is a failure that says so,
//! never a skip.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use sirocco_testkit::etcd::Etcd;
use sirocco_testkit::process::Process;
use sirocco_testkit::repository;

use crate::openai::{cluster, start};

/// Longest time that a registry may take for all of its clients.
const INSTALLING: Duration = Duration::from_mins(4);
/// Longest time for one script.
const RUNNING: Duration = Duration::from_mins(2);

/// The program that `variable` names, else `name` on the path.
fn program(variable: &str, name: &str) -> PathBuf {
    std::env::var_os(variable).map_or_else(|| name.into(), PathBuf::from)
}

fn python() -> PathBuf {
    program("SIROCCO_PYTHON_BIN", "python3")
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Runs a program to its end, which must be a good one, and returns what it printed.
fn succeed(program: &Path, args: &[&str], envs: &[(&str, &str)], patience: Duration) -> String {
    let what = format!("{} {}", program.display(), args.join(" "));
    let mut process = Process::start_at(program, args, envs).unwrap_or_else(|error| panic!("{what}: {error:#}"));
    let status = process.wait_at_most(patience);
    let printed = format!("{}{}", process.stdout(), process.stderr());
    let status = status.unwrap_or_else(|error| panic!("{what}: {error:#}\n{printed}"));
    assert!(status.success(), "{what} ended with {status}:\n{printed}");
    process.stdout()
}

/// The folder of what `install` puts into a new one, made once for each set of `pins`.
fn installed(name: &str, pins: &[&str], install: impl FnOnce(&Path)) -> PathBuf {
    let mut hasher = DefaultHasher::new();
    pins.hash(&mut hasher);
    let folders = Path::new(env!("CARGO_TARGET_TMPDIR")).join("clients");
    let folder = folders.join(format!("{name}-{:016x}", hasher.finish()));
    if !folder.is_dir() {
        std::fs::create_dir_all(&folders).unwrap();
        // What is not whole does not get the name.
        let new = tempfile::tempdir_in(&folders).unwrap();
        install(new.path());
        std::fs::rename(new.keep(), &folder).unwrap();
    }
    folder
}

/// The interpreter that has Python's clients.
fn python_with_clients() -> &'static Path {
    static INTERPRETER: OnceLock<PathBuf> = OnceLock::new();
    INTERPRETER.get_or_init(|| {
        let requirements = repository("tests/clients/requirements.txt");
        let version = succeed(&python(), &["--version"], &[], INSTALLING);
        let pins = std::fs::read_to_string(&requirements).unwrap();
        let folder = installed("python", &[&version, &pins], |folder| {
            succeed(&python(), &["-m", "venv", text(folder)], &[], INSTALLING);
            let quiet =
                ["-m", "pip", "install", "--quiet", "--no-input", "--no-cache-dir", "--disable-pip-version-check"];
            let args = [&quiet[..], &["--no-deps", "--requirement", text(&requirements)]].concat();
            succeed(&folder.join("bin/python"), &args, &[], INSTALLING);
        });
        folder.join("bin/python")
    })
}

/// The folder of Node's clients.
fn node_modules() -> PathBuf {
    let files = ["package.json", "package-lock.json"].map(|file| repository("tests/clients").join(file));
    let pins = files.each_ref().map(|file| std::fs::read_to_string(file).unwrap());
    let folder = installed("node", &pins.each_ref().map(String::as_str), |folder| {
        for file in &files {
            std::fs::copy(file, folder.join(file.file_name().unwrap())).unwrap();
        }
        let args = ["ci", "--prefix", text(folder), "--ignore-scripts", "--no-audit", "--no-fund"];
        succeed(&program("SIROCCO_NPM_BIN", "npm"), &args, &[], INSTALLING);
    });
    folder.join("node_modules")
}

/// Runs a script of tests/clients against the router at `http` and `grpc`.
fn check(interpreter: &Path, script: &str, envs: &[(&str, &str)], http: &str, grpc: &str) {
    let (script, goldens) = (repository("tests/clients").join(script), repository("tests/data/demo/golden.json"));
    let printed = succeed(interpreter, &[text(&script), http, grpc, text(&goldens)], envs, RUNNING);
    let last = printed.lines().last().unwrap_or_default();
    assert!(last.ends_with(" checks passed"), "{printed}");
}

fn check_python(script: &str) {
    let interpreter = python_with_clients();
    let (_process, grpc, http) = cluster(&[]);
    check(interpreter, script, &[("PYTHONDONTWRITEBYTECODE", "1")], &http, &grpc);
}

#[test]
fn openais_python_client_gets_whole_answers_and_errors() {
    check_python("openai_whole.py");
}

#[test]
fn openais_python_client_streams() {
    check_python("openai_streams.py");
}

#[test]
fn openais_python_client_comes_back_when_the_queue_was_full() {
    let interpreter = python_with_clients();
    let etcd = Etcd::start().unwrap();
    let cluster = start(&etcd, "patient", &[("SIROCCO_MAX_SEQUENCES", "1"), ("SIROCCO_MAX_QUEUE", "1")]);
    let router = &cluster.routers[0];
    check(interpreter, "openai_queue.py", &[("PYTHONDONTWRITEBYTECODE", "1")], &router.http, &router.grpc);
}

#[test]
fn python_clients_call_tools_and_get_structures() {
    check_python("tools.py");
}

#[test]
fn mistrals_python_client_chats() {
    check_python("mistral.py");
}

#[test]
fn langchain_chats_and_completes() {
    check_python("langchain_chats.py");
}

#[test]
fn grpcio_needs_only_reflection() {
    check_python("grpcio.py");
}

#[test]
fn grpcurl_needs_only_reflection() {
    check_python("grpcurl.py");
}

#[test]
fn openais_node_client_chats_completes_and_aborts() {
    let modules = node_modules();
    let (_process, grpc, http) = cluster(&[]);
    let node = program("SIROCCO_NODE_BIN", "node");
    check(&node, "openai_node.cjs", &[("NODE_PATH", text(&modules))], &http, &grpc);
}
