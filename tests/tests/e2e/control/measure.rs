//! How long the control plane takes, beside the limits it must keep. Meant for release builds on an otherwise idle machine.

use std::time::Duration;

use sirocco_testkit::etcd::{Etcd, ctl};
use sirocco_testkit::repository;
use tokio::time::Instant;

use super::clients::Clients;
use super::operator::{Operator, cordon, drain, uncordon};
use super::succession::Succession;
use super::{Size, demo_cluster, until};

/// How often each time is taken.
const RUNS: usize = 5;

/// How long writes are counted.
const WINDOW: Duration = Duration::from_secs(30);

const JOIN_LIMIT_S: f64 = 3.0;
const TAKEOVER_LIMIT_S: f64 = 10.0;
const WRITES_LIMIT_PER_S: f64 = 5.0;

/// Prints the best and the median of `times`, in seconds, and returns the median.
fn report(what: &str, mut times: Vec<Duration>, limit: &str) -> f64 {
    times.sort_unstable();
    let (best, median) = (times[0].as_secs_f64(), times[times.len() / 2].as_secs_f64());
    println!("{what:<44} best {best:6.2} s   median {median:6.2} s   {limit}");
    median
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement: cargo xtask bench control"]
async fn joins_takeovers_and_writes_keep_their_limits() {
    let etcd = Etcd::start().unwrap();
    let demo = repository("models/demo");
    let size = Size { coordinators: 3, routers: 1, experts: 8 };
    let mut cluster = demo_cluster(&etcd.endpoint(), "measured", size, &[]);
    let clients = Clients::of_goldens(&[&cluster.routers[0].grpc], 8);
    clients.progress(50).await;

    let (began, first) = (Instant::now(), ctl::revision(&etcd.endpoint()).unwrap());
    until("writes to be counted", async || (began.elapsed() >= WINDOW).then_some(())).await;
    let writes = (ctl::revision(&etcd.endpoint()).unwrap() - first) as f64 / began.elapsed().as_secs_f64();

    let (mut joins, mut drains, mut takeovers) = (Vec::new(), Vec::new(), Vec::new());
    let operator = Operator::of(&cluster);
    for run in 0..RUNS {
        let began = Instant::now();
        cluster.add_experts(1, &demo, &[]).unwrap();
        operator.serves(&format!("expert-{}", size.experts + run)).await;
        operator.settled().await;
        joins.push(began.elapsed());
    }
    for run in 0..RUNS {
        let began = Instant::now();
        operator.complete(drain(&format!("expert-{run}"))).await;
        drains.push(began.elapsed());
        operator.settled().await;
    }
    let mut leaders = Succession::default();
    for run in 0..RUNS {
        let dead = leaders.kill_leader(&mut cluster).await;
        let operator = Operator::of(&cluster);
        let action = if run % 2 == 0 { cordon("expert-7") } else { uncordon("expert-7") };
        assert_ne!(operator.complete(action).await.leader, dead.id);
        takeovers.push(dead.at.elapsed());
    }
    let completed = clients.stop().await.completed;

    let join = report("node started to serving its share", joins, &format!("limit {JOIN_LIMIT_S} s"));
    let killed = "leader killed to a cordon by the next";
    let takeover = report(killed, takeovers, &format!("limit {TAKEOVER_LIMIT_S} s"));
    report("drain asked to node free", drains, "");
    println!("{:<44} {writes:.2} a second   limit {WRITES_LIMIT_PER_S}", "etcd writes under load, 8 clients");
    println!("{completed} completions meanwhile, none failed, all the same");
    assert!(join < JOIN_LIMIT_S && takeover < TAKEOVER_LIMIT_S && writes < WRITES_LIMIT_PER_S);
}
