//! `sirocco status`: how the cluster is, and what is wrong with it.

use anyhow::Result;
use serde::Serialize;
use sirocco_proto::wire::cluster as wire;

use super::Query;
use super::client::Coordinators;
use sirocco_types::Bytes;

use crate::output::{self, imbalance};

/// A cluster, as shown to people and programs.
#[derive(Serialize)]
pub(super) struct ClusterView {
    pub(super) name: String,
    pub(super) state: &'static str,
    pub(super) leader: Option<String>,
    model: Option<ModelView>,
    pub(super) serving_epoch: u64,
    pub(super) target_epoch: u64,
    pub(super) imbalance: f64,
    pub(super) problems: Vec<String>,
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

/// The cluster, rendered.
pub(super) async fn view(query: &Query) -> Result<String> {
    let cluster = ClusterView::from(get(&query.coordinators).await?);
    output::one(query.output, &cluster, || cluster.text())
}

/// What the coordinator at `address` says is wrong with its cluster.
pub(crate) async fn problems(address: &str) -> Result<Vec<String>> {
    Ok(get(&Coordinators::at(address)).await?.problems)
}

async fn get(coordinators: &Coordinators) -> Result<wire::Cluster> {
    let request = wire::GetClusterRequest {};
    coordinators.ask(async |mut client| Ok(client.get_cluster(request).await?.into_inner())).await
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
                Bytes(model.expert_bytes),
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
            format!("imbalance  {}", self.imbalance()),
        ];
        lines.extend(self.problems.iter().map(|problem| format!("problem    {problem}")));
        lines.join("\n")
    }

    fn imbalance(&self) -> String {
        if self.imbalance > 0.0 {
            format!("{} (the slowest node's time over the mean node's)", imbalance(self.imbalance))
        } else {
            "not measured yet".to_owned()
        }
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
            imbalance: cluster.imbalance,
            problems: cluster.problems,
        }
    }
}
