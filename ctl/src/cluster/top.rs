//! `sirocco top`: the cluster on one screen, what is busiest first.

use std::collections::HashMap;
use std::time::Duration;

use anyhow::Result;
use serde::Serialize;
use sirocco_proto::tonic::Status;
use sirocco_proto::wire::cluster as wire;
use tokio_util::sync::CancellationToken;

use super::Query;
use super::client::Client;
use super::events::{self, OperationView, oldest_first};
use super::load::{LoadView, percent};
use super::nodes::NodeView;
use super::placement::PlacementView;
use super::status::ClusterView;
use crate::output::{self, Format, column, names, rate, table};
use crate::terminal::{self, Paint};
use crate::watch::{self, seconds};

/// How many of each list there is room for; wide shows all.
#[derive(Clone, Copy)]
struct Room {
    nodes: usize,
    experts: usize,
    operations: usize,
}

/// For a terminal of 24 lines.
const LOW: Room = Room { nodes: 6, experts: 3, operations: 3 };

/// For one of 40 lines and more, and for files.
const HIGH: Room = Room { nodes: 12, experts: 8, operations: 6 };

/// Experts that programs are told of.
const HOTTEST: usize = 32;

/// Operations that are looked through for those under way.
const OPERATIONS: u32 = 50;

/// Characters of a node's busy bar.
const BAR: usize = 20;

/// Flags of `top`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Show it once and end
    #[arg(long, env = "SIROCCO_ONCE")]
    once: bool,
    /// Show it again every so many seconds until Ctrl-C
    #[arg(
        long,
        env = "SIROCCO_WATCH",
        value_name = "SECONDS",
        num_args = 0..=1,
        default_value = "2",
        default_missing_value = "2",
        value_parser = seconds
    )]
    watch: Duration,
    #[command(flatten)]
    query: Query,
}

/// What the screen shows, as given to programs.
#[derive(Serialize)]
struct TopView {
    cluster: ClusterView,
    load: BalanceView,
    /// Expert nodes, the busiest first.
    nodes: Vec<TopNode>,
    /// The experts asked for most, the hottest first.
    hottest: Vec<HotExpert>,
    running: Vec<OperationView>,
    /// The newest last.
    latest: Vec<OperationView>,
}

/// How even the load is.
#[derive(Serialize)]
struct BalanceView {
    live: bool,
    imbalance: f64,
    predicted_imbalance: f64,
    #[serde(skip)]
    text: String,
}

#[derive(Serialize)]
struct TopNode {
    id: String,
    state: String,
    busy: f64,
    queue: f64,
    rows_per_s: f64,
    batch_rows: f64,
    experts: u32,
    target_experts: u32,
}

#[derive(Serialize)]
struct HotExpert {
    layer: u32,
    expert: u32,
    tokens_per_s: f64,
    /// Of its layer's tokens, over an even share.
    times_even: f64,
    nodes: Vec<String>,
}

/// Shows the screen, again and again unless once is enough.
pub(super) async fn run(args: &Args, shutdown: &CancellationToken) -> Result<()> {
    let view = async || {
        let top = args.query.coordinators.ask(ask).await?;
        output::one(args.query.output, &top, || top.text(args.query.output))
    };
    if args.once {
        return output::print(&view().await?);
    }
    watch::repeat(args.watch, args.query.output, shutdown, view).await
}

/// Everything the screen shows, from one coordinator.
async fn ask(client: Client) -> Result<TopView, Status> {
    let [mut first, mut second, mut third, mut fourth, mut fifth] = std::array::from_fn(|_| client.clone());
    let serving = wire::GetPlacementRequest { kind: wire::PlacementKind::Serving.into(), epoch: 0 };
    let (cluster, nodes, load, placement, operations) = tokio::try_join!(
        first.get_cluster(wire::GetClusterRequest {}),
        second.list_nodes(wire::ListNodesRequest {}),
        third.get_load(wire::GetLoadRequest {}),
        fourth.get_placement(serving),
        fifth.list_operations(wire::ListOperationsRequest { limit: OPERATIONS }),
    )?;
    let load = LoadView::from(load.into_inner());
    let placement = PlacementView::from(placement.into_inner());
    let latest = oldest_first(operations.into_inner());
    Ok(TopView {
        cluster: ClusterView::from(cluster.into_inner()),
        nodes: busiest(nodes.into_inner().nodes, &load),
        hottest: hottest(&load, &placement),
        running: latest.iter().filter(|operation| operation.state == "running").cloned().collect(),
        latest,
        load: BalanceView {
            live: load.live,
            imbalance: load.imbalance,
            predicted_imbalance: load.predicted_imbalance,
            text: load.balance(),
        },
    })
}

/// The expert nodes with their load, the busiest first.
fn busiest(nodes: Vec<wire::Node>, load: &LoadView) -> Vec<TopNode> {
    let loads: HashMap<&str, _> = load.nodes.iter().map(|node| (node.id.as_str(), node)).collect();
    let experts = nodes.into_iter().map(NodeView::from).filter(|node| node.role == "expert");
    let mut nodes: Vec<TopNode> = experts
        .map(|node| {
            let load = loads.get(node.id.as_str());
            TopNode {
                state: node.state(),
                busy: load.map_or(0.0, |load| load.busy),
                queue: load.map_or(0.0, |load| load.queue),
                rows_per_s: load.map_or(0.0, |load| load.rows_per_s),
                batch_rows: load.map_or(0.0, |load| load.batch_rows),
                experts: node.experts,
                target_experts: node.target_experts,
                id: node.id,
            }
        })
        .collect();
    nodes.sort_by(|a, b| b.busy.total_cmp(&a.busy).then_with(|| a.id.cmp(&b.id)));
    nodes
}

