//! Metrics: documented, well formed, true, and used by dashboard and alerts under names that exist.

pub(crate) mod scrape;

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};
use sirocco_testkit::cluster::{Cluster, Setup};
use sirocco_testkit::etcd::Etcd;
use sirocco_testkit::{repository, wait_for};

use crate::openai::client::{ask, post, send};
use crate::support::{generate, greedy};
use scrape::{Family, Scrape, promtool};

const COMPLETIONS: &str = "/v1/completions";

fn start(etcd: &Etcd, name: &str, envs: &[(&str, &str)]) -> Cluster {
    let demo = repository("models/demo");
    let models = [demo.clone(), demo.clone()];
    let setup = Setup { name, router_model: &demo, models: &models, coordinators: 1, routers: 1, envs };
    Cluster::start_with(&etcd.endpoint(), &setup).unwrap()
}

/// The tables of docs/metrics.md: a metric for each row, `name | type | labels | meaning`.
fn documented() -> BTreeMap<String, Family> {
    let text = std::fs::read_to_string(repository("docs/metrics.md")).unwrap();
    let rows = text.lines().filter_map(|line| line.strip_prefix("| `"));
    let family = |row: &str| {
        let cells: Vec<&str> = row.trim_end_matches(" |").split(" | ").collect();
        let [name, kind, labels, help] = cells[..] else { panic!("not a row of four: {row}") };
        let labels = labels.split(", ").map(|label| label.trim_matches('`').to_owned());
        let labels = labels.filter(|label| !label.is_empty()).collect();
        (name.trim_end_matches('`').to_owned(), Family { kind: kind.to_owned(), labels, help: help.to_owned() })
    };
    rows.map(family).collect()
}

/// Row by row as [`documented`] reads them.
fn rows(families: &BTreeMap<String, Family>) -> Vec<String> {
    let row = |(name, Family { kind, labels, help }): (&String, &Family)| {
        let labels: Vec<String> = labels.iter().map(|label| format!("`{label}`")).collect();
        format!("| `{name}` | {kind} | {} | {help} |", labels.join(", "))
    };
    families.iter().map(row).collect()
}

/// The names of metrics in `text`.
fn names_in(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    words.filter(|word| word.starts_with("sirocco_") || word.starts_with("process_")).map(str::to_owned).collect()
}

