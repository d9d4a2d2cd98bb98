//! `sirocco placement plan` and `sirocco rebalance --dry-run`: what the planner would do, and changes nothing.

use std::str::FromStr;

use anyhow::{Result, bail};
use serde::Serialize;
use sirocco_proto::wire::cluster as wire;

use super::placement::PlacementView;
use super::{Query, nodes};
use sirocco_types::Bytes;

use crate::output::{self, Format, column, count, imbalance, table};

/// Moves that a table shows unless it is wide.
const SHOWN: usize = 20;

/// Flags of `placement plan`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Plan for other nodes: nodes=+2 (two more), nodes=-expert-3,-expert-4 (without these), nodes=12 (twelve in all)
    #[arg(long, env = "SIROCCO_WHAT_IF", value_name = "NODES")]
    what_if: Option<WhatIf>,
    #[command(flatten)]
    budget: Budget,
    #[command(flatten)]
    query: Query,
}

/// How much may be moved.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Budget {
    /// Load no more bytes than this for balance's sake; 0: any number
    #[arg(long, env = "SIROCCO_MAX_MOVED_BYTES", value_name = "BYTES", default_value_t = 0)]
    pub(super) max_moved_bytes: u64,
}

/// Which expert nodes to plan for.
#[derive(Clone, Debug, PartialEq, Eq)]
enum WhatIf {
    /// With so many more, and without these.
    Change { add: u32, remove: Vec<String> },
    /// With so many in all.
    Total(u32),
}

/// A plan, as shown to people and programs.
#[derive(Serialize)]
pub(super) struct PlanView {
    moves: Vec<MoveView>,
    moved_bytes: u64,
    imbalance_before: f64,
    imbalance_after: f64,
    unserved: Vec<String>,
    short_of_replicas: Vec<String>,
    placement: Vec<Vec<Vec<String>>>,
}

#[derive(Serialize)]
struct MoveView {
    layer: u32,
    expert: u32,
    /// None: one more replica.
    from: Option<String>,
    to: String,
}

/// Shows what the planner would do with other nodes or with these.
pub(super) async fn run(args: Args) -> Result<()> {
    let Args { what_if, budget, query } = args;
    let (add_nodes, remove_nodes) = match what_if {
        None => (0, Vec::new()),
        Some(WhatIf::Change { add, remove }) => (add, remove),
        Some(WhatIf::Total(total)) => {
            let there = nodes::list(&query.coordinators).await?.iter().filter(|node| node.keeps_experts()).count();
            (more(total, there as u32)?, Vec::new())
        }
    };
    let request = wire::PlanRequest { add_nodes, remove_nodes, max_moved_bytes: budget.max_moved_bytes };
    show(&query, request).await
}

/// Asks for a plan and shows it.
pub(super) async fn show(query: &Query, request: wire::PlanRequest) -> Result<()> {
    let answer = query.coordinators.ask(async |mut client| Ok(client.plan(request.clone()).await?.into_inner()));
    let plan = PlanView::from(answer.await?);
    output::print(&output::one(query.output, &plan, || plan.text(query.output))?)
}

/// How many nodes to add to those that are `there` for `total` of them.
fn more(total: u32, there: u32) -> Result<u32> {
    match total.checked_sub(there) {
        Some(more) => Ok(more),
        None => bail!(
            "--what-if nodes={total}: there are {there} expert nodes, say which of them to plan without: \
             nodes=-NAME,-NAME"
        ),
    }
}

impl FromStr for WhatIf {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const SYNTAX: &str = "must be nodes=+2, nodes=-expert-3,-expert-4 or nodes=12";
        let items = text.strip_prefix("nodes=").ok_or(SYNTAX)?;
        if let Ok(total) = items.parse()
            && !items.starts_with('+')
        {
            return Ok(Self::Total(total));
        }
        let (mut add, mut remove) = (0_u32, Vec::new());
        for item in items.split(',') {
            if let Some(number) = item.strip_prefix('+') {
                let number: u32 = number.parse().map_err(|_| format!("{item:?} is no number of nodes, {SYNTAX}"))?;
                add = add.checked_add(number).ok_or_else(|| format!("{item:?} is too many"))?;
            } else {
                let name = item.strip_prefix('-').filter(|name| !name.is_empty()).ok_or(SYNTAX)?;
                if name.bytes().all(|byte| byte.is_ascii_digit()) {
                    return Err(format!("{item:?} says how many, must say which: nodes=-NAME,-NAME"));
                }
                remove.push(name.to_owned());
            }
        }
        Ok(Self::Change { add, remove })
    }
}

