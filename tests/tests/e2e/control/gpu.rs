//! Clusters with an NVIDIA GPU, `cuda:0`. `cargo xtask gpu-check` runs what is ignored here; the rest is about machines without.

use std::path::Path;
use std::sync::LazyLock;

use sirocco_testkit::cluster::{Cluster, Setup};
use sirocco_testkit::etcd::Etcd;
use sirocco_testkit::process::Process;
use sirocco_testkit::repository;

use super::operator::Operator;
use crate::metrics::scrape::Scrape;
use crate::support::{generate, goldens, greedy};

/// The environment of nodes on the GPU: it, and the compiler that whoever runs the tests names.
static GPU: LazyLock<Vec<(&str, &str)>> = LazyLock::new(|| {
    static COMPILER: LazyLock<Option<String>> = LazyLock::new(|| std::env::var("SIROCCO_NVRTC").ok());
    let compiler = COMPILER.as_deref().map(|file| ("SIROCCO_NVRTC", file));
    [("SIROCCO_DEVICE", "cuda:0")].into_iter().chain(compiler).collect()
});

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

/// Fails unless every node that is on the GPU shows how it fares.
fn check_readings(cluster: &Cluster) {
    for node in [&cluster.routers[0], &cluster.experts[0]] {
        let shown = Scrape::of(&node.http);
        assert!(shown.exact("sirocco_gpu_memory_used_bytes") > 0.0, "{}", node.id);
        assert!(shown.exact("sirocco_gpu_memory_used_bytes") <= shown.exact("sirocco_gpu_memory_bytes"), "{}", node.id);
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
    let etcd = Etcd::start().unwrap();
    let (demo, endpoint) = (repository("models/demo"), etcd.endpoint());
    let args = ["--model", demo.to_str().unwrap(), "--device", "cuda:0"];
    let node = [&args[..], &["--etcd", &endpoint, "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0"]].concat();
    let up = [&["up"], &args[..], &["--prompt", "The"]].concat();
    for (program, args) in [("router-node", &node), ("expert-node", &node), ("sirocco", &up)] {
        let mut process = Process::start(program, args, &[]).unwrap();
        assert_eq!(process.wait().unwrap().code(), Some(1), "{program}");
        let said = process.stderr();
        let missing =
            ["--device: libcuda.so.1 not found: no NVIDIA driver", "--device: cuda:0: this machine has 0 NVIDIA GPUs"];
        assert!(missing.iter().any(|missing| said.contains(missing)), "{program}: {said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_gpu_auto_is_the_cpu_and_says_so() {
    if has_gpu() {
        return;
    }
    let etcd = Etcd::start().unwrap();
    let cluster = start(&etcd, "auto", &[("SIROCCO_DEVICE", "auto")]);
    let goldens = goldens();
    let golden = &goldens[0];
    let said = generate(&cluster.routers[0].grpc, greedy(&golden.prompt, 8)).await.unwrap();
    assert_eq!(said.ids, golden.greedy_ids[..8]);
    let nodes = [
        (&cluster.experts[0], "no GPU can be used; experts run on the CPU"),
        (&cluster.routers[0], "no GPU can be used; the router runs on the CPU"),
    ];
    for (node, said) in nodes {
        let log = node.process.stderr();
        let lines: Vec<&str> = log.lines().filter(|line| line.contains(said)).collect();
        assert!(lines.len() == 1 && lines[0].contains("NVIDIA"), "{log}");
    }

    let demo = repository("models/demo");
    let args = ["up", "--model", demo.to_str().unwrap(), "--device", "auto", "--prompt", &golden.prompt];
    let greedily = ["--temperature", "0", "--max-tokens", "8"];
    let mut process = Process::start("sirocco", &[&args[..], &greedily].concat(), &[]).unwrap();
    assert!(process.wait().unwrap().success(), "{}", process.stderr());
    assert_eq!(process.stdout(), format!("{}\n", said.text));
    assert!(process.stderr().contains("no GPU can be used; all runs on the CPU: "), "{}", process.stderr());
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs an NVIDIA GPU: cargo xtask gpu-check"]
async fn a_cluster_whose_router_and_experts_are_on_a_gpu_says_the_goldens() {
    let etcd = Etcd::start().unwrap();
    let cluster = start(&etcd, "gpu", &GPU);
    check_goldens(&cluster.routers[0].grpc).await;
    check_readings(&cluster);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs an NVIDIA GPU: cargo xtask gpu-check"]
async fn a_router_on_a_gpu_says_the_goldens_with_experts_on_cpus() {
    let etcd = Etcd::start().unwrap();
    let mut cluster = start(&etcd, "gpu-router", &[]);
    cluster.add_router(&repository("models/demo"), &GPU).unwrap();
    check_goldens(&cluster.routers[1].grpc).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs an NVIDIA GPU: cargo xtask gpu-check"]
async fn routers_on_gpu_and_cpu_say_the_goldens_with_experts_on_both() {
    let (etcd, demo) = (Etcd::start().unwrap(), repository("models/demo"));
    let mut cluster = start(&etcd, "mixed", &[]);
    cluster.add_experts(1, &demo, &GPU).unwrap();
    let operator = Operator::of(&cluster);
    operator.serves("expert-0").await;
    operator.serves("expert-1").await;
    operator.settled().await;
    cluster.add_router(&demo, &GPU).unwrap();
    for router in &cluster.routers {
        check_goldens(&router.grpc).await;
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU: cargo xtask gpu-check"]
fn up_shares_a_gpu_among_its_nodes() {
    let (demo, goldens) = (repository("models/demo"), goldens());
    let golden = &goldens[0];
    let args = ["up", "--model", demo.to_str().unwrap(), "--routers", "2", "--expert-nodes", "3"];
    let tokens = golden.greedy_ids.len().to_string();
    let asked = ["--prompt", &golden.prompt, "--temperature", "0", "--max-tokens", &tokens];
    let mut process = Process::start("sirocco", &[&args[..], &asked].concat(), &GPU).unwrap();
    assert!(process.wait().unwrap().success(), "{}", process.stderr());
    assert_eq!(process.stdout(), format!("{}\n", golden.greedy_text));
}
