//! A leader that stands still for longer than its lease has lost its pen, whatever it believes when it wakes.

use std::collections::BTreeSet;

use rustix::process::Signal;
use sirocco_testkit::etcd::ctl::Change;
use sirocco_testkit::etcd::{Etcd, ctl};
use sirocco_testkit::{repository, wait_for};

use super::clients::Clients;
use super::operator::{Operator, cordon, uncordon};
use super::{Size, demo_cluster, until};

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_was_stopped_past_its_lease_writes_nothing_when_it_wakes() {
    let etcd = Etcd::start().unwrap();
    let size = Size { coordinators: 3, routers: 1, experts: 3 };
    let mut cluster = demo_cluster(&etcd.endpoint(), "deposed", size, &[("SIROCCO_SETTLE_MS", "2000")]);
    let demo = repository("models/demo");
    let clients = Clients::of_goldens(&[&cluster.routers[0].grpc], 2);
    let settled = Operator::of(&cluster).settled().await;
    let old = settled.leader;
    let old_index = cluster.coordinators.iter().position(|node| node.id == old).unwrap();
    let to_old = Operator::of_nodes([&cluster.coordinators[old_index]]);
    let others = Operator::of_nodes(cluster.coordinators.iter().filter(|node| node.id != old));
    let from = ctl::revision(&etcd.endpoint()).unwrap() + 1;

    // It is stopped while it waits for a node that has joined to settle, so that it wakes with a placement to make.
    cluster.add_experts(1, &demo, &[]).unwrap();
    until("the leader to see the node", async || {
        to_old.nodes().await.iter().any(|node| node.id == "expert-3").then_some(())
    })
    .await;
    cluster.coordinators[old_index].process.signal(Signal::STOP).unwrap();
    assert_eq!(
        others.cluster().await.target_epoch,
        settled.target_epoch,
        "the node was placed before the leader stopped"
    );
    let new = until("another leader", async || {
        let leader = others.cluster().await.leader;
        (!leader.is_empty() && leader != old).then_some(leader)
    })
    .await;
    others.serves("expert-3").await;
    others.settled().await;

    // Asked as it wakes, so that it is among the first things it does.
    let asked = to_old.operate(cordon("expert-0"));
    let wake = async {
        cluster.coordinators[old_index].process.signal(Signal::CONT).unwrap();
    };
    let (cordoned, ()) = tokio::join!(asked, wake);
    assert_eq!(cordoned.leader, new, "only the new leader may write");
    others.complete(uncordon("expert-0")).await;
    cluster.add_experts(1, &demo, &[]).unwrap();
    others.serves("expert-4").await;
    others.settled().await;
    let log = || cluster.coordinators[old_index].process.stderr();
    wait_for("the old leader to say so", || Ok(log().contains("no longer leads").then_some(()))).unwrap();
    let stored = || ctl::entries(&etcd.endpoint(), "deposed").unwrap();
    let by_new = |part: &str| {
        stored().iter().any(|(key, value)| key.contains(part) && value["leader"].as_str() == Some(new.as_str()))
    };
    until("the new leader to write the load", async || by_new("/load/").then_some(())).await;
    let last = others.complete(cordon("expert-1")).await;

    let last_key = format!("/operations/{:08}", last.id);
    let history = ctl::history(&etcd.endpoint(), "deposed", from, |(key, _)| key.ends_with(&last_key)).unwrap();
    let signer = |change: &Change| {
        let (key, value) = change;
        let kept = ["placement", "operations", "load", "settings"].map(|part| format!("/sirocco/deposed/{part}/"));
        let signed = kept.iter().any(|prefix| key.starts_with(prefix));
        value.as_ref().filter(|_| signed)?["leader"].as_str().map(str::to_owned)
    };
    let takeover = history.iter().position(|change| signer(change).as_ref() == Some(&new)).unwrap();
    let signed: Vec<(&Change, String)> = history[takeover..].iter().filter_map(|c| Some((c, signer(c)?))).collect();
    for (change, signer) in &signed {
        assert_eq!(*signer, new, "{change:?}");
    }
    let part = |(change, _): &(&Change, String)| change.0.split('/').nth(3).unwrap().to_owned();
    let parts: BTreeSet<String> = signed.iter().map(part).collect();
    assert_eq!(parts, ["load", "operations", "placement"].map(str::to_owned).into());
    println!("{} signed values after the takeover, all of {new}, none of {old}", signed.len());

    for node in cluster.coordinators.iter_mut().filter(|node| node.id != old) {
        node.process.kill().unwrap();
    }
    assert_eq!(to_old.complete(uncordon("expert-1")).await.leader, old, "it stands for election again");
    println!("{} completions", clients.stop().await.completed);
}
