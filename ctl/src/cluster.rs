//! `sirocco status | nodes | experts | placement`: a coordinator's answers.

use anyhow::Result;
use serde::Serialize;
use sirocco_proto::channel;
use sirocco_proto::cluster::ClusterServiceClient;
use sirocco_proto::tonic::transport::Channel;
use sirocco_proto::wire::cluster as wire;

use crate::Unreachable;
use crate::generate::refusal;
use crate::output::{Column, Format, bytes, column, print_list, print_one, wide};

/// Whom to ask and how to show the answer.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Query {
    /// A coordinator's gRPC address
    #[arg(long, env = "SIROCCO_COORDINATOR", value_name = "ADDR", default_value = "127.0.0.1:7400")]
    coordinator: String,
    /// How to show the answer
    #[arg(short, long, env = "SIROCCO_OUTPUT", value_enum, default_value_t)]
    output: Format,
}

/// Flags of `experts`.
#[derive(Debug, clap::Args)]
pub(crate) struct ExpertsArgs {
    /// Only this layer
    #[arg(long, env = "SIROCCO_LAYER", value_name = "N")]
    layer: Option<u32>,
    #[command(flatten)]
    query: Query,
}

/// What to do with the placement.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum PlacementCommand {
    /// Show which node each expert is on
    Show {
        /// Show the placement that is being loaded, not the one that serves
        #[arg(long, env = "SIROCCO_TARGET")]
        target: bool,
        #[command(flatten)]
        query: Query,
    },
}

#[derive(Serialize)]
struct ClusterView {
    name: String,
    state: &'static str,
    leader: Option<String>,
    model: Option<ModelView>,
    serving_epoch: u64,
    target_epoch: u64,
    problems: Vec<String>,
}

#[derive(Serialize)]
struct ModelView {
    name: String,
    fingerprint: String,
    model_type: String,
    layers: u32,
    experts_per_layer: u32,
    experts_per_token: u32,
    expert_bytes: u64,
}

/// A node, as shown to people and programs.
#[derive(Serialize)]
pub(crate) struct NodeView {
    id: String,
    role: &'static str,
    state: String,
    grpc: String,
    http: String,
    experts: u32,
    target_experts: u32,
    weight_bytes: u64,
    capacity_bytes: u64,
    serving_epoch: u64,
    device: String,
    zone: String,
    version: String,
    model_fingerprint: String,
    refused: Vec<String>,
}

#[derive(Serialize)]
struct ExpertView {
    layer: u32,
    expert: u32,
    serving: Vec<String>,
    target: Vec<String>,
    held: Vec<String>,
}

#[derive(Serialize)]
struct PlacementView {
    epoch: u64,
    /// `layers[l][e]` are the nodes of expert `e` of layer `l`.
    layers: Vec<Vec<Vec<String>>>,
}

/// Columns of a list of nodes.
pub(crate) const NODE_COLUMNS: [Column; 11] = [
    column("node"),
    column("role"),
    column("state"),
    column("grpc"),
    column("http"),
    column("experts"),
    column("weights"),
    wide("capacity"),
    wide("zone"),
    wide("device"),
    wide("version"),
];

/// Shows how the cluster is.
pub(crate) async fn status(query: Query) -> Result<()> {
    let answer = connect(&query.coordinator).await?.get_cluster(wire::GetClusterRequest {}).await;
    let cluster = ClusterView::from(answer.map_err(|status| refusal(&query.coordinator, &status))?.into_inner());
    print_one(query.output, &cluster, || cluster.text())
}

/// Lists the nodes.
pub(crate) async fn nodes(query: Query) -> Result<()> {
    print_list(query.output, &NODE_COLUMNS, &list_nodes(&query.coordinator).await?, NodeView::row)
}

/// The nodes that the coordinator at `address` knows.
pub(crate) async fn list_nodes(address: &str) -> Result<Vec<NodeView>> {
    let answer = connect(address).await?.list_nodes(wire::ListNodesRequest {}).await;
    let nodes = answer.map_err(|status| refusal(address, &status))?.into_inner().nodes;
    Ok(nodes.into_iter().map(NodeView::from).collect())
}

/// What the coordinator at `address` says is wrong with its cluster.
pub(crate) async fn problems(address: &str) -> Result<Vec<String>> {
    let answer = connect(address).await?.get_cluster(wire::GetClusterRequest {}).await;
    Ok(answer.map_err(|status| refusal(address, &status))?.into_inner().problems)
}

/// Lists the experts.
pub(crate) async fn experts(args: ExpertsArgs) -> Result<()> {
    let ExpertsArgs { layer, query } = args;
    let answer = connect(&query.coordinator).await?.list_experts(wire::ListExpertsRequest { layer }).await;
    let experts = answer.map_err(|status| refusal(&query.coordinator, &status))?.into_inner().experts;
    let experts: Vec<ExpertView> = experts.into_iter().map(ExpertView::from).collect();
    let columns = [column("layer"), column("expert"), column("serving"), column("held"), wide("target")];
    print_list(query.output, &columns, &experts, |expert| {
        let names = |nodes: &[String]| if nodes.is_empty() { "-".to_owned() } else { nodes.join(", ") };
        let ids = [expert.layer.to_string(), expert.expert.to_string()];
        ids.into_iter().chain([&expert.serving, &expert.held, &expert.target].map(|nodes| names(nodes))).collect()
    })
}