#[test]
fn what_is_scraped_is_what_is_documented_and_promtool_has_nothing_to_say() {
    let etcd = Etcd::start().unwrap();
    let cluster = start(&etcd, "documented", &[]);
    ask(&cluster.routers[0].http, COMPLETIONS, &json!({"prompt": "The", "max_tokens": 4}));
    let coordinator = &cluster.coordinators[0].http;
    wait_for("the measured load", || {
        Ok(Scrape::of(coordinator).families.contains_key("sirocco_coordinator_imbalance_ratio").then_some(()))
    })
    .unwrap();
    let mut scraped = BTreeMap::new();
    for node in [&cluster.coordinators[0], &cluster.routers[0], &cluster.experts[0]] {
        let scrape = Scrape::of(&node.http);
        promtool(&["check", "metrics"], &scrape.text);
        assert!(scrape.text.contains(&format!("node=\"{}\",version=", node.id)), "{}", scrape.text);
        assert_eq!(scrape.value("sirocco_ready"), 1, "{}", node.id);
        scraped.extend(scrape.families);
    }
    // No GPU is needed here: what it shows is compared with the documentation in `crates/process/src/device.rs`.
    let mut documented = documented();
    documented.retain(|name, _| !name.starts_with("sirocco_gpu_"));
    let (documented, scraped) = (rows(&documented), rows(&scraped));
    let missing: Vec<&String> = documented.iter().filter(|row| !scraped.contains(row)).collect();
    let unknown: Vec<&String> = scraped.iter().filter(|row| !documented.contains(row)).collect();
    assert!(missing.is_empty() && unknown.is_empty(), "not scraped: {missing:#?}\nnot documented: {unknown:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn counters_agree_with_what_was_asked_and_come_to_rest() {
    let etcd = Etcd::start().unwrap();
    let cluster = start(&etcd, "counted", &[("SIROCCO_MAX_SEQUENCES", "1"), ("SIROCCO_MAX_QUEUE", "1")]);
    let (http, grpc) = (&cluster.routers[0].http, &cluster.routers[0].grpc);
    let requests = |api: &str, outcome: &str, reason: &str| {
        format!("sirocco_router_requests_total{{api=\"{api}\",outcome=\"{outcome}\",reason=\"{reason}\"}}")
    };
    let until = |series: &str, value: u64| {
        let what = format!("{series} to be {value}");
        wait_for(&what, || Ok((Scrape::of(http).value(series) == value).then_some(()))).unwrap();
    };

    let mut usage = [0, 0, 0];
    // Longer than a block of the cache.
    let prompt = "In the beginning God created the heaven and the earth. And the earth was without form.".repeat(3);
    for _ in 0..3 {
        let answer = ask(http, COMPLETIONS, &json!({"prompt": prompt, "max_tokens": 9, "temperature": 0}));
        let used = &answer["usage"];
        for (sum, of) in usage.iter_mut().zip([
            &used["prompt_tokens"],
            &used["prompt_tokens_details"]["cached_tokens"],
            &used["completion_tokens"],
        ]) {
            *sum += of.as_u64().unwrap();
        }
    }
    let after = Scrape::of(http);
    let counted = |name: &str| after.value(&format!("sirocco_router_{name}"));
    let names = ["prompt_tokens_total", "prompt_tokens_cached_total", "completion_tokens_total"];
    assert_eq!(names.map(counted), usage);
    assert!(usage[1] > 0 && counted("prefix_found_tokens_total") == usage[1], "{usage:?}");
    let generated = generate(grpc, greedy("The", 5)).await.unwrap().ids.len();
    until(&requests("grpc", "ok", ""), 1);
    let after = Scrape::of(http);
    let counted = |name: &str| after.value(&format!("sirocco_router_{name}"));
    assert_eq!(counted("completion_tokens_total"), usage[2] + generated as u64);
    assert!(counted("prompt_tokens_total") > usage[0]);
    assert_eq!(after.value(&requests("http", "ok", "")), 3);
    assert_eq!(counted("time_to_first_token_seconds_count"), 4);
    assert_eq!(counted("inter_token_seconds_count"), usage[2] + generated as u64 - 4);
    assert_eq!(counted("queue_seconds_count"), 4);
    assert_eq!(counted("request_seconds_count"), 4);

    // Every token of every step is run by the chosen experts of every layer.
    let config = std::fs::read(repository("models/demo/config.json")).unwrap();
    let config: Value = serde_json::from_slice(&config).unwrap();
    let number = |name: &str| config[name].as_u64().unwrap();
    let rows = counted("step_tokens_sum") * number("num_hidden_layers") * number("num_experts_per_tok");
    let experts: Vec<Scrape> = cluster.experts.iter().map(|node| Scrape::of(&node.http)).collect();
    let sum = |start: &str| experts.iter().map(|scrape| scrape.sum(start)).sum::<u64>();
    assert_eq!((sum("sirocco_expert_rows_total{"), sum("sirocco_expert_batch_rows_sum")), (rows, rows));
    let all = number("num_hidden_layers") * number("num_local_experts");
    assert_eq!(sum("sirocco_expert_held_experts"), all);
    assert_eq!(sum("sirocco_expert_load_seconds_count"), all);
    for node in ["expert-0", "expert-1"] {
        assert!(after.value(&format!("sirocco_router_hop_seconds_count{{node=\"{node}\"}}")) > 0, "{node}");
    }
    for part in ["attention", "dispatch", "combine", "logits", "sample"] {
        let seconds = after.exact(&format!("sirocco_router_step_part_seconds_total{{part=\"{part}\"}}"));
        assert!(seconds > 0.0 && seconds < after.exact("sirocco_router_step_seconds_sum"), "{part}: {seconds} s");
    }

    let long = json!({"prompt": "x", "max_tokens": 2000, "ignore_eos": true, "stream": true});
    let mut running = post(http, COMPLETIONS, &long);
    assert!(running.event().is_some());
    let waiting = send(http, "POST", COMPLETIONS, "", long.to_string().as_bytes());
    until("sirocco_router_sequences_waiting", 1);
    let busy = Scrape::of(http);
    assert_eq!(busy.value("sirocco_router_sequences_running"), 1);
    assert!(busy.value("sirocco_router_kv_blocks{state=\"used\"}") > 0);
    assert_eq!(post(http, COMPLETIONS, &long).status, 429);
    assert_eq!(post(http, COMPLETIONS, &json!({"prompt": "x", "temperature": 9})).status, 400);
    assert_eq!(post(http, COMPLETIONS, &json!({"prompt": "x", "model": "other"})).status, 404);
    drop((running, waiting));
    until(&requests("http", "cancelled", ""), 2);
    until("sirocco_router_sequences_waiting", 0);
    until("sirocco_router_sequences_running", 0);
    until("sirocco_router_kv_blocks{state=\"used\"}", 0);
    let rest = Scrape::of(http);
    for (reason, count) in [("queue_full", 1), ("invalid", 1), ("unknown_model", 1), ("not_ready", 0)] {
        assert_eq!(rest.value(&requests("http", "refused", reason)), count, "{reason}");
    }
    assert_eq!(rest.sum("sirocco_router_requests_total{"), 9);
    assert_eq!(rest.value("sirocco_router_request_seconds_count"), 6, "refused requests are left out");

    let coordinator = Scrape::of(&cluster.coordinators[0].http);
    assert_eq!(coordinator.value("sirocco_coordinator_leader"), 1);
    assert_eq!(coordinator.value("sirocco_coordinator_members{role=\"expert\",state=\"ready\"}"), 2);
    assert_eq!(coordinator.value("sirocco_coordinator_operations_total{kind=\"lead\",outcome=\"done\"}"), 1);
    assert!(coordinator.value("sirocco_coordinator_plan_seconds_count") >= 1);
    let epoch = coordinator.value("sirocco_coordinator_epoch{placement=\"serving\"}");
    assert!(epoch >= 1 && rest.value("sirocco_router_epoch") == epoch);
}

#[tokio::test(flavor = "multi_thread")]
async fn experts_that_do_not_answer_are_counted_by_node_and_the_request_as_failed() {
    let etcd = Etcd::start().unwrap();
    let mut cluster = start(&etcd, "away", &[("SIROCCO_EXPERT_TIMEOUT_S", "1")]);
    for expert in &mut cluster.experts {
        expert.process.kill().unwrap();
    }
    let http = &cluster.routers[0].http;
    assert_eq!(post(http, COMPLETIONS, &json!({"prompt": "x"})).status, 503);
    assert!(generate(&cluster.routers[0].grpc, greedy("x", 4)).await.is_err());
    let after = Scrape::of(http);
    for api in ["grpc", "http"] {
        let failed =
            format!("sirocco_router_requests_total{{api=\"{api}\",outcome=\"failed\",reason=\"unavailable\"}}");
        assert_eq!(after.value(&failed), 1, "{api}");
    }
    assert!(after.sum("sirocco_router_expert_refusals_total{") > 0);
    assert!(after.sum("sirocco_router_retries_total{") > 0);
}

#[test]
fn the_dashboard_and_the_alerts_ask_only_for_metrics_that_exist_and_each_alert_comes() {
    let documented = documented();
    let read = |path: &str| std::fs::read_to_string(repository(path)).unwrap();
    let (dashboard, alerts) = (read("deploy/grafana/sirocco.json"), read("deploy/prometheus/alerts.yml"));
    let dashboard: Value = serde_json::from_str(&dashboard).unwrap();
    let panels = dashboard["panels"].as_array().unwrap().iter();
    let targets = panels.flat_map(|panel| panel["targets"].as_array().cloned().unwrap_or_default());
    let queries: Vec<String> = targets.map(|target| target["expr"].as_str().unwrap().to_owned()).collect();
    assert!(queries.len() >= 12, "{queries:?}");
    for text in queries.iter().chain([&alerts]) {
        for name in names_in(text) {
            let histogram = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end));
            let histogram = histogram.filter(|stem| documented.get(*stem).is_some_and(|of| of.kind == "histogram"));
            let plain = documented.get(&name).is_some_and(|of| of.kind != "histogram");
            assert!(plain || histogram.is_some(), "{name} in {text}");
        }
    }
    // Grafana fills these in; promtool then reads each query as it will be asked.
    let filled = queries.iter().map(|query| query.replace("$__rate_interval", "5m").replace("$__range", "1h"));
    let rule = |(index, query): (usize, String)| json!({"record": format!("panel:{index}"), "expr": query});
    let rules: Vec<Value> = filled.enumerate().map(rule).collect();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("panels.yml");
    std::fs::write(&file, json!({"groups": [{"name": "panels", "rules": rules}]}).to_string()).unwrap();
    for rules in [file, repository("deploy/prometheus/alerts.yml")] {
        promtool(&["check", "rules", rules.to_str().unwrap()], "");
    }
    let tests = repository("deploy/prometheus/alerts_test.yml");
    let tested = read("deploy/prometheus/alerts_test.yml");
    for alert in alerts.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")) {
        assert!(tested.contains(&format!("alertname=\"{alert}\"")), "no test has {alert} come");
    }
    promtool(&["test", "rules", tests.to_str().unwrap()], "");
}
