//! `sirocco placement`: which expert is on which node, has been, and would be.

use anyhow::Result;
use serde::Serialize;
use sirocco_proto::wire::cluster as wire;
use tokio_util::sync::CancellationToken;

use super::{Query, Show, history, operate, plan};
use crate::output::{self, names};
use crate::terminal;

/// What to do with the placement.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Show which node each expert is on
    Show(Args),
    /// Show what the planner would do now, with these nodes or with others; changes nothing
    Plan(plan::Args),
    /// List the placements that are kept
    History(Show),
    /// Bring an earlier placement back, under a new epoch
    Rollback(operate::RollbackArgs),
}

/// Flags of `placement show`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Show the placement that is being loaded, not the one that serves
    #[arg(long, env = "SIROCCO_TARGET", conflicts_with = "epoch")]
    target: bool,
    /// Show this placement, while it is kept
    #[arg(long, env = "SIROCCO_EPOCH", value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    epoch: Option<u64>,
    #[command(flatten)]
    show: Show,
}

/// A placement, as shown to people and programs.
#[derive(Serialize)]
pub(super) struct PlacementView {
    epoch: u64,
    /// `layers[l][e]` are the nodes of expert `e` of layer `l`.
    pub(super) layers: Vec<Vec<Vec<String>>>,
}

/// Runs the command.
pub(super) async fn run(command: Command, shutdown: &CancellationToken) -> Result<()> {
    match command {
        Command::Show(args) => args.show.each(shutdown, async |query| view(query, &args).await).await,
        Command::Plan(args) => plan::run(args).await,
        Command::History(show) => show.each(shutdown, history::view).await,
        Command::Rollback(args) => operate::rollback(args, shutdown).await,
    }
}

async fn view(query: &Query, args: &Args) -> Result<String> {
    let kind = if args.target { wire::PlacementKind::Target } else { wire::PlacementKind::Serving };
    let request = wire::GetPlacementRequest { kind: kind.into(), epoch: args.epoch.unwrap_or(0) };
    let answer = query.coordinators.ask(async |mut client| Ok(client.get_placement(request).await?.into_inner()));
    let placement = PlacementView::from(answer.await?);
    output::one(query.output, &placement, || placement.text(terminal::width().unwrap_or(usize::MAX)))
}

impl PlacementView {
    /// A line for each layer, a column for each expert; where that is wider than `width`, a line for each expert.
    fn text(&self, width: usize) -> String {
        if self.epoch == 0 {
            return "there is no such placement yet".to_owned();
        }
        let grid = self.grid();
        let body = if grid.lines().all(|line| line.len() <= width) { grid } else { self.lines() };
        format!("epoch {}\n{body}", self.epoch)
    }

    /// The nodes of an expert; none when it is not placed.
    pub(super) fn nodes(&self, layer: u32, expert: usize) -> &[String] {
        self.layers.get(layer as usize).and_then(|layer| layer.get(expert)).map_or(&[], Vec::as_slice)
    }

    fn grid(&self) -> String {
        let experts = self.layers.first().map_or(0, Vec::len);
        let titles: Vec<String> = (0..experts).map(|expert| format!("expert {expert}")).collect();
        let cell = |nodes: &Vec<String>| if nodes.is_empty() { "-".to_owned() } else { nodes.join(",") };
        let rows: Vec<Vec<String>> = self.layers.iter().map(|layer| layer.iter().map(cell).collect()).collect();
        let widest = rows.iter().flatten().chain(&titles).map(String::len).max().unwrap_or(0);
        let line = |first: &str, cells: &[String]| {
            let cells: Vec<String> = cells.iter().map(|cell| format!("{cell:<widest$}")).collect();
            format!("{first:<9}  {}", cells.join("  ")).trim_end().to_owned()
        };
        let head = line("", &titles);
        let layers = rows.iter().enumerate().map(|(layer, row)| line(&format!("layer {layer}"), row));
        std::iter::once(head).chain(layers).collect::<Vec<_>>().join("\n")
    }

    fn lines(&self) -> String {
        let layer = |(layer, experts): (usize, &Vec<Vec<String>>)| {
            let experts = experts.iter().enumerate();
            let lines = experts.map(|(expert, nodes)| format!("  expert {expert:<4}  {}", names(nodes)));
            std::iter::once(format!("layer {layer}")).chain(lines).collect::<Vec<_>>().join("\n")
        };
        self.layers.iter().enumerate().map(layer).collect::<Vec<_>>().join("\n")
    }
}

impl From<wire::Placement> for PlacementView {
    fn from(placement: wire::Placement) -> Self {
        let layer = |layer: wire::LayerPlacement| layer.experts.into_iter().map(|replicas| replicas.nodes).collect();
        Self { epoch: placement.epoch, layers: placement.layers.into_iter().map(layer).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_placement_is_a_grid_where_it_fits_and_a_list_where_it_does_not() {
        let nodes = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
        let layers = vec![vec![nodes(&["expert-0", "expert-1"]), nodes(&[])]];
        let placement = PlacementView { epoch: 4, layers };
        let grid = "epoch 4\n           expert 0           expert 1\nlayer 0    expert-0,expert-1  -";
        assert_eq!(placement.text(80), grid);
        assert_eq!(placement.text(20), "epoch 4\nlayer 0\n  expert 0     expert-0, expert-1\n  expert 1     -");
        assert_eq!(PlacementView { epoch: 0, layers: vec![] }.text(80), "there is no such placement yet");
    }
}
