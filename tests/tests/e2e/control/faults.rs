//! Expert nodes fail under load while each of their experts has a replica elsewhere: no request fails, no byte changes, and
//! nobody waits for the lease of the node that failed.

use std::time::Duration;

use rustix::process::Signal;
use sirocco_testkit::cluster::Cluster;
use sirocco_testkit::etcd::Etcd;

use super::clients::Clients;
use super::operator::{Operator, min_replicas};
use super::{Size, demo_cluster};

/// How long the records of a node that says nothing stay.
const LEASE: Duration = Duration::from_secs(15);

/// Lets `fault` happen to the second of four expert nodes while 8 clients complete the goldens.
async fn suffers(name: &str, fault: impl FnOnce(&mut Cluster)) {
    let etcd = Etcd::start().unwrap();
    let size = Size { coordinators: 1, routers: 1, experts: 4 };
    let mut cluster = demo_cluster(&etcd.endpoint(), name, size, &[]);
    let operator = Operator::of(&cluster);
    operator.complete(min_replicas(2)).await;
    operator.settled().await;
    let clients = Clients::of_goldens(&[&cluster.routers[0].grpc], 8);
    clients.progress(32).await;
    fault(&mut cluster);
    clients.progress(64).await;
    let tally = clients.stop().await;
    println!("{name}: {} completions, slowest {:?}", tally.completed, tally.slowest);
    assert!(tally.slowest < LEASE / 2, "a request waited {:?}", tally.slowest);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_node_with_replicas_holds_up_nobody_for_long() {
    suffers("frozen", |cluster| cluster.experts[1].process.signal(Signal::STOP).unwrap()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_node_with_replicas_holds_up_nobody_for_long() {
    suffers("killed", |cluster| cluster.experts[1].process.kill().unwrap()).await;
}
