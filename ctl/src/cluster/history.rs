//! `sirocco placement history`: the placements that are kept, and why each was made.

use anyhow::Result;
use serde::Serialize;
use sirocco_proto::wire::cluster as wire;

use super::Query;
use sirocco_types::Bytes;

use crate::output::{self, column, imbalance, wide};
use crate::time;

/// A placement's record, as shown to people and programs.
#[derive(Serialize)]
struct AboutView {
    epoch: u64,
    target: bool,
    serving: bool,
    operation: u64,
    kind: String,
    reason: String,
    moves: u64,
    moved_bytes: u64,
    imbalance_before: f64,
    imbalance_after: f64,
    leader: String,
    at_ms: u64,
}

/// The placements that are kept, rendered, the newest last.
pub(super) async fn view(query: &Query) -> Result<String> {
    let request = wire::ListPlacementsRequest {};
    let answer = query.coordinators.ask(async |mut client| Ok(client.list_placements(request).await?.into_inner()));
    let placements: Vec<AboutView> = answer.await?.placements.into_iter().rev().map(AboutView::from).collect();
    let columns = [
        column("epoch"),
        column("when"),
        column("why"),
        column("leader"),
        column("moves"),
        column("bytes"),
        column("imbalance"),
        column(""),
        wide("operation"),
        wide("reason"),
    ];
    output::list(query.output, &columns, &placements, |about| {
        vec![
            about.epoch.to_string(),
            time::date(about.at_ms),
            about.kind.clone(),
            about.leader.clone(),
            about.moves.to_string(),
            Bytes(about.moved_bytes).to_string(),
            format!("{} -> {}", imbalance(about.imbalance_before), imbalance(about.imbalance_after)),
            about.marks().to_owned(),
            about.operation.to_string(),
            about.reason.clone(),
        ]
    })
}

impl AboutView {
    /// What it is now.
    fn marks(&self) -> &'static str {
        match (self.target, self.serving) {
            (true, true) => "serving, target",
            (true, false) => "target",
            (false, true) => "serving",
            (false, false) => "",
        }
    }
}

impl From<wire::PlacementAbout> for AboutView {
    fn from(about: wire::PlacementAbout) -> Self {
        Self {
            epoch: about.epoch,
            target: about.target,
            serving: about.serving,
            operation: about.operation,
            kind: about.kind,
            reason: about.reason,
            moves: about.moves,
            moved_bytes: about.moved_bytes,
            imbalance_before: about.imbalance_before,
            imbalance_after: about.imbalance_after,
            leader: about.leader,
            at_ms: about.at_ms,
        }
    }
}
