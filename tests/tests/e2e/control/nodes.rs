//! Expert nodes come and go.

use std::time::Duration;

use rustix::process::Signal;
use sirocco_testkit::etcd::Etcd;
use sirocco_testkit::repository;

use super::clients::Clients;
use super::operator::{Operator, cordon};
use super::succession::Succession;
use super::{Size, demo_cluster};

/// How long the records of a node that says nothing stay.
const LEASE: Duration = Duration::from_secs(15);

#[tokio::test(flavor = "multi_thread")]
async fn a_joining_node_serves_its_share_and_a_killed_leader_is_replaced() {
    let etcd = Etcd::start().unwrap();
    let size = Size { coordinators: 2, routers: 1, experts: 3 };
    let mut cluster = demo_cluster(&etcd.endpoint(), "joined", size, &[]);
    let clients = Clients::of_goldens(&[&cluster.routers[0].grpc], 2);
    cluster.add_experts(1, &repository("models/demo")).unwrap();
    let operator = Operator::of(&cluster);
    operator.serves("expert-3").await;
    let settled = operator.settled().await;

    let mut leaders = Succession::default();
    let dead = leaders.kill_leader(&mut cluster).await;
    let cordoned = operator.complete(cordon("expert-0")).await;
    assert_ne!(cordoned.leader, dead.id);
    assert_eq!(operator.cluster().await.serving_epoch, settled.serving_epoch, "a new leader moves nothing");
    clients.stop().await;
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
