//! Processes come, go and come back: leases, identities, drains, and what may be read of all that in the store and the logs.

use crate::support::{generate, generate_watched, goldens, greedy};
use rustix::process::Signal;
use serde_json::Value;
use sirocco_testkit::cluster::{Cluster, Setup};
use sirocco_testkit::etcd::Etcd;
use sirocco_testkit::etcd::ctl::{self, entries, etcdctl};
use sirocco_testkit::{repository, wait_for};

fn expert_members(etcd: &Etcd, cluster: &str) -> Vec<(String, Value)> {
    let prefix = format!("/sirocco/{cluster}/members/expert/");
    entries(&etcd.endpoint(), cluster).unwrap().into_iter().filter(|(key, _)| key.starts_with(&prefix)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_expert_node_changes_no_byte_vanishes_and_comes_back_as_itself() {
    let golden = &goldens()[0];
    let etcd = Etcd::start().unwrap();
    let demo = repository("models/demo");
    let mut cluster = Cluster::start(&etcd, "killed", &demo, &vec![demo.clone(); 3]).unwrap();
    let before = expert_members(&etcd, "killed");
    assert_eq!(before.len(), 3);

    cluster.experts[1].process.kill().unwrap();
    // The request waits until the lease is over and the experts are placed anew, and then goes on.
    let request = greedy(&golden.prompt, golden.greedy_ids.len() as u32);
    let traced = generate(&cluster.routers[0].grpc, request).await.unwrap();
    assert_eq!(traced.ids, golden.greedy_ids);
    let left: Vec<String> = expert_members(&etcd, "killed").into_iter().map(|(key, _)| key).collect();
    assert_eq!(left, ["/sirocco/killed/members/expert/expert-0", "/sirocco/killed/members/expert/expert-2"]);

    cluster.restart_expert(1, &demo).unwrap();
    cluster.experts[1].process.wait_for_line("ready").unwrap();
    let after = expert_members(&etcd, "killed");
    assert_eq!(
        after.iter().map(|(key, _)| key).collect::<Vec<_>>(),
        before.iter().map(|(key, _)| key).collect::<Vec<_>>()
    );
    assert_ne!(after[1].1["incarnation"], before[1].1["incarnation"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expert_node_that_is_stopped_in_the_middle_changes_no_byte() {
    let golden = &goldens()[4];
    let etcd = Etcd::start().unwrap();
    let demo = repository("models/demo");
    let mut cluster = Cluster::start(&etcd, "stopped", &demo, &vec![demo.clone(); 2]).unwrap();
    let mut stopped = 0;
    let request = greedy(&golden.prompt, golden.greedy_ids.len() as u32);
    let experts = &mut cluster.experts;
    let traced = generate_watched(&cluster.routers[0].grpc, request, |tokens| {
        if tokens == 5 {
            experts[0].process.signal(Signal::TERM).unwrap();
            stopped = tokens;
        }
    });
    assert_eq!(traced.await.unwrap().ids, golden.greedy_ids);
    assert_eq!(stopped, 5);
    assert!(experts[0].process.wait().unwrap().success());
    let log = experts[0].process.stderr();
    assert!(log.contains("no expert is served or loaded here"), "it left before others served its experts: {log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_store_reads_well_and_is_left_clean() {
    let etcd = Etcd::start().unwrap();
    let demo = repository("models/demo");
    let mut cluster = Cluster::start(&etcd, "clean", &demo, &vec![demo.clone(); 2]).unwrap();
    let entries = entries(&etcd.endpoint(), "clean").unwrap();
    let value = |key: &str| {
        let found = entries.iter().find(|(k, _)| k == &format!("/sirocco/clean/{key}"));
        found
            .unwrap_or_else(|| panic!("no {key} among {:?}", entries.iter().map(|(k, _)| k).collect::<Vec<_>>()))
            .1
            .clone()
    };
    assert_eq!(value("members/router/router-0")["grpc"], cluster.routers[0].grpc);
    assert_eq!(value("members/coordinator/coordinator-0")["role"], "coordinator");
    assert_eq!(value("holdings/expert-1")["layers"]["3"].as_array().unwrap().len(), 4);
    assert_eq!(value("placement/serving"), value("placement/target"));
    assert_eq!(value("placement/epochs/00000001/0000")["experts"].as_array().unwrap().len(), 8);
    assert_eq!(value("model")["spec"]["num_local_experts"], 8);
    assert!(entries.iter().any(|(key, id)| key.contains("/election/coordinator/") && id == "coordinator-0"));

    let nodes = [&mut cluster.routers[0], &mut cluster.coordinators[0]].into_iter().chain(&mut cluster.experts);
    for node in nodes {
        node.process.signal(Signal::TERM).unwrap();
        let status = node.process.wait().unwrap();
        assert!(status.success(), "{}: {status}\n{}", node.id, node.process.stderr());
    }
    let left = ctl::entries(&etcd.endpoint(), "clean").unwrap();
    let leased =
        left.iter().filter(|(key, _)| ["members", "holdings", "election"].iter().any(|part| key.contains(part)));
    assert_eq!(leased.map(|(key, _)| key).collect::<Vec<_>>(), Vec::<&String>::new());
    assert!(
        etcdctl(&etcd.endpoint(), &["lease", "list"]).unwrap().contains("found 0 leases"),
        "no lease is left behind"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn debug_logs_show_neither_prompt_nor_completion() {
    let golden = &goldens()[2];
    let etcd = Etcd::start().unwrap();
    let demo = repository("models/demo");
    let models = vec![demo.clone(); 2];
    let envs = [("RUST_LOG", "debug")];
    let setup = Setup { name: "quiet", router_model: &demo, models: &models, coordinators: 1, routers: 1, envs: &envs };
    let cluster = Cluster::start_with(&etcd.endpoint(), &setup).unwrap();
    let traced = generate(&cluster.routers[0].grpc, greedy(&golden.prompt, 48)).await.unwrap();
    assert_eq!(traced.text, golden.greedy_text);

    let nodes = [&cluster.routers[0], &cluster.coordinators[0]].into_iter().chain(&cluster.experts);
    for node in nodes {
        let log = node.process.stderr();
        assert!(log.contains("DEBUG"), "{} logs at debug", node.id);
        for secret in [golden.prompt.as_str(), "returns a pointer", &golden.greedy_text[..20]] {
            assert!(!log.contains(secret), "{} logs {secret:?}", node.id);
        }
        let ids = golden.greedy_ids[..6].iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        assert!(!log.contains(&ids), "{} logs token ids", node.id);
    }
}

#[test]
fn a_second_process_with_the_same_id_is_turned_away() {
    let etcd = Etcd::start().unwrap();
    let args = |grpc| ["--id", "c", "--etcd", grpc, "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0"];
    let endpoint = etcd.endpoint();
    let mut first = sirocco_testkit::process::Process::start("coordinator", &args(&endpoint), &[]).unwrap();
    first.wait_for_line("ready").unwrap();
    let mut second = sirocco_testkit::process::Process::start("coordinator", &args(&endpoint), &[]).unwrap();
    assert_eq!(second.wait().unwrap().code(), Some(1));
    assert!(second.stderr().contains("held by another live process"), "{}", second.stderr());
    first.signal(Signal::INT).unwrap();
    assert!(first.wait().unwrap().success());
}

#[test]
fn an_etcd_that_is_away_is_named_and_waited_for() {
    let mut etcd = Etcd::start().unwrap();
    etcd.kill();
    let endpoint = etcd.endpoint();
    let args = ["--id", "c", "--etcd", &endpoint, "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0"];
    let mut coordinator = sirocco_testkit::process::Process::start("coordinator", &args, &[]).unwrap();
    wait_for("a word on etcd", || Ok(coordinator.stderr().contains(&endpoint).then_some(()))).unwrap();
    etcd.restart().unwrap();
    coordinator.wait_for_line("ready").unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn serving_goes_on_without_coordinator_and_etcd() {
    let golden = &goldens()[1];
    let mut etcd = Etcd::start().unwrap();
    let demo = repository("models/demo");
    let mut cluster = Cluster::start(&etcd, "headless", &demo, &vec![demo.clone(); 2]).unwrap();
    cluster.coordinators[0].process.kill().unwrap();
    etcd.kill();
    for _ in 0..2 {
        let traced = generate(&cluster.routers[0].grpc, greedy(&golden.prompt, 48)).await.unwrap();
        assert_eq!(traced.ids, golden.greedy_ids);
    }
}
