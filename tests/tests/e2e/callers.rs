//! Who may call a router, what they may take and for how long, over both APIs.

use std::io::Write as _;
use std::net::TcpStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sirocco_proto::channel;
use sirocco_proto::inference::InferenceServiceClient;
use sirocco_proto::tonic::{Code, Request, Response, Status, Streaming};
use sirocco_proto::wire::inference as wire;
use sirocco_proto::wire::inference::generate_response::Event;
use sirocco_testkit::cluster::{Cluster, Setup};
use sirocco_testkit::etcd::Etcd;
use sirocco_testkit::{PATIENCE, repository, wait_for};

use crate::commands::sirocco;
use crate::openai::client::{Answer, cluster, post, send};
use crate::support::greedy;

const COMPLETIONS: &str = "/v1/completions";

/// Has `sirocco keys create` make a key in `file`.
fn create(file: &Path, name: &str) -> String {
    let (code, stdout, stderr) = sirocco(&["keys", "create", name, "--file", file.to_str().unwrap()]);
    assert_eq!(code, Some(0), "{stderr}");
    stdout.trim_end().to_owned()
}

/// Adds a line to the last entry of `file`.
fn add(file: &Path, line: &str) {
    let mut file = std::fs::OpenOptions::new().append(true).open(file).unwrap();
    writeln!(file, "{line}").unwrap();
}

/// Posts JSON with an API key.
fn post_as(key: &str, http: &str, body: &Value) -> Answer {
    let headers = format!("content-type: application/json\r\nauthorization: Bearer {key}\r\n");
    Answer::of(send(http, "POST", COMPLETIONS, &headers, body.to_string().as_bytes()))
}

fn short() -> Value {
    json!({"prompt": "x", "max_tokens": 1})
}

/// A completion that goes on for as long as the context allows.
fn endless() -> Value {
    json!({"prompt": "x", "max_tokens": 2000, "ignore_eos": true, "stream": true})
}

fn endless_grpc() -> wire::GenerateRequest {
    wire::GenerateRequest { ignore_eos: true, ..greedy("x", 2000) }
}

