//! `sirocco nodes`: who is there.

use anyhow::Result;
use serde::Serialize;
use sirocco_proto::wire::cluster as wire;

use super::Query;
use super::client::Coordinators;
use sirocco_types::Bytes;

use crate::output::{self, Column, column, wide};

/// A node, as shown to people and programs.
#[derive(Serialize)]
pub(crate) struct NodeView {
    pub(super) id: String,
    pub(super) role: &'static str,
    /// What the node says of itself.
    state: String,
    /// What an operator said of it.
    cordon: Option<String>,
    grpc: String,
    http: String,
    pub(super) experts: u32,
    pub(super) target_experts: u32,
    weight_bytes: u64,
    capacity_bytes: u64,
    speed: u32,
    max_experts_per_layer: Option<u32>,
    serving_epoch: u64,
    device: String,
    zone: String,
    version: String,
    model_fingerprint: String,
    refused: Vec<String>,
}

/// Columns of a list of nodes.
pub(crate) const NODE_COLUMNS: [Column; 13] = [
    column("node"),
    column("role"),
    column("state"),
    column("grpc"),
    column("http"),
    column("experts"),
    column("weights"),
    wide("capacity"),
    wide("speed"),
    wide("slots"),
    wide("zone"),
    wide("device"),
    wide("version"),
];

/// The nodes, rendered.
pub(super) async fn view(query: &Query) -> Result<String> {
    output::list(query.output, &NODE_COLUMNS, &list(&query.coordinators).await?, NodeView::row)
}

/// The nodes that the coordinator at `address` knows.
pub(crate) async fn list_nodes(address: &str) -> Result<Vec<NodeView>> {
    list(&Coordinators::at(address)).await
}

/// The nodes that the coordinators know.
pub(super) async fn list(coordinators: &Coordinators) -> Result<Vec<NodeView>> {
    let request = wire::ListNodesRequest {};
    let answer = coordinators.ask(async |mut client| Ok(client.list_nodes(request).await?.into_inner())).await?;
    Ok(answer.nodes.into_iter().map(NodeView::from).collect())
}

impl NodeView {
    /// One text for each of [`NODE_COLUMNS`].
    pub(crate) fn row(&self) -> Vec<String> {
        let expert = self.role == "expert";
        let of_experts = |text: String| if expert { text } else { "-".to_owned() };
        vec![
            self.id.clone(),
            self.role.to_owned(),
            self.state(),
            self.grpc.clone(),
            self.http.clone(),
            of_experts(format!("{}/{}", self.experts, self.target_experts)),
            of_experts(Bytes(self.weight_bytes).to_string()),
            of_experts(Bytes(self.capacity_bytes).to_string()),
            of_experts(format!("{}%", self.speed)),
            of_experts(self.max_experts_per_layer.map_or("any".to_owned(), |slots| slots.to_string())),
            self.zone.clone(),
            self.device.clone(),
            self.version.clone(),
        ]
    }

    /// What a person needs to know of its state: an operator's word on it says more than that it is ready.
    pub(super) fn state(&self) -> String {
        match &self.cordon {
            None => self.state.clone(),
            Some(cordon) if self.state == "ready" => cordon.clone(),
            Some(cordon) => format!("{}, {cordon}", self.state),
        }
    }

    /// Whether it is an expert node that keeps its experts: it is not stopping, and no operator has them moved away.
    pub(super) fn keeps_experts(&self) -> bool {
        self.role == "expert" && self.state != "draining" && matches!(self.cordon.as_deref(), None | Some("cordoned"))
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
            cordon: Some(node.cordon).filter(|cordon| !cordon.is_empty()),
            grpc: node.grpc_address,
            http: node.http_address,
            experts: node.experts,
            target_experts: node.target_experts,
            weight_bytes: node.weight_bytes,
            capacity_bytes: node.capacity_bytes,
            speed: node.speed,
            max_experts_per_layer: Some(node.max_experts_per_layer).filter(|slots| *slots > 0),
            serving_epoch: node.serving_epoch,
            device: node.device,
            zone: node.zone,
            version: node.version,
            model_fingerprint: node.model_fingerprint,
            refused: node.refused,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_column_shows_an_operators_word() {
        let cases = [
            ("ready", "", "ready"),
            ("ready", "cordoned", "cordoned"),
            ("ready", "drained", "drained"),
            ("draining", "", "draining"),
            ("draining", "drained", "draining, drained"),
            ("starting", "cordoned", "starting, cordoned"),
        ];
        for (state, cordon, shown) in cases {
            let role = wire::Role::Expert.into();
            let node = wire::Node { role, state: state.into(), cordon: cordon.into(), ..wire::Node::default() };
            let node = NodeView::from(node);
            assert_eq!(node.state(), shown);
            assert_eq!(node.keeps_experts(), !shown.contains("drain"), "{shown}");
            assert_eq!(node.row().len(), NODE_COLUMNS.len());
        }
    }
}
