//! What operators may ask for, and what comes of it.

use serde_json::json;
use sirocco_types::OperationState;

use super::*;
use crate::testing::Cluster;

fn id(name: &str) -> NodeId {
    NodeId::new(name).unwrap()
}

fn refused(cluster: &mut Cluster, request: &Request) -> String {
    cluster.ask(request).unwrap_err().to_string()
}

#[test]
fn a_drained_node_serves_nothing_and_comes_back_when_uncordoned() {
    let mut cluster = Cluster::serving(&["a", "b", "c"]);
    let drain = cluster.ask(&Request::Drain(id("b"))).unwrap();
    assert_eq!(cluster.operation(drain).state, OperationState::Running);
    assert_eq!(cluster.ask(&Request::Drain(id("b"))), Ok(drain), "asking twice is one drain");
    cluster.settle();
    assert_eq!(cluster.operation(drain).state, OperationState::Done);
    assert_eq!(cluster.served_by("b"), 0);
    assert!(refused(&mut cluster, &Request::Cordon(id("b"))).contains("uncordon it first"));
    cluster.ask(&Request::Uncordon(id("b"))).unwrap();
    cluster.settle();
    assert!(cluster.served_by("b") > 0);
}

#[test]
fn a_drain_for_which_there_is_no_room_is_refused_with_what_is_missing() {
    let mut cluster = Cluster::default();
    for node in ["a", "b"] {
        cluster.entries.join_with(node, 7, &json!({ "capacity_bytes": 24 * 5 }));
    }
    cluster.settle();
    let refusal = refused(&mut cluster, &Request::Drain(id("a")));
    assert!(
        refusal.contains("without a nobody could hold") && refusal.contains("of capacity are missing"),
        "{refusal}"
    );
    cluster.entries.leave("b");
    assert!(refused(&mut cluster, &Request::Drain(id("a"))).contains("only expert node"));
}

#[test]
fn an_uncordon_ends_a_drain_under_way_as_failed() {
    let mut cluster = Cluster::serving(&["a", "b"]);
    let drain = cluster.ask(&Request::Drain(id("b"))).unwrap();
    cluster.step();
    cluster.ask(&Request::Uncordon(id("b"))).unwrap();
    cluster.settle();
    assert_eq!(cluster.operation(drain).state, OperationState::Failed);
    assert!(cluster.served_by("b") > 0);
}

#[test]
fn a_cordoned_node_keeps_its_experts_and_gets_no_new_ones() {
    let mut cluster = Cluster::serving(&["a", "b", "c"]);
    let before = cluster.served_by("b");
    cluster.ask(&Request::Cordon(id("b"))).unwrap();
    cluster.entries.leave("c");
    cluster.settle();
    assert_eq!(cluster.served_by("b"), before);
    assert_eq!(cluster.state().serving().unwrap().unplaced().count(), 0);
}

#[test]
fn a_rollback_brings_a_placement_back_and_keeps_it() {
    let mut cluster = Cluster::serving(&["a", "b"]);
    cluster.loaded([1000.0, 10.0, 10.0, 10.0]);
    let rebalance = cluster.ask(&Request::Rebalance { max_moved_bytes: None }).unwrap();
    cluster.settle();
    assert_eq!(cluster.operation(rebalance).state, OperationState::Done);
    let first = cluster.state().epoch(Epoch(1)).unwrap().layers.clone();
    assert_ne!(cluster.state().serving().unwrap().layers, first);
    let back = cluster.ask(&Request::Rollback(Epoch(1))).unwrap();
    cluster.settle();
    assert_eq!(cluster.state().serving().unwrap().layers, first);
    assert_eq!(cluster.operation(back).state, OperationState::Done);
    let again = cluster.ask(&Request::Rollback(Epoch(1))).unwrap();
    assert!(cluster.operation(again).detail.contains("already"));
}

#[test]
fn a_rollback_to_what_is_gone_is_refused_by_name() {
    let mut cluster = Cluster::serving(&["a", "b"]);
    cluster.entries.leave("a");
    cluster.settle();
    let refusal = refused(&mut cluster, &Request::Rollback(Epoch(1)));
    assert!(refusal.contains("epoch 1 has") && refusal.contains("on a"), "{refusal}");
    assert_eq!(refused(&mut cluster, &Request::Rollback(Epoch(77))), "epoch: 77 is not kept; kept are 1, 2");
}

#[test]
fn a_rebalance_waits_for_the_placement_under_way() {
    let mut cluster = Cluster::serving(&["a", "b"]);
    cluster.entries.join("c", 7);
    cluster.step();
    let refusal = refused(&mut cluster, &Request::Rebalance { max_moved_bytes: None });
    assert!(refusal.contains("epoch 2 is still on its way"), "{refusal}");
}

#[test]
fn more_replicas_are_made_when_asked_for() {
    let mut cluster = Cluster::serving(&["a", "b", "c"]);
    let request = |replicas, layer, expert| Request::SetMinReplicas { replicas, layer, expert };
    cluster.ask(&request(3, Some(LayerId(1)), Some(ExpertId(2)))).unwrap();
    cluster.settle();
    let replicas = |cluster: &Cluster, layer, expert| {
        let key = ExpertKey { layer: LayerId(layer), expert: ExpertId(expert) };
        cluster.state().serving().unwrap().replicas(key).len()
    };
    assert_eq!((replicas(&cluster, 1, 2), replicas(&cluster, 0, 2)), (3, 1));
    cluster.ask(&request(2, None, None)).unwrap();
    cluster.settle();
    assert!(replicas(&cluster, 1, 2) >= 2 && replicas(&cluster, 0, 2) == 2);
    for (bad, message) in [
        (request(0, None, None), "replicas: 0, must be from 1 to 64"),
        (request(2, Some(LayerId(2)), None), "layer: 2, the model has 2"),
        (request(2, Some(LayerId(0)), Some(ExpertId(4))), "expert: 4, a layer has 4"),
        (request(2, None, Some(ExpertId(0))), "expert: needs a layer"),
    ] {
        assert_eq!(refused(&mut cluster, &bad), message);
    }
}

#[test]
fn an_unknown_node_is_refused_with_those_there_are() {
    let mut cluster = Cluster::serving(&["a", "b"]);
    for request in [Request::Drain(id("x")), Request::Cordon(id("x")), Request::Uncordon(id("x"))] {
        assert_eq!(refused(&mut cluster, &request), "node: no expert node is called x; there are a, b");
    }
}
