//! Expert nodes come and go.

use std::time::Duration;

use rustix::process::Signal;
use sirocco_testkit::etcd::Etcd;
use sirocco_testkit::repository;

use super::clients::Clients;
use super::operator::{Operator, cordon};
use super::succession::Succession;
use super::{Size, demo_cluster, until};

/// How long the records of a node that says nothing stay.
const LEASE: Duration = Duration::from_secs(15);

#[tokio::test(flavor = "multi_thread")]
async fn a_joining_node_serves_its_share_within_seconds() {
    let etcd = Etcd::start().unwrap();
    let size = Size { coordinators: 1, routers: 1, experts: 3 };
    let mut cluster = demo_cluster(&etcd.endpoint(), "joined", size, &[]);
    let clients = Clients::of_goldens(&[&cluster.routers[0].grpc], 2);
    cluster.add_experts(1, &repository("models/demo"), &[]).unwrap();
    let operator = Operator::of(&cluster);
    operator.serves("expert-3").await;
    operator.settled().await;
    until("the node to run rows", async || {
        let load = operator.load().await;
        load.nodes.iter().any(|node| node.id == "expert-3" && node.rows_per_s > 0.0).then_some(())
    })
    .await;
    clients.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_leader_is_replaced() {
    let etcd = Etcd::start().unwrap();
    let size = Size { coordinators: 2, routers: 1, experts: 2 };
    let mut cluster = demo_cluster(&etcd.endpoint(), "orphaned", size, &[]);
    let settled = Operator::of(&cluster).settled().await;
    let dead = Succession::default().kill_leader(&mut cluster).await;
    let operator = Operator::of(&cluster);
    let cordoned = operator.complete(cordon("expert-0")).await;
    assert_eq!((&settled.leader, cordoned.leader != dead.id), (&dead.id, true), "{cordoned:?}");
    assert_eq!(operator.settled().await.leader, cordoned.leader);
    let kinds: Vec<String> = operator.operations().await.into_iter().map(|operation| operation.kind).collect();
    let expected = ["cordon", "lead", "place", "lead"].map(str::to_owned);
    assert!(kinds.ends_with(&expected), "a new leader moves nothing by itself: {kinds:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_stopped_under_load_leaves_no_request_waiting() {
    let etcd = Etcd::start().unwrap();
    let size = Size { coordinators: 1, routers: 2, experts: 4 };
    let mut cluster = demo_cluster(&etcd.endpoint(), "leaving", size, &[]);
    let routers: Vec<String> = cluster.routers.iter().map(|router| router.grpc.clone()).collect();
    let clients = Clients::of_goldens(&[&routers[0], &routers[1]], 8);
    clients.progress(16).await;

    for stopped in [1, 3] {
        cluster.experts[stopped].process.signal(Signal::TERM).unwrap();
        assert!(cluster.experts[stopped].process.wait().unwrap().success());
        let log = cluster.experts[stopped].process.stderr();
        assert!(log.contains("no expert is served or loaded here"), "it left early: {log}");
        clients.progress(16).await;
    }
    let tally = clients.stop().await;
    println!("{} completions, slowest {:?}", tally.completed, tally.slowest);
    assert!(tally.slowest < LEASE, "a request waited {:?}", tally.slowest);
    for router in &cluster.routers {
        let log = router.process.stderr();
        assert!(!log.contains("broke"), "a stream was cut off: {log}");
    }
}
