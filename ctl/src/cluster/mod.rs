//! The operator's commands: what coordinators answer, shown, and what they are told to do.
//!
//! A module for each command. One that shows something renders a coordinator's answer to one text, so that `--watch` can render
//! the next; one that changes something gives its order once (`operate`) and waits for the operation's end. No command decides
//! anything: that is the coordinator's part.

mod client;
mod events;
mod experts;
mod heat;
mod history;
mod load;
mod nodes;
mod operate;
mod placement;
mod plan;
mod replicas;
mod status;
mod top;

use anyhow::Result;
use tokio_util::sync::CancellationToken;

use crate::output::Format;
use crate::watch::Watch;
use client::Coordinators;
pub(crate) use nodes::{NODE_COLUMNS, NodeView, list_nodes};
pub(crate) use status::problems;

/// The commands that talk to coordinators.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Show how the cluster is
    Status(Show),
    /// List the nodes
    Nodes(Show),
    /// List the experts and where they are
    Experts(experts::Args),
    /// Show how loaded the experts and the nodes are
    Load(load::Args),
    /// Watch the cluster on one screen
    Top(top::Args),
    /// List what was done to the cluster, by whom, and what came of it
    Events(events::Args),
    /// Show which expert is placed where, plan, and bring earlier placements back
    #[command(subcommand)]
    Placement(placement::Command),
    /// Show or set how many replicas experts must have
    #[command(subcommand)]
    Replicas(replicas::Command),
    /// Give a node no new experts
    Cordon(operate::NodeArgs),
    /// Let a node have experts again
    Uncordon(operate::NodeArgs),
    /// Move a node's experts elsewhere, so that it can be stopped
    Drain(operate::NodeArgs),
    /// Place the experts anew by their load
    Rebalance(operate::RebalanceArgs),
}

/// Whom to ask and how to show the answer.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Query {
    #[command(flatten)]
    coordinators: Coordinators,
    /// How to show the answer
    #[arg(short, long, env = "SIROCCO_OUTPUT", value_enum, default_value_t)]
    output: Format,
}

/// Whom to ask, how to show the answer, and whether to do so again.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Show {
    #[command(flatten)]
    query: Query,
    #[command(flatten)]
    watch: Watch,
}

impl Show {
    /// Shows what `view` makes of the coordinators' answers, once or until `shutdown`.
    async fn each(&self, shutdown: &CancellationToken, view: impl AsyncFn(&Query) -> Result<String>) -> Result<()> {
        self.watch.show(self.query.output, shutdown, async || view(&self.query).await).await
    }
}

/// Runs the command; `shutdown` ends it early, which is the usual end of one that watches.
pub(crate) async fn run(command: Command, shutdown: &CancellationToken) -> Result<()> {
    match command {
        Command::Status(show) => show.each(shutdown, status::view).await,
        Command::Nodes(show) => show.each(shutdown, nodes::view).await,
        Command::Experts(args) => args.show.each(shutdown, async |query| experts::view(query, args.layer).await).await,
        Command::Load(args) => args.show.each(shutdown, async |query| load::view(query, args.layer).await).await,
        Command::Top(args) => top::run(&args, shutdown).await,
        Command::Events(args) => args.show.each(shutdown, async |query| events::view(query, args.limit).await).await,
        Command::Placement(command) => placement::run(command, shutdown).await,
        Command::Replicas(command) => replicas::run(command, shutdown).await,
        Command::Cordon(args) => operate::cordon(args, shutdown).await,
        Command::Uncordon(args) => operate::uncordon(args, shutdown).await,
        Command::Drain(args) => operate::drain(args, shutdown).await,
        Command::Rebalance(args) => operate::rebalance(args, shutdown).await,
    }
}
