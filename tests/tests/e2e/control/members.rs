//! An etcd of three members loses one.

use sirocco_testkit::etcd::{EtcdCluster, ctl};
use sirocco_testkit::repository;

use super::clients::Clients;
use super::operator::{Operator, cordon, uncordon};
use super::succession::Succession;
use super::{Size, demo_cluster};

/// Which member of the etcd at `endpoints` leads it.
fn etcd_leader(endpoints: &str) -> usize {
    let status = ctl::status(endpoints).unwrap();
    let leads = |member: &serde_json::Value| member["Status"]["leader"] == member["Status"]["header"]["member_id"];
    status.iter().position(leads).expect("a member leads")
}

#[tokio::test(flavor = "multi_thread")]
async fn three_coordinators_survive_the_loss_of_an_etcd_member_and_compaction() {
    let mut etcd = EtcdCluster::start(3).unwrap();
    let size = Size { coordinators: 3, routers: 1, experts: 3 };
    let mut cluster = demo_cluster(&etcd.endpoints(), "quorum", size, &[]);
    let clients = Clients::of_goldens(&[&cluster.routers[0].grpc], 4);
    clients.progress(8).await;

    let lost = etcd_leader(&etcd.endpoints());
    etcd.members[lost].kill();
    let living: Vec<String> = etcd.members.iter().map(|member| member.endpoint()).collect();
    let living: Vec<&str> =
        living.iter().enumerate().filter(|(index, _)| *index != lost).map(|(_, endpoint)| endpoint.as_str()).collect();
    let operator = Operator::of(&cluster);
    operator.complete(cordon("expert-0")).await;
    for endpoint in &living {
        let revision = ctl::revision(endpoint).unwrap().to_string();
        // The other member may have compacted the store that far already.
        let _ = ctl::etcdctl(endpoint, &["compact", &revision]);
        ctl::etcdctl(endpoint, &["defrag"]).unwrap();
    }
    operator.complete(uncordon("expert-0")).await;
    cluster.add_experts(1, &repository("models/demo"), &[]).unwrap();
    operator.serves("expert-3").await;
    operator.settled().await;
    clients.progress(8).await;

    let mut leaders = Succession::default();
    let dead = leaders.kill_leader(&mut cluster).await;
    println!("a leader replaced with two of three members: {:.1?}", dead.replaced(&operator).await);
    etcd.members[lost].restart().unwrap();
    assert_ne!(operator.complete(cordon("expert-1")).await.leader, dead.id);
    clients.progress(8).await;
    println!("{} completions", clients.stop().await.completed);
}