impl PlanView {
    /// What moves and what comes of it.
    pub(super) fn text(&self, format: Format) -> String {
        let mut lines = vec![self.summary()];
        lines.extend(self.unserved.iter().map(|sentence| format!("unserved: {sentence}")));
        lines.extend(self.short_of_replicas.iter().map(|sentence| format!("short of replicas: {sentence}")));
        if !self.moves.is_empty() {
            let wide = format == Format::Wide;
            let shown = if wide { self.moves.len() } else { self.moves.len().min(SHOWN) };
            let rows: Vec<Vec<String>> = self.moves[..shown].iter().map(MoveView::row).collect();
            let columns = ["layer", "expert", "from", "to"].map(column);
            lines.extend([String::new(), table(&columns, &rows, wide)]);
            if shown < self.moves.len() {
                lines.push(format!("and {} more, which -o wide shows", self.moves.len() - shown));
            }
        }
        lines.join("\n")
    }

    fn summary(&self) -> String {
        if self.moves.is_empty() {
            return format!("nothing moves, predicted imbalance {}", imbalance(self.imbalance_after));
        }
        format!(
            "{}, {}, predicted imbalance {} -> {}",
            count(self.moves.len() as u64, "move"),
            Bytes(self.moved_bytes),
            imbalance(self.imbalance_before),
            imbalance(self.imbalance_after)
        )
    }
}

impl MoveView {
    fn row(&self) -> Vec<String> {
        let from = self.from.as_deref().unwrap_or("(one more)");
        vec![self.layer.to_string(), self.expert.to_string(), from.to_owned(), self.to.clone()]
    }
}

impl From<wire::Plan> for PlanView {
    fn from(plan: wire::Plan) -> Self {
        let moves = plan.moves.into_iter().map(|step| MoveView {
            layer: step.layer,
            expert: step.expert,
            from: Some(step.from).filter(|from| !from.is_empty()),
            to: step.to,
        });
        Self {
            moves: moves.collect(),
            moved_bytes: plan.moved_bytes,
            imbalance_before: plan.imbalance_before,
            imbalance_after: plan.imbalance_after,
            unserved: plan.unserved,
            short_of_replicas: plan.short_of_replicas,
            placement: PlacementView::from(plan.placement.unwrap_or_default()).layers,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(add: u32, remove: &[&str]) -> WhatIf {
        WhatIf::Change { add, remove: remove.iter().map(|&name| name.to_owned()).collect() }
    }

    #[test]
    fn what_if_adds_nodes_by_count_and_removes_them_by_name() {
        let cases = [
            ("nodes=+2", change(2, &[])),
            ("nodes=-expert-3,-expert-4", change(0, &["expert-3", "expert-4"])),
            ("nodes=+1,-expert-3", change(1, &["expert-3"])),
            ("nodes=12", WhatIf::Total(12)),
        ];
        for (text, expected) in cases {
            assert_eq!(text.parse(), Ok(expected), "{text}");
        }
        let refused = [
            ("12", "nodes=+2"),
            ("nodes=", "nodes=+2"),
            ("nodes=expert-3", "nodes=-expert-3"),
            ("nodes=+two", "no number"),
            ("nodes=-3", "nodes=-NAME"),
            ("nodes=+4294967295,+1", "too many"),
        ];
        for (text, part) in refused {
            let error = text.parse::<WhatIf>().unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn a_total_below_what_is_there_is_refused_with_the_syntax_that_names_nodes() {
        assert_eq!(more(12, 8).unwrap(), 4);
        assert_eq!(more(8, 8).unwrap(), 0);
        let error = more(6, 8).unwrap_err().to_string();
        assert!(
            error.contains("nodes=6") && error.contains("8 expert nodes") && error.contains("nodes=-NAME"),
            "{error}"
        );
    }

    #[test]
    fn a_long_plan_is_cut_unless_it_is_to_be_wide() {
        let step = |expert| wire::Move { layer: 1, expert, from: String::new(), to: "expert-7".into() };
        let moves: Vec<_> = (0..30).map(step).collect();
        let unserved = vec!["layer 0 expert 1: no node has room".to_owned()];
        let plan = wire::Plan { moves, moved_bytes: 2048, imbalance_before: 1.4, unserved, ..wire::Plan::default() };
        let view = PlanView::from(plan);
        let (text, wide) = (view.text(Format::Table), view.text(Format::Wide));
        assert!(text.starts_with("30 moves, 2.0 KiB, predicted imbalance 1.40 -> -\nunserved: layer 0"), "{text}");
        assert_eq!(text.matches("(one more)").count(), 20);
        assert!(text.ends_with("and 10 more, which -o wide shows"), "{text}");
        assert_eq!(wide.matches("(one more)").count(), 30);
        assert!(PlanView::from(wire::Plan::default()).text(Format::Table).starts_with("nothing moves"));
    }
}
