//! The `sirocco` command as a person uses it: one clear message and the right exit status for everything that can go wrong.

use crate::support::goldens;
use rustix::process::Signal;
use serde_json::Value;
use sirocco_testkit::etcd::Etcd;
use sirocco_testkit::process::Process;
use sirocco_testkit::repository;

/// Runs `sirocco` to its end: exit status, standard output, standard error.
pub(crate) fn sirocco(args: &[&str]) -> (Option<i32>, String, String) {
    let mut process = Process::start("sirocco", args, &[]).unwrap();
    let status = process.wait().unwrap();
    (status.code(), process.stdout(), process.stderr())
}

/// A cluster in one process, on free ports: the process, the router's and the coordinator's address.
pub(crate) fn up(args: &[&str]) -> (Process, String, String) {
    let free = ["--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0"];
    let coordinator = ["--coordinator-grpc", "127.0.0.1:0", "--coordinator-http", "127.0.0.1:0"];
    let mut process = Process::start("sirocco", &[&["up"], args, &free, &coordinator].concat(), &[]).unwrap();
    process.wait_for_line("ready").unwrap();
    let table = process.stdout();
    let address = |role: &str| {
        let line = table.lines().find(|line| line.split_whitespace().nth(1) == Some(role)).unwrap();
        line.split_whitespace().nth(3).unwrap().to_owned()
    };
    let (router, coordinator) = (address("router"), address("coordinator"));
    (process, router, coordinator)
}

#[test]
fn one_prompt_through_a_cluster_in_one_process() {
    let golden = &goldens()[3];
    let (code, stdout, stderr) =
        sirocco(&["up", "--prompt", &golden.prompt, "--max-tokens", "48", "--temperature", "0"]);
    assert_eq!(code, Some(0), "{stderr}");
    assert_eq!(stdout, format!("{}\n", golden.greedy_text));
}

#[test]
fn one_prompt_through_a_cluster_of_processes_on_etcd() {
    let golden = &goldens()[8];
    let etcd = Etcd::start().unwrap();
    let (code, stdout, stderr) = sirocco(&[
        "up",
        "--processes",
        "--etcd",
        &etcd.endpoint(),
        "--expert-nodes",
        "3",
        "--routers",
        "2",
        "--prompt",
        &golden.prompt,
        "--max-tokens",
        "48",
        "--temperature",
        "0",
    ]);
    assert_eq!(code, Some(0), "{stderr}");
    assert_eq!(stdout, format!("{}\n", golden.greedy_text));
}

#[test]
fn a_running_cluster_answers_and_drains() {
    let golden = &goldens()[6];
    let (mut process, router, coordinator) = up(&["--expert-nodes", "3"]);
    let json = |args: &[&str]| -> Value {
        let (code, stdout, stderr) = sirocco(&[args, &["-o", "json"]].concat());
        assert_eq!(code, Some(0), "{stderr}");
        serde_json::from_str(&stdout).unwrap()
    };
    let ask = |command: &[&str]| json(&[command, &["--coordinator", &coordinator]].concat());

    let ids = golden.input_ids.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    let by_ids = ["generate", "--router", &router, "--prompt-ids", &ids, "--max-tokens", "48", "--temperature", "0"];
    let completion = json(&by_ids);
    assert_eq!(completion["text"], golden.greedy_text.as_str());
    assert_eq!(completion["token_ids"], serde_json::to_value(&golden.greedy_ids).unwrap());
    assert_eq!(
        (&completion["finish_reason"], &completion["usage"]["completion_tokens"]),
        (&"length".into(), &48.into())
    );

    assert_eq!(ask(&["status"])["state"], "serving");
    assert_eq!(ask(&["nodes"]).as_array().unwrap().len(), 5);
    assert_eq!(ask(&["experts", "--layer", "2"]).as_array().unwrap().len(), 8);
    assert_eq!(ask(&["placement", "show"])["layers"].as_array().unwrap().len(), 4);
    let (_, yaml, _) = sirocco(&["status", "-o", "yaml", "--coordinator", &coordinator]);
    assert!(yaml.contains("state: serving"), "{yaml}");

    process.signal(Signal::TERM).unwrap();
    assert_eq!(process.wait().unwrap().code(), Some(0), "{}", process.stderr());
}

