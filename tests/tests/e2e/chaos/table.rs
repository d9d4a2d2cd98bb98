//! Each fault alone, for as long as it takes to see what it does, beside its bar: what `cargo xtask chaos table` prints.

use std::time::Duration;

use super::figure::Table;
use super::rows::Form;
use super::scene::{Scene, Start};
use super::{SMALL, control_rows, rows, versions};
use crate::control::Size;

/// The cluster that figures are measured of.
const LARGE: Start<'static> =
    Start { size: Size { coordinators: 2, routers: 2, experts: 9 }, streams: 16, name: "table", ..SMALL };

/// At most one expert of each layer on a node, one node more than experts, and no replica.
const ALONE: Start<'static> = Start {
    name: "alone",
    size: Size { coordinators: 1, routers: 1, experts: 9 },
    etcd_members: 1,
    replicas: 1,
    envs: &[("SIROCCO_MAX_EXPERTS_PER_LAYER", "1")],
    ..LARGE
};

/// How often the leader dies in a row.
const LEADERS: usize = 20;

const fn seconds(seconds: u64) -> Form {
    Form { watch: Duration::from_secs(seconds), leniency: 1.0 }
}

/// Lets the streams end; panics when one of them failed or a bar was missed.
async fn end(scene: Scene, table: Table) {
    assert_eq!(scene.end().await.wrong, Vec::<String>::new());
    table.all_kept();
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement: cargo xtask chaos table"]
async fn expert_nodes_fail() {
    let (mut scene, mut table) = (Scene::start(LARGE).await, Table::default());
    table.add(rows::killed(&mut scene, 1, seconds(10)).await);
    table.add(rows::frozen(&mut scene, 2, seconds(10)).await);
    table.add(rows::slow(&mut scene, 3, seconds(10)).await);
    table.add(rows::lossy(&mut scene, 4, seconds(10)).await);
    table.add(rows::cut_off(&mut scene, 5, seconds(10)).await);
    table.add(rows::starved(&mut scene, 6, seconds(10)).await);
    table.add(versions::mixed(&mut scene, 7, seconds(10)).await);
    table.add(rows::corrupt(&mut scene, 8, seconds(10)).await);
    end(scene, table).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement: cargo xtask chaos table"]
async fn an_expert_node_without_replicas_fails() {
    let (mut scene, mut table) = (Scene::start(ALONE).await, Table::default());
    table.add(rows::killed_alone(&mut scene, 1, seconds(30)).await);
    end(scene, table).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement: cargo xtask chaos table"]
async fn the_store_fails_and_everything_restarts() {
    let (mut scene, mut table) = (Scene::start(LARGE).await, Table::default());
    table.add(control_rows::coordinators_cut_off(&mut scene, seconds(30)).await);
    table.add(control_rows::etcd_stopped(&mut scene, seconds(60)).await);
    table.add(control_rows::quorum_lost(&mut scene, seconds(20)).await);
    table.add(control_rows::rolled(&mut scene, seconds(10)).await);
    end(scene, table).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement: cargo xtask chaos table"]
async fn leaders_die_and_clocks_jump() {
    let mut table = Table::default();
    let mut scene = Scene::start(Start { name: "clocks", clocks: true, ..SMALL }).await;
    table.add(rows::jumped(&mut scene, seconds(10)).await);
    table.add(control_rows::leaders_killed(&mut scene, seconds(10), LEADERS).await);
    end(scene, table).await;
}
