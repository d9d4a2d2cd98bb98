//! A thousand requests, most of which go wrong on purpose: nothing is left of them, and those that are right stay right.
//!
//! The kinds come in an order that a seed decides; it is printed, and `SIROCCO_STORM_SEED` replays it.

use std::io::Write as _;
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use sirocco_proto::channel;
use sirocco_proto::inference::InferenceServiceClient;
use sirocco_proto::tonic::{Code, Request};
use sirocco_proto::wire::inference as wire;
use sirocco_testkit::cluster::Node;
use sirocco_testkit::etcd::Etcd;
use sirocco_testkit::random::Random;
use tokio::task::JoinSet;

use crate::openai::client::{Answer, metric, post, send, until_idle};
use crate::openai::start;
use crate::support::{Golden, generate, goldens, greedy};

const REQUESTS: u64 = 1000;
/// After so many the process has seen everything once, and its memory is noted.
const WARM: u64 = 300;
const AT_ONCE: usize = 24;
/// Memory that may come and go by itself.
const SLACK_BYTES: u64 = 16 << 20;

const COMPLETIONS: &str = "/v1/completions";

/// Where requests go, and what is right.
struct Target {
    grpc: String,
    http: String,
    goldens: Vec<Golden>,
}

impl Target {
    fn of(router: &Node) -> Self {
        Self { grpc: router.grpc.clone(), http: router.http.clone(), goldens: goldens() }
    }

    /// Something long to compute, drawn at random.
    fn long(&self, random: &mut Random) -> Value {
        let prompt: Vec<u64> = match random.below(3) {
            0 => self.goldens[random.below(12) as usize].input_ids.iter().map(|id| u64::from(*id)).collect(),
            _ => (0..=random.below(100)).map(|_| random.below(4096)).collect(),
        };
        json!({"prompt": prompt, "max_tokens": 1 + random.below(250), "ignore_eos": true, "n": 1 + random.below(3),
               "temperature": random.below(3), "stream": random.below(2) == 0})
    }

    /// A request that must be answered, and rightly.
    fn right(&self, random: &mut Random) {
        let golden = &self.goldens[random.below(12) as usize];
        let body = json!({"prompt": golden.input_ids, "max_tokens": 48, "temperature": 0});
        let answer = post(&self.http, COMPLETIONS, &body);
        assert_eq!(answer.status, 200);
        assert_eq!(answer.json()["choices"][0]["text"], golden.greedy_text.as_str());
    }

    /// Waits for all of something long.
    fn stays(&self, random: &mut Random) {
        let answer = post(&self.http, COMPLETIONS, &self.long(random));
        assert_eq!(answer.status, 200);
        answer.text();
    }

    /// Goes away: before the answer, or after a few events of it.
    fn leaves_http(&self, random: &mut Random) {
        let body = self.long(random);
        let stream = send(&self.http, "POST", COMPLETIONS, "", body.to_string().as_bytes());
        if body["stream"] == true {
            let mut answer = Answer::of(stream);
            for _ in 0..random.below(200) {
                answer.event();
            }
        } else {
            std::thread::sleep(Duration::from_millis(random.below(50)));
        }
    }

    /// Has too little time.
    fn late_http(&self, random: &mut Random) {
        let mut body = self.long(random);
        body["timeout"] = json!((1 + random.below(300)) as f64 / 1000.0);
        let answer = post(&self.http, COMPLETIONS, &body);
        assert!([200, 504].contains(&answer.status), "{}", answer.status);
        answer.text();
    }

    /// Is nonsense, cut off, or asks what nobody may.
    fn malformed_http(&self, random: &mut Random) {
        let body = self.long(random).to_string();
        if random.below(3) == 0 {
            // Announces more than it sends.
            let mut stream = TcpStream::connect(&self.http).unwrap();
            let half = &body.as_bytes()[..body.len() / 2];
            write!(stream, "POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n", body.len()).unwrap();
            stream.write_all(half).unwrap();
            return;
        }
        let bodies = [
            body[..random.below(body.len() as u64) as usize].to_owned(),
            body.replace(':', ","),
            r#"{"prompt": [1, 2], "max_tokens": -5}"#.to_owned(),
            r#"{"prompt": [99999]}"#.to_owned(),
            r#"{"prompt": "x", "logit_bias": {"1": 1e9}}"#.to_owned(),
            "[".repeat(100_000),
            "\u{0}\u{1}".to_owned(),
        ];
        let body = &bodies[random.below(bodies.len() as u64) as usize];
        let answer = Answer::of(send(&self.http, "POST", COMPLETIONS, "", body.as_bytes()));
        let (status, text) = (answer.status, answer.text());
        assert_eq!(status, 400, "{text}");
    }

