//! `sirocco replicas`: how many replicas experts must have and do have.

use std::collections::BTreeMap;

use anyhow::Result;
use serde::Serialize;
use sirocco_proto::wire::cluster as wire;
use tokio_util::sync::CancellationToken;
use wire::operate_request::Action;

use super::experts;
use super::operate::{self, Act};
use super::{Query, Show};
use crate::output::{self, Format, column, count, names, table};

/// What to do with replicas.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Show how many replicas experts must have and do have
    Show(Show),
    /// Set how many replicas experts must have at least
    Set(SetArgs),
}

/// Flags of `replicas set`.
#[derive(Debug, clap::Args)]
pub(crate) struct SetArgs {
    /// Replicas, each on a node of its own
    #[arg(value_parser = clap::value_parser!(u32).range(1..=64))]
    replicas: u32,
    /// Only for this layer's experts
    #[arg(long, env = "SIROCCO_LAYER", value_name = "N")]
    layer: Option<u32>,
    /// Only for this expert of the layer
    #[arg(long, env = "SIROCCO_EXPERT", value_name = "N", requires = "layer")]
    expert: Option<u32>,
    #[command(flatten)]
    act: Act,
}

/// An expert's replicas, as shown to people and programs.
#[derive(Serialize)]
struct ReplicasView {
    layer: u32,
    expert: u32,
    min_replicas: u32,
    serving: Vec<String>,
    target: Vec<String>,
}

/// Runs the command.
pub(super) async fn run(command: Command, shutdown: &CancellationToken) -> Result<()> {
    match command {
        Command::Show(show) => show.each(shutdown, view).await,
        Command::Set(args) => {
            let SetArgs { replicas, layer, expert, act } = args;
            operate::operate(act, Action::SetMinReplicas(wire::SetMinReplicas { replicas, layer, expert }), shutdown)
                .await
        }
    }
}

async fn view(query: &Query) -> Result<String> {
    let experts = experts::list(&query.coordinators, None).await?.into_iter().map(|expert| ReplicasView {
        layer: expert.layer,
        expert: expert.expert,
        min_replicas: expert.min_replicas,
        serving: expert.serving,
        target: expert.target,
    });
    let experts: Vec<ReplicasView> = experts.collect();
    output::one(query.output, &experts, || text(&experts, query.output))
}

/// The rule, what there is, and the experts that differ from the rule; all experts when wide.
fn text(experts: &[ReplicasView], format: Format) -> String {
    if experts.is_empty() {
        return "there are no experts yet".to_owned();
    }
    let usual = usual(experts);
    let replicas: usize = experts.iter().map(|expert| expert.serving.len()).sum();
    let mut lines = vec![format!(
        "at least {} of each expert unless it is listed with another number; {} of {} serve",
        count(usual.into(), "replica"),
        count(replicas as u64, "replica"),
        count(experts.len() as u64, "expert")
    )];
    let rows: Vec<Vec<String>> = experts
        .iter()
        .filter(|expert| format == Format::Wide || expert.differs(usual))
        .map(|expert| {
            vec![
                expert.layer.to_string(),
                expert.expert.to_string(),
                expert.min_replicas.to_string(),
                expert.serving.len().to_string(),
                names(&expert.serving),
                names(&expert.target),
            ]
        })
        .collect();
    if !rows.is_empty() {
        let columns = ["layer", "expert", "at least", "serving", "nodes", "target"].map(column);
        lines.extend([String::new(), table(&columns, &rows, true)]);
    }
    lines.join("\n")
}

/// The least number that most experts have.
fn usual(experts: &[ReplicasView]) -> u32 {
    let mut numbers: BTreeMap<u32, usize> = BTreeMap::new();
    for expert in experts {
        *numbers.entry(expert.min_replicas).or_default() += 1;
    }
    numbers
        .into_iter()
        .max_by_key(|&(number, experts)| (experts, std::cmp::Reverse(number)))
        .map_or(1, |(number, _)| number)
}

impl ReplicasView {
    /// Whether it must have another number than `usual`, or does.
    fn differs(&self, usual: u32) -> bool {
        self.min_replicas != usual || self.serving.len() != usual as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_experts_that_differ_from_the_rule_are_listed_unless_wide() {
        let expert = |expert, min_replicas, nodes: &[&str]| {
            let serving: Vec<String> = nodes.iter().map(|&node| node.to_owned()).collect();
            ReplicasView { layer: 0, expert, min_replicas, target: serving.clone(), serving }
        };
        let experts = [expert(0, 1, &["a"]), expert(1, 1, &["a", "b"]), expert(2, 3, &["c"]), expert(3, 1, &[])];
        let shown = |format| text(&experts, format);
        let rule =
            "at least 1 replica of each expert unless it is listed with another number; 4 replicas of 4 experts serve";
        assert!(shown(Format::Table).starts_with(rule), "{}", shown(Format::Table));
        let listed = |text: String| text.lines().skip(3).map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(listed(shown(Format::Table)).len(), 3);
        assert_eq!(listed(shown(Format::Wide)).len(), 4);
        assert_eq!(text(&[], Format::Table), "there are no experts yet");
    }
}