/// The experts that are asked for most, the hottest first; none that nobody asks for.
fn hottest(load: &LoadView, placement: &PlacementView) -> Vec<HotExpert> {
    let mut experts: Vec<HotExpert> = load
        .layers
        .iter()
        .flat_map(|layer| {
            let even = layer.tokens_per_s.iter().sum::<f64>() / layer.tokens_per_s.len() as f64;
            let asked_for = layer.tokens_per_s.iter().enumerate().filter(|(_, tokens)| **tokens > 0.0);
            asked_for.map(move |(expert, &tokens_per_s)| HotExpert {
                layer: layer.layer,
                expert: expert as u32,
                tokens_per_s,
                times_even: tokens_per_s / even,
                nodes: placement.nodes(layer.layer, expert).to_vec(),
            })
        })
        .collect();
    experts.sort_by(|a, b| {
        b.tokens_per_s.total_cmp(&a.tokens_per_s).then_with(|| (a.layer, a.expert).cmp(&(b.layer, b.expert)))
    });
    experts.truncate(HOTTEST);
    experts
}

impl TopView {
    fn text(&self, format: Format) -> String {
        let wide = format == Format::Wide;
        let room = if terminal::height().is_some_and(|lines| lines < 40) { LOW } else { HIGH };
        let fit = |count: usize, room: usize| if wide { count } else { count.min(room) };
        let mut parts = vec![self.head()];
        if !self.nodes.is_empty() {
            parts.push(nodes(&self.nodes[..fit(self.nodes.len(), room.nodes)], self.nodes.len()));
        }
        if !self.hottest.is_empty() {
            parts.push(experts(&self.hottest[..fit(self.hottest.len(), room.experts)]));
        }
        let latest = &self.latest[self.latest.len() - fit(self.latest.len(), room.operations)..];
        for (title, operations) in [("under way", self.running.as_slice()), ("latest", latest)] {
            if !operations.is_empty() {
                let rows: Vec<Vec<String>> = operations.iter().map(OperationView::row).collect();
                parts.push(format!("{title}\n{}", table(&events::COLUMNS, &rows, wide)));
            }
        }
        parts.join("\n\n")
    }

    /// How the cluster is, and what is wrong with it.
    fn head(&self) -> String {
        let cluster = &self.cluster;
        let live = if self.load.live { "" } else { ", not measured now" };
        let first = format!(
            "{}: {}, leader {}, epoch {} serves, {} is the target, imbalance {}{live}",
            cluster.name,
            cluster.state,
            cluster.leader.as_deref().unwrap_or("none"),
            cluster.serving_epoch,
            cluster.target_epoch,
            self.load.text
        );
        let problems = cluster.problems.iter().map(|problem| format!("problem: {problem}"));
        std::iter::once(first).chain(problems).collect::<Vec<_>>().join("\n")
    }
}

/// A line for each of `nodes`, of `all` that there are.
fn nodes(nodes: &[TopNode], all: usize) -> String {
    let paint = Paint::here();
    let columns = ["node", "busy", "", "queue", "rows/s", "rows in a batch", "experts", "state"].map(column);
    let rows: Vec<Vec<String>> = nodes
        .iter()
        .map(|node| {
            vec![
                node.id.clone(),
                paint.bar(node.busy, BAR),
                percent(node.busy),
                rate(node.queue),
                rate(node.rows_per_s),
                rate(node.batch_rows),
                format!("{}/{}", node.experts, node.target_experts),
                node.state.clone(),
            ]
        })
        .collect();
    let rest = all - nodes.len();
    let more = if rest > 0 { format!("\nand {rest} less busy, which -o wide shows") } else { String::new() };
    format!("{}{more}", table(&columns, &rows, true))
}

fn experts(experts: &[HotExpert]) -> String {
    let columns = ["layer", "expert", "tokens/s", "times even", "nodes"].map(column);
    let rows: Vec<Vec<String>> = experts
        .iter()
        .map(|expert| {
            vec![
                expert.layer.to_string(),
                expert.expert.to_string(),
                rate(expert.tokens_per_s),
                format!("{:.1}", expert.times_even),
                names(&expert.nodes),
            ]
        })
        .collect();
    table(&columns, &rows, true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_busiest_nodes_and_the_hottest_experts_come_first() {
        let node =
            |id: &str, role: wire::Role| wire::Node { id: id.into(), role: role.into(), ..wire::Node::default() };
        let nodes = ["expert-0", "expert-1", "expert-2"].map(|id| node(id, wire::Role::Expert)).into_iter();
        let nodes = nodes.chain([node("router-0", wire::Role::Router)]).collect();
        let busy = |id: &str, busy| wire::NodeLoad { id: id.into(), busy, ..wire::NodeLoad::default() };
        let layer = |layer, tokens_per_s: &[f64]| wire::LayerLoad {
            layer,
            tokens_per_s: tokens_per_s.to_vec(),
            imbalance: 1.0,
        };
        let load = LoadView::from(wire::Load {
            layers: vec![layer(0, &[1.0, 3.0]), layer(1, &[0.0, 4.0])],
            nodes: vec![busy("expert-1", 0.2), busy("expert-2", 0.9)],
            ..wire::Load::default()
        });
        let ids: Vec<String> = busiest(nodes, &load).into_iter().map(|node| node.id).collect();
        assert_eq!(ids, ["expert-2", "expert-1", "expert-0"]);
        let placement = PlacementView::from(wire::Placement::default());
        let hot = hottest(&load, &placement);
        let hot: Vec<_> = hot.iter().map(|hot| (hot.layer, hot.expert, hot.times_even)).collect();
        assert_eq!(hot, [(1, 1, 2.0), (0, 1, 1.5), (0, 0, 0.5)]);
    }
}
