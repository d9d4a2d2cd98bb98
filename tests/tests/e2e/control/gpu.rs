//! Clusters with an NVIDIA GPU, `cuda:0`. `cargo xtask gpu-check` runs what is ignored here; the rest is about machines without.

use std::path::Path;

use sirocco_testkit::cluster::{Cluster, Setup};
use sirocco_testkit::etcd::Etcd;
use sirocco_testkit::process::Process;
use sirocco_testkit::repository;

use super::operator::Operator;
use crate::support::{generate, goldens, greedy};

const GPU: (&str, &str) = ("SIROCCO_DEVICE", "cuda:0");

/// A cluster of one expert node with these settings.
fn start(etcd: &Etcd, name: &str, envs: &[(&str, &str)]) -> Cluster {
    let demo = repository("models/demo");
    let models = [demo.clone()];
    let setup = Setup { name, router_model: &demo, models: &models, coordinators: 1, routers: 1, envs };
    Cluster::start_with(&etcd.endpoint(), &setup).unwrap()
}

async fn check_goldens(router: &str) {
    for golden in goldens() {
        let said = generate(router, greedy(&golden.prompt, golden.greedy_ids.len() as u32)).await.unwrap();
        assert_eq!((said.ids, said.text), (golden.greedy_ids, golden.greedy_text), "{}", golden.prompt);
    }
}

/// Whether this machine's driver shows a GPU, as the kernel tells it.
fn has_gpu() -> bool {
    Path::new("/proc/driver/nvidia/gpus").read_dir().is_ok_and(|mut gpus| gpus.next().is_some())
}

#[test]
fn without_a_gpu_a_node_that_is_told_to_use_one_says_what_is_missing_and_ends() {
    if has_gpu() {
        return;
    }
    let demo = repository("models/demo");
    let args = ["--model", demo.to_str().unwrap(), "--device", "cuda:0", "--prompt", "The"];
    let mut process = Process::start("sirocco", &[&["up"], &args[..]].concat(), &[]).unwrap();
    assert_eq!(process.wait().unwrap().code(), Some(1));
    let said = process.stderr();
    let missing =
        ["--device: libcuda.so.1 not found: no NVIDIA driver", "--device: cuda:0: this machine has 0 NVIDIA GPUs"];
    assert!(missing.iter().any(|missing| said.contains(missing)), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_gpu_auto_is_the_cpu_and_says_so() {
    if has_gpu() {
        return;
    }
    let etcd = Etcd::start().unwrap();
    let cluster = start(&etcd, "auto", &[("SIROCCO_DEVICE", "auto")]);
    let golden = &goldens()[0];
    let said = generate(&cluster.routers[0].grpc, greedy(&golden.prompt, 8)).await.unwrap();
    assert_eq!(said.ids, golden.greedy_ids[..8]);
    let log = cluster.experts[0].process.stderr();
    let lines: Vec<&str> =
        log.lines().filter(|line| line.contains("no GPU can be used; experts run on the CPU")).collect();
    assert!(lines.len() == 1 && lines[0].contains("NVIDIA"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs an NVIDIA GPU: cargo xtask gpu-check"]
async fn a_cluster_on_a_gpu_says_the_goldens() {
    let etcd = Etcd::start().unwrap();
    let cluster = start(&etcd, "gpu", &[GPU]);
    check_goldens(&cluster.routers[0].grpc).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs an NVIDIA GPU: cargo xtask gpu-check"]
async fn a_cluster_of_gpu_and_cpu_nodes_says_the_goldens() {
    let etcd = Etcd::start().unwrap();
    let mut cluster = start(&etcd, "mixed", &[]);
    cluster.add_experts(1, &repository("models/demo"), &[GPU]).unwrap();
    let operator = Operator::of(&cluster);
    operator.serves("expert-0").await;
    operator.serves("expert-1").await;
    operator.settled().await;
    check_goldens(&cluster.routers[0].grpc).await;
}
