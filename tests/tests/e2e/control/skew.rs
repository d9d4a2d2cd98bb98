//! Traffic in one language is hard on some experts: they get replicas, and then nothing moves any more.

use std::time::Duration;

use serde_json::Value;
use sirocco_proto::wire::cluster as wire;
use sirocco_testkit::etcd::Etcd;
use sirocco_testkit::repository;
use tokio::time::Instant;

use super::clients::Clients;
use super::operator::Operator;
use super::{Size, demo_cluster, until, until_within};

/// How long the cluster is watched after it has rebalanced.
const CALM: Duration = Duration::from_mins(1);

/// Longest prompt, in bytes.
const PROMPT_BYTES: usize = 600;

/// The language whose text is routed the most unevenly, by the model's own measurements: its name, and the mean over layers of the
/// busiest expert's tokens over the mean expert's.
fn most_skewed() -> (String, f64) {
    let text = std::fs::read(repository("tests/data/demo/expert_load.json")).unwrap();
    let load: Value = serde_json::from_slice(&text).unwrap();
    let skew = |language: &Value| {
        let layers: Vec<f64> = serde_json::from_value(language["max_over_mean_by_layer"].clone()).unwrap();
        layers.iter().sum::<f64>() / layers.len() as f64
    };
    let languages = load["skew"].as_object().unwrap().iter().map(|(name, language)| (name.clone(), skew(language)));
    languages.max_by(|a, b| a.1.total_cmp(&b.1)).unwrap()
}

/// Texts of `language` that the model was not trained on.
fn texts(language: &str) -> Vec<String> {
    let path = repository(&format!("tests/data/demo/heldout/heldout.{language}.txt"));
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().filter(|line| (50..PROMPT_BYTES).contains(&line.len())).map(str::to_owned).collect()
}

/// The expert that takes the greatest part of its layer's tokens: layer, expert.
fn hottest(load: &wire::Load) -> (u32, u32) {
    let shares = load.layers.iter().flat_map(|layer| {
        let all: f64 = layer.tokens_per_s.iter().sum();
        (0..).zip(&layer.tokens_per_s).map(move |(expert, tokens)| (tokens / all, (layer.layer, expert)))
    });
    shares.max_by(|a, b| a.0.total_cmp(&b.0)).expect("a model has experts").1
}

/// How many nodes serve an expert.
async fn replicas(operator: &Operator, (layer, expert): (u32, u32)) -> usize {
    let experts = operator.experts().await;
    experts.iter().find(|found| (found.layer, found.expert) == (layer, expert)).expect("it exists").serving.len()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_skewed_load_makes_replicas_of_hot_experts_and_then_stays_calm() {
    let (language, skew) = most_skewed();
    println!("{language}: the busiest expert has {skew:.2} times the tokens of the mean");
    let etcd = Etcd::start().unwrap();
    let size = Size { coordinators: 1, routers: 1, experts: 9 };
    // Rest enough to see the first placement's imbalance before it is changed.
    let envs = [("SIROCCO_LOAD_HALF_LIFE_S", "10"), ("SIROCCO_REBALANCE_COOLDOWN_S", "15")];
    let cluster = demo_cluster(&etcd.endpoint(), "skewed", size, &envs);
    let operator = Operator::of(&cluster);
    let clients = Clients::of_texts(&cluster.routers[0].grpc, 8, &texts(&language));

    let mut before = (0.0, (0, 0), 0);
    let rebalanced = until("a rebalance", async || {
        let load = operator.load().await;
        let operations = operator.operations().await;
        let rebalance = operations.into_iter().find(|operation| operation.kind == "rebalance");
        if rebalance.is_none() && load.imbalance > 0.0 {
            let hottest = hottest(&load);
            before = (load.imbalance, hottest, replicas(&operator, hottest).await);
        }
        rebalance
    })
    .await;
    let (imbalance_before, hottest, replicas_before) = before;
    println!("{}: {}", rebalanced.by, rebalanced.detail);
    operator.settled().await;
    let replicas_after = replicas(&operator, hottest).await;
    println!("expert {} of layer {}: {replicas_before} -> {replicas_after} replicas", hottest.1, hottest.0);
    assert!(replicas_after > replicas_before);

    let calm_since = Instant::now();
    until_within(2 * CALM, "calm", async || (calm_since.elapsed() >= CALM).then_some(())).await;
    let imbalance_after = operator.load().await.imbalance;
    let further = operator.placements().await.iter().filter(|about| about.epoch > rebalanced.epoch).count();
    let removed = (imbalance_before - imbalance_after) / (imbalance_before - 1.0);
    println!("imbalance {imbalance_before:.2} -> {imbalance_after:.2}: {:.0} % of the excess removed", removed * 100.0);
    println!("{further} further placements in {CALM:?}; {} completions", clients.stop().await.completed);
    assert!(removed >= 0.3, "{imbalance_before} -> {imbalance_after}");
    assert!(further <= 1, "{:?}", operator.placements().await);
}
