//! `sirocco experts`: where each expert is, and how much it is asked for.

use anyhow::Result;
use serde::Serialize;
use sirocco_proto::wire::cluster as wire;

use super::client::Coordinators;
use super::{Query, Show};
use crate::output::{self, column, names, rate, wide};

/// Flags of `experts`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only this layer
    #[arg(long, env = "SIROCCO_LAYER", value_name = "N")]
    pub(super) layer: Option<u32>,
    #[command(flatten)]
    pub(super) show: Show,
}

/// An expert, as shown to people and programs.
#[derive(Serialize)]
struct ExpertView {
    layer: u32,
    expert: u32,
    serving: Vec<String>,
    target: Vec<String>,
    held: Vec<String>,
    tokens_per_s: f64,
    min_replicas: u32,
}

/// The experts of `layer`, or of all, rendered.
pub(super) async fn view(query: &Query, layer: Option<u32>) -> Result<String> {
    let experts = list(&query.coordinators, layer).await?.into_iter().map(ExpertView::from);
    let columns = [
        column("layer"),
        column("expert"),
        column("serving"),
        column("held"),
        column("tokens/s"),
        wide("target"),
        wide("min replicas"),
    ];
    output::list(query.output, &columns, &experts.collect::<Vec<_>>(), |expert| {
        vec![
            expert.layer.to_string(),
            expert.expert.to_string(),
            names(&expert.serving),
            names(&expert.held),
            rate(expert.tokens_per_s),
            names(&expert.target),
            expert.min_replicas.to_string(),
        ]
    })
}

/// The experts of `layer`, or of all, as the coordinators know them.
pub(super) async fn list(coordinators: &Coordinators, layer: Option<u32>) -> Result<Vec<wire::Expert>> {
    let request = wire::ListExpertsRequest { layer };
    let answer = coordinators.ask(async |mut client| Ok(client.list_experts(request).await?.into_inner())).await?;
    Ok(answer.experts)
}

impl From<wire::Expert> for ExpertView {
    fn from(expert: wire::Expert) -> Self {
        let wire::Expert { layer, expert, serving, target, held, tokens_per_s, min_replicas } = expert;
        Self { layer, expert, serving, target, held, tokens_per_s, min_replicas }
    }
}
