//! Faults under load: each of the table in docs/faults.md alone, and many in an order that a seed decides. No request fails, no
//! byte changes, and the cluster comes to rest.
//!
//! The short forms run with all tests; `cargo xtask chaos` runs the long ones, which measure.

mod control_rows;
mod disk;
mod figure;
mod load;
mod rows;
mod scene;
mod schedule;
mod table;
mod versions;

use std::time::Duration;

use figure::Table;
use rows::Form;
use scene::{Scene, Start};

use crate::control::Size;

/// A cluster that has lost nothing when it has lost one of each kind.
const SMALL: Start<'static> = Start {
    name: "turns",
    size: Size { coordinators: 2, routers: 2, experts: 5 },
    etcd_members: 3,
    replicas: 2,
    streams: 8,
    envs: &[],
    clocks: false,
};

/// Long enough for what a fault does at once, on a machine that does other things besides.
const SHORT: Form = Form { watch: Duration::from_secs(2), leniency: 20.0 };

#[tokio::test(flavor = "multi_thread")]
async fn faults_one_after_the_other_fail_no_request_and_change_no_byte() {
    let (mut scene, mut table) = (Scene::start(SMALL).await, Table::default());
    table.add(rows::frozen(&mut scene, 1, SHORT).await);
    table.add(rows::slow(&mut scene, 2, SHORT).await);
    table.add(rows::lossy(&mut scene, 3, SHORT).await);
    table.add(rows::cut_off(&mut scene, 4, SHORT).await);
    table.add(rows::corrupt(&mut scene, 0, SHORT).await);
    table.add(versions::mixed(&mut scene, 1, SHORT).await);
    table.add(control_rows::coordinators_cut_off(&mut scene, SHORT).await);
    table.add(control_rows::etcd_stopped(&mut scene, SHORT).await);
    table.add(control_rows::quorum_lost(&mut scene, SHORT).await);
    table.add(control_rows::rolled(&mut scene, SHORT).await);
    assert_eq!(scene.end().await.wrong, Vec::<String>::new());
    table.all_kept();
}

/// What `variable` says, or `otherwise`.
fn setting(variable: &str, otherwise: u64) -> u64 {
    std::env::var(variable).ok().map_or(otherwise, |value| value.parse().unwrap())
}

/// Random faults for `time`, each as long as `longest` at most.
async fn random_faults(time: Duration, longest: Duration, otherwise: u64) {
    let seed = setting("SIROCCO_CHAOS_SEED", otherwise);
    println!("cargo xtask chaos --seed {seed} --minutes {}", time.as_secs().div_ceil(60));
    let mut scene = Scene::start(Start { name: "chaos", clocks: true, ..SMALL }).await;
    schedule::run(&mut scene, SMALL.size, seed, time, longest).await;
    let tally = scene.end().await;
    assert_eq!(tally.wrong, Vec::<String>::new());
    println!("{} completed, {} of them at a second router, none failed or changed", tally.completed, tally.relayed);
}

#[tokio::test(flavor = "multi_thread")]
async fn random_faults_fail_no_request_and_change_no_byte() {
    random_faults(Duration::from_secs(15), Duration::from_secs(2), 4).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes long: cargo xtask chaos"]
async fn random_faults_fail_no_request_and_change_no_byte_for_long() {
    let minutes = setting("SIROCCO_CHAOS_MINUTES", 10);
    random_faults(Duration::from_secs(60 * minutes), Duration::from_secs(20), 1).await;
}
