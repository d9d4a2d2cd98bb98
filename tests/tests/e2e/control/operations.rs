//! Everything an operator can ask for, under load, with leaders that die in the middle of it.

use std::time::Duration;

use sirocco_proto::wire::cluster as wire;
use sirocco_proto::wire::cluster::operate_request::Action;
use sirocco_testkit::etcd::Etcd;
use sirocco_testkit::repository;

use super::clients::Clients;
use super::operator::{BY, Operator, drain, min_replicas, uncordon};
use super::succession::Succession;
use super::{Size, demo_cluster};

/// Longest time a cluster may be without a leader that acts.
const LEADERLESS: Duration = Duration::from_secs(20);

#[tokio::test(flavor = "multi_thread")]
async fn operations_under_load_fail_no_request_and_change_no_byte() {
    let etcd = Etcd::start().unwrap();
    let size = Size { coordinators: 3, routers: 1, experts: 9 };
    let mut cluster = demo_cluster(&etcd.endpoint(), "operated", size, &[]);
    let mut leaders = Succession::default();
    let clients = Clients::of_goldens(&[&cluster.routers[0].grpc], 8);
    clients.progress(24).await;

    let operation =
        leaders.interrupt(&mut cluster, async |_, operator| drop(operator.operate(drain("expert-8")).await));
    let drained = operation.await;
    assert_eq!((drained.kind.as_str(), drained.state.as_str()), ("drain", "done"), "{drained:?}");
    let used = |expert: &wire::Expert, node: &str| expert.serving.iter().any(|name| name == node);
    assert!(!Operator::of(&cluster).experts().await.iter().any(|expert| used(expert, "expert-8")));
    clients.progress(8).await;

    let demo = repository("models/demo");
    leaders.interrupt(&mut cluster, async |cluster, _| cluster.add_experts(2, &demo, &[]).unwrap()).await;
    for node in ["expert-9", "expert-10"] {
        Operator::of(&cluster).serves(node).await;
    }
    clients.progress(8).await;

    let least = |experts: &[wire::Expert], least: u32| {
        experts.iter().all(|expert| expert.min_replicas == least && expert.serving.len() >= least as usize)
    };
    let doubled = leaders.interrupt(&mut cluster, async |_, operator| drop(operator.operate(min_replicas(2)).await));
    assert_eq!(doubled.await.state, "done");
    assert!(least(&Operator::of(&cluster).experts().await, 2));
    clients.progress(8).await;

    // Replicas that are there may stay, so that nothing need run for this.
    Operator::of(&cluster).complete(min_replicas(1)).await;
    Operator::of(&cluster).settled().await;
    assert!(least(&Operator::of(&cluster).experts().await, 1));
    clients.progress(8).await;

    // The first placement is on the nodes of the beginning, so that what comes next has something to gain.
    Operator::of(&cluster).complete(uncordon("expert-8")).await;
    let rollback = Action::Rollback(wire::Rollback { epoch: 1 });
    let rolled_back = leaders.interrupt(&mut cluster, async |_, operator| drop(operator.operate(rollback).await)).await;
    assert_eq!((rolled_back.kind.as_str(), rolled_back.state.as_str()), ("rollback", "done"), "{rolled_back:?}");
    assert!(!Operator::of(&cluster).experts().await.iter().any(|expert| used(expert, "expert-9")));
    clients.progress(8).await;

    let rebalance = Action::Rebalance(wire::Rebalance { max_moved_bytes: 0 });
    let rebalanced = leaders.interrupt(&mut cluster, async |_, operator| drop(operator.operate(rebalance).await)).await;
    assert_eq!((rebalanced.kind.as_str(), rebalanced.state.as_str()), ("rebalance", "done"), "{rebalanced:?}");
    clients.progress(8).await;

    leaders.complete(&mut cluster);
    let tally = clients.stop().await;
    let takeovers = &leaders.takeovers;
    println!("{} completions, all the same; slowest {:?}", tally.completed, tally.slowest);
    println!("{} leaders killed; seconds to the next one's first write: {takeovers:.1?}", takeovers.len());
    assert!(takeovers.iter().all(|takeover| *takeover < LEADERLESS), "{takeovers:?}");

    let operations = Operator::of(&cluster).operations().await;
    for (kind, subject) in [
        ("drain", "expert-8"),
        ("min-replicas", "all experts"),
        ("uncordon", "expert-8"),
        ("rollback", "1"),
        ("rebalance", ""),
    ] {
        let asked = operations.iter().find(|operation| operation.kind == kind && operation.by == BY);
        let asked = asked.unwrap_or_else(|| panic!("no {kind} among {operations:?}"));
        assert_eq!((asked.subject.as_str(), asked.state.as_str()), (subject, "done"), "{asked:?}");
        assert!(!asked.detail.is_empty() && asked.ended_ms >= asked.started_ms, "{asked:?}");
    }
    let led: Vec<&str> = operations.iter().filter(|o| o.kind == "lead").map(|o| o.leader.as_str()).collect();
    assert_eq!(led.len(), takeovers.len() + 1, "{led:?}");
}
