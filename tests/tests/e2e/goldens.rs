//! Promise 1 and 4: a cluster of processes says, bit for bit, what one process says, and what transformers says; and each of its
//! expert nodes reads the bytes of its own experts and no others.

use std::path::{Path, PathBuf};

use crate::support::{Golden, Local, Traced, generate, goldens, greedy};
use futures::future::join_all;
use serde_json::Value;
use sirocco_proto::channel;
use sirocco_proto::cluster::ClusterServiceClient;
use sirocco_proto::wire::cluster::{ListExpertsRequest, ListNodesRequest, Role};
use sirocco_proto::wire::inference as wire;
use sirocco_testkit::cluster::{Cluster, Setup};
use sirocco_testkit::etcd::Etcd;
use sirocco_testkit::repository;

const LOGIT_TOLERANCE: f64 = 1e-3;

/// Has the cluster complete every golden prompt and compares with the golden and with `local`.
async fn check_goldens(router: &str, goldens: &[Golden], local: &[Traced]) {
    for (golden, local) in goldens.iter().zip(local) {
        let request = wire::GenerateRequest {
            trace: Some(wire::Trace { logits: true, routing: true }),
            ..greedy(&golden.prompt, golden.greedy_ids.len() as u32)
        };
        let remote = generate(router, request).await.unwrap();
        assert_eq!(remote.ids, golden.greedy_ids, "{}", golden.prompt);
        assert_eq!(remote.text, golden.greedy_text, "{}", golden.prompt);
        for (layer, tokens) in golden.routing.iter().enumerate() {
            assert_eq!(remote.experts[0][layer], tokens.concat(), "{}, layer {layer}", golden.prompt);
        }
        for (logits, (ids, values)) in remote.logits.iter().zip(&golden.top5) {
            for (id, value) in ids.iter().zip(values) {
                let logit = f64::from(f32::from_bits(logits[*id as usize]));
                assert!((logit - value).abs() <= LOGIT_TOLERANCE, "{}: {logit} is not {value}", golden.prompt);
            }
        }
        assert!(remote.logits == local.logits, "{}: logits differ from one process's", golden.prompt);
        assert!(remote.experts == local.experts, "{}: experts differ from one process's", golden.prompt);
        assert!(remote.weights == local.weights, "{}: gate weights differ from one process's", golden.prompt);
    }
}

/// A copy of the bundled model in which every byte but the header, the gates and the experts of one index is overwritten.
fn poisoned(folder: &Path, expert: usize) -> PathBuf {
    let copy = folder.join(format!("expert-{expert}"));
    std::fs::create_dir(&copy).unwrap();
    let demo = repository("models/demo");
    for file in ["config.json", "generation_config.json"] {
        std::fs::copy(demo.join(file), copy.join(file)).unwrap();
    }
    let mut bytes = std::fs::read(demo.join("model.safetensors")).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let tensors: Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    let mine = format!(".experts.{expert}.");
    for (name, tensor) in tensors.as_object().unwrap() {
        if name == "__metadata__" || name.contains(&mine) || name.contains("block_sparse_moe.gate") {
            continue;
        }
        let offset = |i: usize| 8 + header + tensor["data_offsets"][i].as_u64().unwrap() as usize;
        bytes[offset(0)..offset(1)].fill(0xff);
    }
    std::fs::write(copy.join("model.safetensors"), bytes).unwrap();
    copy
}

#[tokio::test(flavor = "multi_thread")]
async fn every_cluster_says_what_one_process_and_transformers_say() {
    let goldens = goldens();
    let mut local = Local::load();
    let local: Vec<Traced> = goldens.iter().map(|g| local.generate(&g.input_ids, g.greedy_ids.len())).collect();
    let etcd = Etcd::start().unwrap();
    let demo = repository("models/demo");

    let folder = tempfile::tempdir().unwrap();
    // Expert e of every layer is placed on node e, which has nothing but poison beside it.
    let own_bytes: Vec<PathBuf> = (0..8).map(|expert| poisoned(folder.path(), expert)).collect();
    // Load would move experts to nodes that have only poison in their place.
    let envs = [("SIROCCO_NO_AUTO_REBALANCE", "true")];
    let setup =
        Setup { name: "eight", router_model: &demo, models: &own_bytes, coordinators: 1, routers: 1, envs: &envs };
    let eight = Cluster::start_with(&etcd.endpoint(), &setup).unwrap();
    check_goldens(&eight.routers[0].grpc, &goldens, &local).await;
    check_placement(&eight.coordinators[0].grpc).await;
    drop(eight);

    for (name, nodes) in [("three", 3), ("one", 1)] {
        let cluster = Cluster::start(&etcd, name, &demo, &vec![demo.clone(); nodes]).unwrap();
        check_goldens(&cluster.routers[0].grpc, &goldens, &local).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_at_the_same_time_change_no_byte_of_each_other() {
    let goldens = goldens();
    let etcd = Etcd::start().unwrap();
    let demo = repository("models/demo");
    let cluster = Cluster::start(&etcd, "busy", &demo, &vec![demo.clone(); 2]).unwrap();
    let router = cluster.routers[0].grpc.as_str();
    // Beside them, clients that leave in the middle and one whose request is refused.
    let leaving = goldens.iter().map(|golden| async {
        let completion = generate(router, greedy(&golden.prompt, 2000));
        assert!(tokio::time::timeout(std::time::Duration::from_millis(200), completion).await.is_err());
    });
    let refused = async { generate(router, greedy("", 4)).await.err().map(|status| status.code()) };
    let together = goldens.iter().map(|golden| generate(router, greedy(&golden.prompt, 48)));
    let (together, _, refused) = tokio::join!(join_all(together), join_all(leaving), refused);
    assert_eq!(refused, Some(tonic::Code::InvalidArgument));
    for (golden, traced) in goldens.iter().zip(together) {
        assert_eq!(traced.unwrap().ids, golden.greedy_ids, "{}", golden.prompt);
    }
}

/// Every expert is on one node, and a node's weights take the bytes of its experts and less than 5% more.
async fn check_placement(coordinator: &str) {
    let mut client = ClusterServiceClient::new(channel::connect(coordinator).await.unwrap());
    let experts = client.list_experts(ListExpertsRequest::default()).await.unwrap().into_inner().experts;
    assert_eq!(experts.len(), 4 * 8);
    for expert in experts {
        assert_eq!(expert.serving, [format!("expert-{}", expert.expert)]);
        assert_eq!(expert.held, expert.serving);
    }
    let nodes = client.list_nodes(ListNodesRequest {}).await.unwrap().into_inner().nodes;
    for node in nodes.iter().filter(|node| node.role() == Role::Expert) {
        let stored = u64::from(node.experts) * 3 * 256 * 320 * 2;
        assert_eq!((node.experts, node.target_experts), (4, 4));
        assert!(node.weight_bytes >= stored && node.weight_bytes * 100 < stored * 105, "{}", node.weight_bytes);
    }
}
