//! How requests are served when clients leave, queues fill and nodes die, and what of them is logged.

use rustix::process::Signal;
use serde_json::{Value, json};
use sirocco_testkit::cluster::{Cluster, Setup};
use sirocco_testkit::etcd::Etcd;
use sirocco_testkit::process::Process;
use sirocco_testkit::{repository, wait_for};

use super::client::{Answer, ask, post, send};
use crate::support::goldens;

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

/// A completion that goes on for as long as the context allows.
fn endless() -> Value {
    json!({"prompt": "x", "max_tokens": 2000, "ignore_eos": true, "stream": true})
}

/// A cluster of one router and one coordinator.
pub(crate) fn start(etcd: &Etcd, name: &str, envs: &[(&str, &str)]) -> Cluster {
    let demo = repository("models/demo");
    let models = std::slice::from_ref(&demo);
    let setup = Setup { name, router_model: &demo, models, coordinators: 1, routers: 1, envs };
    Cluster::start_with(&etcd.endpoint(), &setup).unwrap()
}

/// Waits until the router has logged `count` lines with `part`.
pub(crate) fn wait_for_log(cluster: &Cluster, part: &str, count: usize) {
    let log = &cluster.routers[0].process;
    wait_for(&format!("{part:?} in the log, {count} times"), || {
        Ok((log.stderr().matches(part).count() >= count).then_some(()))
    })
    .unwrap();
}

#[test]
fn a_client_that_leaves_frees_the_engine() {
    let etcd = Etcd::start().unwrap();
    let envs = [("RUST_LOG", "debug"), ("SIROCCO_MAX_SEQUENCES", "1")];
    let cluster = start(&etcd, "leaving", &envs);
    let http = &cluster.routers[0].http;
    let mut stream = post(http, COMPLETIONS, &endless());
    assert!(stream.event().is_some());
    drop(stream);
    // Only a sequence that has not ended by itself is left by its client.
    wait_for_log(&cluster, "its client has left", 1);
    let whole = json!({"prompt": "x", "max_tokens": 2000, "ignore_eos": true});
    let waiting = send(http, "POST", COMPLETIONS, "", whole.to_string().as_bytes());
    wait_for_log(&cluster, "accepted", 2);
    drop(waiting);
    wait_for_log(&cluster, "its client has left", 2);
    assert_eq!(ask(http, COMPLETIONS, &json!({"prompt": "x", "max_tokens": 4}))["usage"]["completion_tokens"], 4);
}

#[test]
fn a_full_queue_is_refused_and_says_when_to_come_back() {
    let etcd = Etcd::start().unwrap();
    let envs = [("RUST_LOG", "debug"), ("SIROCCO_MAX_SEQUENCES", "1"), ("SIROCCO_MAX_QUEUE", "1")];
    let cluster = start(&etcd, "full", &envs);
    let http = &cluster.routers[0].http;
    let mut running = post(http, COMPLETIONS, &endless());
    assert!(running.event().is_some());
    let short = json!({"prompt": "x", "max_tokens": 4});
    let waiting = send(http, "POST", COMPLETIONS, "", short.to_string().as_bytes());
    wait_for_log(&cluster, "accepted", 2);
    let refused = post(http, COMPLETIONS, &short);
    assert_eq!((refused.status, refused.header("retry-after")), (429, Some("1")));
    let error = &refused.json()["error"];
    assert_eq!((&error["type"], &error["code"]), (&json!("rate_limit_error"), &json!("queue_full")));
    assert!(error["message"].as_str().unwrap().contains("the queue of 1 requests is full"), "{error}");
    let never = post(http, COMPLETIONS, &json!({"prompt": "x", "n": 2}));
    assert_eq!((never.status, &never.json()["error"]["param"]), (400, &json!("n")));
    drop(running);
    assert_eq!(Answer::of(waiting).json()["usage"]["completion_tokens"], 4);
}

