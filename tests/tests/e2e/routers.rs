//! A router node that dies takes no completion with it: its clients go on at another one.

use sirocco_proto::generation::{Generation, GenerationError};
use sirocco_proto::wire::inference as wire;
use sirocco_proto::wire::inference::generate_response::Event;
use sirocco_testkit::cluster::{Cluster, Setup};
use sirocco_testkit::etcd::Etcd;
use sirocco_testkit::repository;

/// What a client sees of one completion.
#[derive(Debug, Default, PartialEq)]
struct Seen {
    ids: Vec<u32>,
    indices: Vec<u32>,
    text: String,
    seeds: Vec<u64>,
    completion_tokens: u32,
}

/// Follows `generation` to its end; `at` is told how many tokens came so far.
async fn follow(generation: &mut Generation, mut at: impl FnMut(usize)) -> Result<Seen, GenerationError> {
    let mut seen = Seen::default();
    loop {
        match generation.event().await? {
            Event::Started(started) => seen.seeds.push(started.seed),
            Event::Token(token) => {
                seen.ids.push(token.id);
                seen.indices.push(token.index);
                seen.text += &token.text;
                at(seen.ids.len());
            }
            Event::Finished(finished) => {
                seen.text += &finished.text;
                seen.completion_tokens = finished.usage.unwrap_or_default().completion_tokens;
                return Ok(seen);
            }
        }
    }
}

/// A long completion, drawn with a seed; its stop string never comes, but text that may begin it is held back.
fn request() -> wire::GenerateRequest {
    wire::GenerateRequest {
        prompt: Some(wire::generate_request::Prompt::Text("Il nome del file".into())),
        sampling: Some(wire::SamplingParams { temperature: Some(1.2), seed: Some(11), ..Default::default() }),
        max_tokens: Some(400),
        stop: vec!["e e e e e e e e".into()],
        ignore_eos: true,
        ..Default::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_completion_goes_on_at_another_router_with_the_same_bytes() {
    let etcd = Etcd::start().unwrap();
    let demo = repository("models/demo");
    let models = vec![demo.clone(); 2];
    let setup = Setup { name: "relay", router_model: &demo, models: &models, coordinators: 1, routers: 3, envs: &[] };
    let mut cluster = Cluster::start_with(&etcd.endpoint(), &setup).unwrap();
    let routers: Vec<String> = cluster.routers.iter().map(|router| router.grpc.clone()).collect();

    let undisturbed = follow(&mut Generation::new(routers.clone(), request()), |_| {}).await.unwrap();
    assert_eq!(undisturbed.indices, (0..400).collect::<Vec<u32>>());
    let refused = wire::GenerateRequest { max_tokens: Some(0), ..request() };
    match follow(&mut Generation::new(routers.clone(), refused), |_| {}).await {
        Err(GenerationError::Refused(router, status)) => {
            assert!(router == routers[0] && status.message().contains("max_tokens"), "{router}: {status}");
        }
        other => panic!("no router would take it: {other:?}"),
    }

    let mut generation = Generation::new(routers.clone(), request());
    let disturbed = follow(&mut generation, |tokens| match tokens {
        20 => cluster.routers[0].process.kill().unwrap(),
        90 => cluster.routers[1].process.kill().unwrap(),
        _ => {}
    });
    assert_eq!(disturbed.await.unwrap(), undisturbed);
    assert_eq!(generation.router(), routers[2], "both routers were lost on the way");

    let mut last = Generation::new(routers.clone(), request());
    let error = follow(&mut last, |tokens| {
        if tokens == 20 {
            cluster.routers[2].process.kill().unwrap();
        }
    });
    let error = error.await.unwrap_err();
    assert!(matches!(error, GenerationError::Unreachable(..)), "{error}");
}