#[test]
fn sampling_is_repeatable_and_stops_where_told() {
    let (_process, router, _) = up(&["--expert-nodes", "2"]);
    let generate = |flags: &[&str]| {
        let args = [&["generate", "Il nome del file", "--router", &router, "--max-tokens", "24"], flags].concat();
        let (code, stdout, stderr) = sirocco(&args);
        assert_eq!(code, Some(0), "{stderr}");
        stdout
    };
    let drawn = generate(&["--seed", "7", "--top-p", "0.9"]);
    assert_eq!(generate(&["--seed", "7", "--top-p", "0.9"]), drawn);
    assert_ne!(generate(&["--seed", "8", "--top-p", "0.9"]), drawn);
    let greedy = generate(&["--temperature", "0"]);
    let stop = &greedy[greedy.len() / 2..greedy.len() / 2 + 3];
    assert_eq!(
        generate(&["--temperature", "0", "--stop", stop]).trim_end_matches('\n'),
        &greedy[..greedy.find(stop).unwrap()]
    );
}

#[test]
fn bad_requests_are_refused_with_the_field_and_the_limit() {
    let (_process, router, _) = up(&["--expert-nodes", "1"]);
    let long = "word ".repeat(3000);
    let empty_stop = ["--stop", ""];
    let cases: [(&str, &[&str], &[&str]); 8] = [
        ("x", &["--temperature", "-1"], &["temperature", "-1", "from 0 to 2"]),
        ("x", &["--temperature", "nan"], &["temperature", "NaN", "from 0 to 2"]),
        ("x", &["--top-p", "1.5"], &["top_p", "1.5", "from 0 to 1"]),
        ("x", &["--repetition-penalty", "0"], &["repetition_penalty", "0.01 to 10"]),
        ("x", &["--max-tokens", "0"], &["max_tokens", "at least 1"]),
        ("x", &empty_stop, &["stop", "must not be empty"]),
        ("", &[], &["text", "empty"]),
        (&long, &[], &["prompt", "tokens long", "2048"]),
    ];
    for (prompt, flags, parts) in cases {
        let (code, _, stderr) = sirocco(&[&["generate", prompt, "--router", &router], flags].concat());
        assert_eq!(code, Some(1), "{stderr}");
        for part in parts {
            assert!(stderr.contains(part), "{stderr:?} does not say {part:?}");
        }
    }
    let (code, _, stderr) = sirocco(&["generate", "--prompt-ids", "5,4096", "--router", &router]);
    assert_eq!(code, Some(1));
    assert!(stderr.contains("token_ids") && stderr.contains("4096"), "{stderr}");
}

#[test]
fn exit_statuses_tell_what_went_wrong() {
    let demo = repository("models/demo");
    let weights = demo.join("model.safetensors");
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = port.local_addr().unwrap().to_string();
    let cases: [(&[&str], i32, &str); 8] = [
        (&["generate", "x", "--router", "127.0.0.1:1"], 3, "127.0.0.1:1"),
        (&["status", "--coordinator", "127.0.0.1:1"], 3, "127.0.0.1:1"),
        (&["up", "--prompt", "x", "--http", &taken], 1, "the port is in use"),
        (&["up", "--prompt", "x", "--model", "/nonexistent"], 1, "/nonexistent"),
        (&["model", "inspect", weights.to_str().unwrap()], 1, "not a folder"),
        (&["up", "--expert-nodes", "0"], 2, "--expert-nodes"),
        (&["frobnicate"], 2, "frobnicate"),
        (&["--config", "/nonexistent.toml", "status"], 2, "/nonexistent.toml"),
    ];
    for (args, expected, part) in cases {
        let (code, _, stderr) = sirocco(args);
        assert_eq!(code, Some(expected), "{args:?}: {stderr}");
        assert!(stderr.contains(part), "{args:?}: {stderr}");
        assert!(!stderr.contains("panicked"), "{args:?}: {stderr}");
    }
}