async fn generate(
    grpc: &str,
    request: wire::GenerateRequest,
    metadata: &[(&'static str, &str)],
) -> Result<Response<Streaming<wire::GenerateResponse>>, Status> {
    let mut client = InferenceServiceClient::new(channel::connect(grpc).await.unwrap());
    let mut request = Request::new(request);
    for (key, value) in metadata {
        request.metadata_mut().insert(*key, value.parse().unwrap());
    }
    client.generate(request).await
}

/// The status in which a completion ends that must not end well, and how many tokens came before.
async fn end(mut stream: Streaming<wire::GenerateResponse>) -> (Status, usize) {
    let mut tokens = 0;
    loop {
        match stream.message().await {
            Ok(Some(response)) => tokens += usize::from(matches!(response.event, Some(Event::Token(_)))),
            Ok(None) => panic!("it ended well"),
            Err(status) => return (status, tokens),
        }
    }
}

fn start(etcd: &Etcd, name: &str, envs: &[(&str, &str)]) -> Cluster {
    let demo = repository("models/demo");
    let models = std::slice::from_ref(&demo);
    let setup = Setup { name, router_model: &demo, models, coordinators: 1, routers: 1, envs };
    Cluster::start_with(&etcd.endpoint(), &setup).unwrap()
}

fn error(answer: Answer) -> Value {
    answer.json()["error"].clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn only_callers_with_a_good_key_are_served() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keys.toml");
    let (ada, eve) = (create(&file, "ada"), create(&file, "eve"));
    add(&file, "expires = \"2020-01-01T00:00:00Z\"");
    let bob = create(&file, "bob");
    let path = file.to_str().unwrap();
    let (process, grpc, http) = cluster(&["--api-keys", path]);

    for (answer, part) in [
        (post(&http, COMPLETIONS, &short()), "no API key"),
        (post_as("sk-sirocco-0", &http, &short()), "not valid"),
        (post_as(&eve, &http, &short()), "expired at 2020"),
        (Answer::of(send(&http, "GET", "/v1/models", "", b"")), "no API key"),
    ] {
        assert_eq!((answer.status, answer.header("www-authenticate")), (401, Some("Bearer")));
        assert!(answer.header("x-request-id").is_some());
        let error = error(answer);
        assert_eq!((&error["code"], &error["type"]), (&json!("invalid_api_key"), &json!("invalid_request_error")));
        assert!(error["message"].as_str().unwrap().contains(part), "{error}");
    }
    for path in ["/live", "/ready", "/health"] {
        assert_eq!(Answer::of(send(&http, "GET", path, "", b"")).status, 200);
    }
    let bearer = format!("Bearer {ada}");
    for metadata in [&[][..], &[("authorization", "Bearer sk-sirocco-0")]] {
        let status = generate(&grpc, greedy("x", 1), metadata).await.unwrap_err();
        assert_eq!(status.code(), Code::Unauthenticated);
        assert!(status.metadata().contains_key("x-request-id"));
    }
    assert!(generate(&grpc, greedy("x", 1), &[("authorization", &bearer)]).await.is_ok());
    let (code, _, stderr) = sirocco(&["generate", "x", "--router", &grpc, "--max-tokens", "1", "--api-key", &bob]);
    assert_eq!(code, Some(0), "{stderr}");

    assert_eq!((post_as(&ada, &http, &short()).status, post_as(&bob, &http, &short()).status), (200, 200));
    assert_eq!(sirocco(&["keys", "revoke", "ada", "--file", path]).0, Some(0));
    wait_for("the revoked key to be refused", || Ok((post_as(&ada, &http, &short()).status == 401).then_some(())))
        .unwrap();
    std::fs::write(&file, "[[key]]\nname = \"bob\"").unwrap();
    wait_for("the broken file to be noticed", || Ok(process.stderr().contains("missing field `hash`").then_some(())))
        .unwrap();
    assert_eq!(post_as(&bob, &http, &short()).status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rate_is_refused_until_the_time_it_says() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keys.toml");
    let ada = create(&file, "ada");
    add(&file, "requests_per_minute = 12");
    let bob = create(&file, "bob");
    add(&file, "tokens_per_minute = 20");
    let carol = create(&file, "carol");
    add(&file, "tokens_per_minute = 21");
    let (_process, grpc, http) = cluster(&["--api-keys", file.to_str().unwrap()]);

    let first = post_as(&ada, &http, &short());
    assert_eq!((first.status, first.header("x-ratelimit-limit-requests")), (200, Some("12")));
    assert_eq!(first.header("x-ratelimit-remaining-requests"), Some("11"));
    assert!(first.header("x-ratelimit-reset-requests").is_some());
    let refused =
        std::iter::repeat_with(|| post_as(&ada, &http, &short())).find(|answer| answer.status != 200).unwrap();
    let now = Instant::now();
    let wait: u64 = refused.header("retry-after").unwrap().parse().unwrap();
    assert!(refused.status == 429 && (1..=5).contains(&wait), "{wait}");
    let problem = error(refused);
    assert_eq!((&problem["code"], &problem["type"]), (&json!("rate_limit_exceeded"), &json!("rate_limit_error")));
    assert!(problem["message"].as_str().unwrap().contains("12 requests a minute"), "{problem}");
    let status = generate(&grpc, greedy("x", 1), &[("authorization", &format!("Bearer {ada}"))]).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert!(status.metadata().contains_key("retry-after"));
    assert_eq!(post_as(&bob, &http, &short()).status, 200);
    wait_for("another request to be let in", || Ok((post_as(&ada, &http, &short()).status == 200).then_some(())))
        .unwrap();
    let waited = now.elapsed();
    assert!(waited <= Duration::from_secs(wait + 1), "{waited:?}, not {wait} s");

    // What one answer takes beyond the limit is waited for before the next one.
    assert_eq!(post_as(&bob, &http, &json!({"prompt": "x", "n": 2, "max_tokens": 16, "ignore_eos": true})).status, 200);
    let refused = post_as(&bob, &http, &short());
    assert_eq!((refused.status, refused.header("x-ratelimit-remaining-tokens")), (429, Some("0")));
    let message = error(refused)["message"].as_str().unwrap().to_owned();
    assert!(message.contains("20 tokens a minute"), "{message}");
    let never = post_as(&carol, &http, &json!({"prompt": vec![5; 11], "n": 2}));
    assert_eq!(never.status, 400);
    let message = error(never)["message"].as_str().unwrap().to_owned();
    assert!(message.contains("22 tokens with all choices, carol may use 21"), "{message}");
}

#[test]
fn a_place_is_free_again_when_the_client_leaves_in_mid_stream() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keys.toml");
    let ada = create(&file, "ada");
    add(&file, "concurrent_requests = 1");
    let (_process, _, http) = cluster(&["--api-keys", file.to_str().unwrap()]);
    let mut stream = post_as(&ada, &http, &endless());
    assert!(stream.event().is_some());
    let refused = post_as(&ada, &http, &short());
    assert_eq!((refused.status, refused.header("retry-after")), (429, Some("1")));
    let message = error(refused)["message"].as_str().unwrap().to_owned();
    assert!(message.contains("1 requests at once"), "{message}");
    drop(stream);
    wait_for("the place to be free", || Ok((post_as(&ada, &http, &short()).status == 200).then_some(()))).unwrap();
    assert_eq!(post_as(&ada, &http, &short()).status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_is_kept_in_the_queue_and_in_mid_stream() {
    let etcd = Etcd::start().unwrap();
    let envs = [("RUST_LOG", "debug"), ("SIROCCO_MAX_SEQUENCES", "1"), ("SIROCCO_REQUEST_TIMEOUT_S", "3")];
    let cluster = start(&etcd, "deadlines", &envs);
    let (grpc, http) = (&cluster.routers[0].grpc, &cluster.routers[0].http);
    let with = |mut body: Value, fields: &Value| {
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        body
    };

    // In mid-stream, by the request's own time over HTTP, then by the call's and the field's over gRPC.
    let mut stream = post(http, COMPLETIONS, &with(endless(), &json!({"timeout": 0.4})));
    let events: Vec<String> = std::iter::from_fn(|| stream.event()).collect();
    let last: Value = serde_json::from_str(events.last().unwrap()).unwrap();
    assert!(events.len() > 1 && last["error"]["code"] == "timeout", "{last}");
    assert!(last["error"]["message"].as_str().unwrap().contains("0.4 s"), "{last}");
    let field = wire::GenerateRequest { timeout_ms: Some(400), ..endless_grpc() };
    for (request, metadata) in [(endless_grpc(), &[("grpc-timeout", "400m")][..]), (field, &[])] {
        let stream = generate(grpc, request, metadata).await.unwrap().into_inner();
        let (status, tokens) = end(stream).await;
        assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
        assert!(tokens > 0);
    }

    // Behind a request that itself may take no longer than the router allows.
    let started = Instant::now();
    let mut long = post(http, COMPLETIONS, &with(endless(), &json!({"timeout": 1e9})));
    assert!(long.event().is_some());
    let refused = post(http, COMPLETIONS, &with(short(), &json!({"timeout": 0.2})));
    assert_eq!((refused.status, refused.header("x-should-retry")), (504, Some("false")));
    assert_eq!(error(refused)["code"], "timeout");
    let stream = generate(grpc, greedy("x", 1), &[("grpc-timeout", "200m")]).await.unwrap().into_inner();
    assert_eq!(end(stream).await.0.code(), Code::DeadlineExceeded);
    assert!(long.event().is_some(), "the long one still runs");
    let last = std::iter::from_fn(|| long.event()).last().unwrap();
    assert!(last.contains("its 3 s"), "{last}");
    assert!((3..20).contains(&started.elapsed().as_secs()), "{:?}", started.elapsed());
    wait_for("all sequences to leave the engine", || {
        let log = cluster.routers[0].process.stderr();
        let left = ["its client has left", "its time is over"].map(|line| log.matches(line).count());
        Ok((left.iter().sum::<usize>() == 6).then_some(()))
    })
    .unwrap();
    for bad in [json!(0), json!(-1)] {
        let refused = post(http, COMPLETIONS, &with(short(), &json!({"timeout": bad})));
        assert_eq!((refused.status, &error(refused)["param"]), (400, &json!("timeout")));
    }
    assert_eq!(post(http, COMPLETIONS, &with(short(), &json!({"priority": "low"}))).status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_asks_for_too_much_is_refused_with_the_field_the_value_and_the_limit() {
    let flags = ["--max-prompt-tokens", "8", "--max-choices", "2", "--max-completion-tokens", "5"];
    let more = ["--max-body-bytes", "1000", "--body-timeout-s", "1"];
    let (_process, grpc, http) = cluster(&[flags.as_slice(), &more].concat());
    let cases = [
        (json!({"prompt": vec![5; 9]}), "prompt", "9 tokens long, this router takes at most 8"),
        (json!({"prompt": "x", "n": 3}), "n", "3, must be from 1 to 2"),
        (json!({"prompt": ["x", "y", "z"]}), "prompt", "3 prompts with 1 choices each, there may be 2"),
        (json!({"prompt": "x", "max_tokens": 6}), "max_tokens", "6, this router generates at most 5"),
        (json!({"prompt": "x", "max_completion_tokens": 6}), "max_completion_tokens", "6, this router"),
        (json!({"prompt": "x", "priority": "urgent"}), "priority", "urgent"),
    ];
    for (body, param, part) in cases {
        let answer = post(&http, COMPLETIONS, &body);
        assert_eq!(answer.status, 400, "{body}");
        let error = error(answer);
        assert_eq!(error["param"], param);
        assert!(error["message"].as_str().unwrap().contains(part), "{error}");
    }
    // Who does not say how much gets what there is.
    let unsaid = post(&http, COMPLETIONS, &json!({"prompt": "x", "ignore_eos": true})).json();
    assert_eq!(unsaid["usage"]["completion_tokens"], 5);
    let long = post(&http, COMPLETIONS, &json!({"prompt": "x".repeat(1000)}));
    assert_eq!(long.status, 413);
    assert!(error(long)["message"].as_str().unwrap().contains("1000 bytes"));
    for request in
        [greedy("x", 6), wire::GenerateRequest { priority: 9, ..greedy("x", 1) }, greedy(&"word ".repeat(9), 1)]
    {
        assert_eq!(generate(&grpc, request, &[]).await.unwrap_err().code(), Code::InvalidArgument);
    }

    let mut slow = TcpStream::connect(&http).unwrap();
    slow.set_read_timeout(Some(PATIENCE)).unwrap();
    write!(slow, "POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{{").unwrap();
    let answer = Answer::of(slow);
    assert_eq!((answer.status, answer.header("connection")), (408, Some("close")));
    assert!(error(answer)["message"].as_str().unwrap().contains("within 1 s"));
}

#[tokio::test(flavor = "multi_thread")]
async fn debug_logs_name_callers_and_requests_and_show_no_key() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keys.toml");
    let ada = create(&file, "ada");
    let etcd = Etcd::start().unwrap();
    let cluster = start(&etcd, "keys", &[("RUST_LOG", "debug"), ("SIROCCO_API_KEYS", file.to_str().unwrap())]);
    let (grpc, http) = (&cluster.routers[0].grpc, &cluster.routers[0].http);
    assert_eq!(post_as(&ada, http, &short()).status, 200);
    let wrong = format!("{ada}0");
    assert_eq!(post_as(&wrong, http, &short()).status, 401);
    let bearer = format!("Bearer {ada}");
    let answer =
        generate(grpc, greedy("x", 1), &[("authorization", &bearer), ("x-request-id", "mine-7")]).await.unwrap();
    assert_eq!(answer.metadata().get("x-request-id").unwrap(), "mine-7");
    let started = answer.into_inner().message().await.unwrap().unwrap().event;
    assert!(matches!(&started, Some(Event::Started(started)) if started.request_id == "mine-7"), "{started:?}");
    assert_eq!(
        generate(grpc, greedy("x", 1), &[("authorization", &wrong)]).await.unwrap_err().code(),
        Code::Unauthenticated
    );

    let log = cluster.routers[0].process.stderr();
    for part in ["mine-7", "\"ada\"", "over HTTP", "over gRPC"] {
        assert!(log.contains(part), "{part} is not logged");
    }
    let text = std::fs::read_to_string(&file).unwrap();
    let hash = text.split("sha256:").nth(1).unwrap()[..64].to_owned();
    for secret in [&ada["sk-sirocco-".len()..], &hash] {
        assert!(!log.contains(&secret[..16]), "a key is logged");
    }
}

#[test]
fn keys_are_made_listed_and_revoked() {
    use std::os::unix::fs::PermissionsExt as _;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keys.toml");
    let path = file.to_str().unwrap();
    let (ada, bob) = (create(&file, "ada"), create(&file, "bob"));
    assert!(ada != bob && ada.starts_with("sk-sirocco-") && ada.len() == 75, "{ada}");
    assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    add(&file, "# what bob may do\nconcurrent_requests = 2");
    let text = std::fs::read_to_string(&file).unwrap();
    assert!(!text.contains(&ada));
    let (code, stdout, _) = sirocco(&["keys", "list", "--file", path, "-o", "json"]);
    let listed: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!((code, &listed[0]["name"], &listed[1]["concurrent_requests"]), (Some(0), &json!("ada"), &json!(2)));
    assert!(!stdout.contains("sha256"));

    let (code, stdout, _) = sirocco(&["keys", "create", "carol"]);
    assert!(code == Some(0) && stdout.contains("name = \"carol\"\nhash = \"sha256:"), "{stdout}");
    assert_eq!(sirocco(&["keys", "revoke", "ada", "--file", path]).0, Some(0));
    let text = std::fs::read_to_string(&file).unwrap();
    assert!(!text.contains("ada") && text.contains("# what bob may do"), "{text}");
    for (args, part) in [
        (&["keys", "create", "bob", "--file", path][..], "has a key already"),
        (&["keys", "create", "b b", "--file", path], "must be 1 to 64"),
        (&["keys", "revoke", "ada", "--file", path], "has no key"),
        (&["keys", "list", "--file", "/nonexistent"], "/nonexistent"),
    ] {
        let (code, _, stderr) = sirocco(args);
        assert!(code == Some(1) && stderr.contains(part), "{args:?}: {stderr}");
    }
}
