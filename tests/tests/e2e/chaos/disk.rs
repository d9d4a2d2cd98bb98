//! Expert nodes whose checkpoint is damaged on disk.

use std::fs::File;

use sirocco_testkit::cluster::{Cluster, Setup};
use sirocco_testkit::etcd::Etcd;
use sirocco_testkit::faults::disk::{Damage, damaged};
use sirocco_testkit::process::Process;
use sirocco_testkit::repository;

use crate::control::operator::{Operator, drain};
use crate::control::until;
use crate::support::{generate, goldens, greedy};

const SHARD: &str = "model.safetensors";

/// A bit of the first layer's gate.
fn gate_bit() -> u64 {
    let bytes = std::fs::read(repository("models/demo").join(SHARD)).unwrap();
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap());
    let tensors: serde_json::Value = serde_json::from_slice(&bytes[8..header as usize]).unwrap();
    let gate = &tensors["model.layers.0.block_sparse_moe.gate.weight"];
    (header + gate["data_offsets"][0].as_u64().unwrap()) * 8 + 3
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_with_a_damaged_checkpoint_is_named_and_nothing_waits_for_it() {
    let (etcd, demo, folder) = (Etcd::start().unwrap(), repository("models/demo"), tempfile::tempdir().unwrap());
    let copy = |name: &str, damage| {
        let copy = folder.path().join(name);
        damaged(&demo, &copy, SHARD, damage).unwrap();
        copy
    };
    let cut = copy("cut", Damage::Truncated(60));
    let args = ["--model", cut.to_str().unwrap(), "--id", "cut", "--etcd", &etcd.endpoint()];
    let args = [&args[..], &["--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0"]].concat();
    let mut process = Process::start("expert-node", &args, &[]).unwrap();
    assert_eq!(process.wait().unwrap().code(), Some(1));
    assert!(process.stderr().contains(SHARD), "{}", process.stderr());

    let whole = copy("whole", Damage::Truncated(100));
    let models = [demo.clone(), copy("flipped", Damage::Flipped(gate_bit())), whole.clone(), demo.clone()];
    let setup = Setup { name: "disk", router_model: &demo, models: &models, coordinators: 1, routers: 1, envs: &[] };
    let cluster = Cluster::start_with(&etcd.endpoint(), &setup).unwrap();
    let operator = Operator::of(&cluster);
    operator.settled().await;
    let problems = operator.cluster().await.problems;
    assert!(problems.iter().any(|problem| problem.contains("expert-1 reads checkpoint")), "{problems:?}");

    // What it has loaded it goes on serving; what it is to load now is not there any more.
    File::options().write(true).open(whole.join(SHARD)).unwrap().set_len(1 << 20).unwrap();
    operator.complete(drain("expert-0")).await;
    let named = "expert-2 cannot load";
    until("the node to be named", async || {
        operator.cluster().await.problems.iter().any(|problem| problem.contains(named)).then_some(())
    })
    .await;
    for golden in goldens() {
        let said = generate(&cluster.routers[0].grpc, greedy(&golden.prompt, 48)).await.unwrap();
        assert_eq!(said.ids, golden.greedy_ids);
    }
    let mut used = operator.experts().await.into_iter().flat_map(|expert| expert.serving);
    assert!(!used.any(|node| node == "expert-0" || node == "expert-1"));
}