#[test]
fn a_failure_in_mid_stream_is_an_event_and_one_before_it_a_status() {
    let etcd = Etcd::start().unwrap();
    let mut cluster = start(&etcd, "dying", &[("SIROCCO_EXPERT_TIMEOUT_S", "1")]);
    let http = cluster.routers[0].http.clone();
    let mut stream = post(&http, COMPLETIONS, &endless());
    assert!(stream.event().is_some());
    cluster.experts[0].process.kill().unwrap();
    let last = std::iter::from_fn(|| stream.event()).last().unwrap();
    let error = &serde_json::from_str::<Value>(&last).unwrap()["error"];
    assert_eq!((&error["type"], &error["code"]), (&json!("server_error"), &json!("unavailable")));

    let refused = post(&http, COMPLETIONS, &json!({"prompt": "x", "stream": true}));
    assert_eq!((refused.status, refused.header("retry-after")), (503, Some("5")));
    assert_eq!(refused.json()["error"]["code"], "unavailable");
}

#[test]
fn a_router_that_is_not_ready_says_so() {
    let etcd = Etcd::start().unwrap();
    let demo = repository("models/demo");
    let any = ["--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0"];
    let args = ["--id", "r", "--etcd", &etcd.endpoint(), "--model", demo.to_str().unwrap()];
    let mut router = Process::start("router-node", &[&args[..], &any].concat(), &[]).unwrap();
    let listens = router.wait_for_line("listening ").unwrap();
    let http = listens.split(' ').find_map(|field| field.strip_prefix("http=")).unwrap();
    let refused = post(http, COMPLETIONS, &json!({"prompt": "x"}));
    assert_eq!((refused.status, refused.header("retry-after")), (503, Some("5")));
    let message = refused.json()["error"]["message"].as_str().unwrap().to_owned();
    assert!(message.contains("no placement serves yet"), "{message}");
}

#[test]
fn a_router_that_is_stopped_finishes_its_streams() {
    let etcd = Etcd::start().unwrap();
    let mut cluster = start(&etcd, "stopping", &[]);
    let body = json!({"prompt": "x", "max_tokens": 300, "ignore_eos": true, "stream": true, "return_token_ids": true});
    let mut stream = post(&cluster.routers[0].http, COMPLETIONS, &body);
    assert!(stream.event().is_some());
    cluster.routers[0].process.signal(Signal::TERM).unwrap();
    let pieces = stream.pieces();
    assert_eq!(pieces.last().unwrap()["choices"][0]["finish_reason"], "length");
    let tokens = pieces.iter().filter(|piece| piece["choices"][0]["token_ids"] != json!([])).count();
    assert_eq!(tokens, 299);
    assert!(cluster.routers[0].process.wait().unwrap().success(), "{}", cluster.routers[0].process.stderr());
}

#[test]
fn debug_logs_show_nothing_that_came_or_went_over_http() {
    let golden = &goldens()[2];
    let etcd = Etcd::start().unwrap();
    let cluster = start(&etcd, "discreet", &[("RUST_LOG", "debug")]);
    let http = &cluster.routers[0].http;
    let body = json!({"prompt": golden.prompt, "max_tokens": 48, "temperature": 0});
    assert_eq!(ask(http, COMPLETIONS, &body)["choices"][0]["text"], golden.greedy_text.as_str());
    let messages = json!([{"role": "user", "content": golden.prompt}]);
    let chat = json!({"messages": messages, "max_tokens": 48, "temperature": 0, "stream": true});
    assert!(post(http, CHAT, &chat).pieces().len() > 2);
    assert_eq!(post(http, COMPLETIONS, &json!({"prompt": golden.prompt, "temperature": 9})).status, 400);
    assert_eq!(post(http, COMPLETIONS, &json!({"prompt": {golden.prompt.clone(): 1}})).status, 400);

    let log = cluster.routers[0].process.stderr();
    assert!(log.contains("over HTTP"), "the router logs at debug");
    let ids = golden.greedy_ids[..6].iter().map(ToString::to_string).collect::<Vec<_>>();
    let secrets = [golden.prompt.as_str(), &golden.greedy_text[..20], &ids.join(", "), &ids.join(",")];
    for secret in secrets {
        assert!(!log.contains(secret), "{secret:?} is logged");
    }
}