    /// Over gRPC: goes away after a few tokens, has too little time, or is nonsense.
    async fn wrong_grpc(&self, random: &mut Random) {
        let mut client = InferenceServiceClient::new(channel::connect(&self.grpc).await.unwrap());
        let ids = (0..=random.below(300)).map(|_| random.below(4096) as u32).collect();
        let prompt = Some(wire::generate_request::Prompt::TokenIds(wire::TokenIds { ids }));
        let mut message = wire::GenerateRequest {
            prompt,
            max_tokens: Some(1 + random.below(200) as u32),
            ignore_eos: true,
            ..Default::default()
        };
        let kind = random.below(3);
        if kind == 0 {
            message.logprobs = Some(1000);
        }
        // CANCELLED is what tonic's client calls a timeout of its own.
        let expected: &[Code] = match kind {
            0 => &[Code::InvalidArgument],
            1 => &[Code::DeadlineExceeded, Code::Cancelled],
            _ => &[],
        };
        let mut request = Request::new(message);
        if kind == 1 {
            request.set_timeout(Duration::from_millis(3 + random.below(40)));
        }
        let mut stream = match client.generate(request).await {
            Ok(response) => response.into_inner(),
            Err(status) => {
                assert!(expected.contains(&status.code()), "{status}");
                return;
            }
        };
        for _ in 0..random.below(30) {
            match stream.message().await {
                Ok(Some(_)) => {}
                Ok(None) => return,
                Err(status) => {
                    assert!(expected.contains(&status.code()), "{status}");
                    return;
                }
            }
        }
    }
}

/// Sends requests `numbers`, [`AT_ONCE`] at a time.
async fn storm(target: &Arc<Target>, seed: u64, numbers: std::ops::Range<u64>) {
    let mut tasks = JoinSet::new();
    for number in numbers {
        if tasks.len() == AT_ONCE {
            tasks.join_next().await.unwrap().unwrap();
        }
        let target = Arc::clone(target);
        let mut random = Random::new(seed ^ number << 20);
        if random.below(3) == 0 {
            tasks.spawn(async move { target.wrong_grpc(&mut random).await });
            continue;
        }
        tasks.spawn_blocking(move || match random.below(8) {
            0 => target.right(&mut random),
            1 => target.stays(&mut random),
            2 | 7 => target.leaves_http(&mut random),
            3 | 4 => target.late_http(&mut random),
            _ => target.malformed_http(&mut random),
        });
    }
    while let Some(result) = tasks.join_next().await {
        result.unwrap();
    }
}

/// Waits until the router is idle and returns its memory in bytes.
fn at_rest(router: &Node) -> u64 {
    until_idle(router);
    router.process.resident_bytes().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_requests_of_which_most_go_wrong_leave_nothing_behind() {
    let seed = std::env::var("SIROCCO_STORM_SEED").ok().map_or(1, |seed| seed.parse().unwrap());
    println!("SIROCCO_STORM_SEED={seed}");
    let etcd = Etcd::start().unwrap();
    // So few blocks that sequences are preempted, and room in the queue for everybody.
    let kv_bytes = (2 << 20).to_string();
    let cluster = start(&etcd, "storm", &[("SIROCCO_KV_BYTES", &kv_bytes), ("SIROCCO_MAX_QUEUE", "512")]);
    let router = &cluster.routers[0];
    let target = Arc::new(Target::of(router));
    storm(&target, seed, 0..WARM).await;
    let before = at_rest(router);
    storm(&target, seed, WARM..REQUESTS).await;
    let after = at_rest(router);
    println!("{} MiB, then {} MiB", before >> 20, after >> 20);
    assert!(after <= before + SLACK_BYTES, "{before} bytes, then {after}");
    assert!(metric(&router.http, "sirocco_router_preemptions_total") > 0.0);
    for golden in &target.goldens {
        let completion = generate(&router.grpc, greedy(&golden.prompt, 48)).await.unwrap();
        assert_eq!((&completion.ids, &completion.text), (&golden.greedy_ids, &golden.greedy_text));
    }
}