/// Shows the placement.
pub(crate) async fn placement(command: PlacementCommand) -> Result<()> {
    let PlacementCommand::Show { target, query } = command;
    let kind = if target { wire::PlacementKind::Target } else { wire::PlacementKind::Serving };
    let request = wire::GetPlacementRequest { kind: kind.into(), epoch: 0 };
    let answer = connect(&query.coordinator).await?.get_placement(request).await;
    let placement = PlacementView::from(answer.map_err(|status| refusal(&query.coordinator, &status))?.into_inner());
    print_one(query.output, &placement, || placement.text())
}

async fn connect(address: &str) -> Result<ClusterServiceClient<Channel>> {
    let channel = channel::connect(address)
        .await
        .map_err(|error| Unreachable(format!("coordinator {address}: {}", sirocco_process::chain(&error))))?;
    Ok(ClusterServiceClient::new(channel))
}

impl ClusterView {
    fn text(&self) -> String {
        let model = self.model.as_ref().map_or("none yet".to_owned(), |model| {
            format!(
                "{} ({}, {} layers of {} experts, {} each, {} for a token), {}",
                model.name,
                model.model_type,
                model.layers,
                model.experts_per_layer,
                bytes(model.expert_bytes),
                model.experts_per_token,
                &model.fingerprint[..model.fingerprint.len().min(12)],
            )
        });
        let mut lines = vec![
            format!("cluster    {}", self.name),
            format!("state      {}", self.state),
            format!("leader     {}", self.leader.as_deref().unwrap_or("none")),
            format!("model      {model}"),
            format!("placement  epoch {} serves, epoch {} is the target", self.serving_epoch, self.target_epoch),
        ];
        lines.extend(self.problems.iter().map(|problem| format!("problem    {problem}")));
        lines.join("\n")
    }
}

impl From<wire::Cluster> for ClusterView {
    fn from(cluster: wire::Cluster) -> Self {
        let state = match (cluster.serving, cluster.problems.is_empty()) {
            (true, true) => "serving",
            (true, false) => "degraded",
            (false, _) => "not serving",
        };
        Self {
            name: cluster.name,
            state,
            leader: Some(cluster.leader).filter(|leader| !leader.is_empty()),
            model: cluster.model.map(|model| ModelView {
                name: model.name,
                fingerprint: model.fingerprint,
                model_type: model.model_type,
                layers: model.layers,
                experts_per_layer: model.experts_per_layer,
                experts_per_token: model.experts_per_token,
                expert_bytes: model.expert_bytes,
            }),
            serving_epoch: cluster.serving_epoch,
            target_epoch: cluster.target_epoch,
            problems: cluster.problems,
        }
    }
}

impl NodeView {
    /// One text for each of [`NODE_COLUMNS`].
    pub(crate) fn row(&self) -> Vec<String> {
        let expert = self.role == "expert";
        let of_experts = |text: String| if expert { text } else { "-".to_owned() };
        vec![
            self.id.clone(),
            self.role.to_owned(),
            self.state.clone(),
            self.grpc.clone(),
            self.http.clone(),
            of_experts(format!("{}/{}", self.experts, self.target_experts)),
            of_experts(bytes(self.weight_bytes)),
            of_experts(bytes(self.capacity_bytes)),
            self.zone.clone(),
            self.device.clone(),
            self.version.clone(),
        ]
    }
}

impl From<wire::Node> for NodeView {
    fn from(node: wire::Node) -> Self {
        let role = match node.role() {
            wire::Role::Coordinator => "coordinator",
            wire::Role::Router => "router",
            wire::Role::Expert => "expert",
            wire::Role::Unspecified => "unknown",
        };
        Self {
            id: node.id,
            role,
            state: node.state,
            grpc: node.grpc_address,
            http: node.http_address,
            experts: node.experts,
            target_experts: node.target_experts,
            weight_bytes: node.weight_bytes,
            capacity_bytes: node.capacity_bytes,
            serving_epoch: node.serving_epoch,
            device: node.device,
            zone: node.zone,
            version: node.version,
            model_fingerprint: node.model_fingerprint,
            refused: node.refused,
        }
    }
}

impl From<wire::Expert> for ExpertView {
    fn from(expert: wire::Expert) -> Self {
        let wire::Expert { layer, expert, serving, target, held, .. } = expert;
        Self { layer, expert, serving, target, held }
    }
}

impl PlacementView {
    /// A line for each layer, a column for each expert.
    fn text(&self) -> String {
        if self.epoch == 0 {
            return "there is no such placement yet".to_owned();
        }
        let experts = self.layers.first().map_or(0, Vec::len);
        let titles: Vec<String> = (0..experts).map(|expert| format!("expert {expert}")).collect();
        let mut lines = vec![format!("epoch {}", self.epoch)];
        let width = |cell: &String| cell.len();
        let cell = |nodes: &Vec<String>| if nodes.is_empty() { "-".to_owned() } else { nodes.join(",") };
        let rows: Vec<Vec<String>> = self.layers.iter().map(|layer| layer.iter().map(cell).collect()).collect();
        let widest = rows.iter().flatten().chain(&titles).map(width).max().unwrap_or(0);
        let line = |first: &str, cells: &[String]| {
            let cells: Vec<String> = cells.iter().map(|cell| format!("{cell:<widest$}")).collect();
            format!("{first:<9}  {}", cells.join("  ")).trim_end().to_owned()
        };
        lines.push(line("", &titles));
        lines.extend(rows.iter().enumerate().map(|(layer, row)| line(&format!("layer {layer}"), row)));
        lines.join("\n")
    }
}

impl From<wire::Placement> for PlacementView {
    fn from(placement: wire::Placement) -> Self {
        let layer = |layer: wire::LayerPlacement| layer.experts.into_iter().map(|replicas| replicas.nodes).collect();
        Self { epoch: placement.epoch, layers: placement.layers.into_iter().map(layer).collect() }
    }
}
