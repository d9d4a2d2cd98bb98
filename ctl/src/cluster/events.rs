//! `sirocco events`: what was done to the cluster, by whom, and what came of it.

use std::time::Duration;

use anyhow::Result;
use serde::Serialize;
use sirocco_proto::wire::cluster as wire;

use super::{Query, Show};
use crate::output::{self, Column, column, wide};
use crate::time;

/// Flags of `events`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// At most this many, the latest; 0: all that are kept
    #[arg(long, env = "SIROCCO_LIMIT", value_name = "N", default_value_t = 20)]
    pub(super) limit: u32,
    #[command(flatten)]
    pub(super) show: Show,
}

/// An operation, as shown to people and programs.
#[derive(Clone, Debug, Serialize)]
pub(super) struct OperationView {
    pub(super) id: u64,
    pub(super) kind: String,
    pub(super) subject: String,
    by: String,
    pub(super) state: String,
    pub(super) detail: String,
    epoch: Option<u64>,
    leader: String,
    started_ms: u64,
    ended_ms: Option<u64>,
}

/// Columns of a list of operations.
pub(super) const COLUMNS: [Column; 10] = [
    column("when"),
    column("who"),
    column("what"),
    column("subject"),
    column("state"),
    column("took"),
    wide("id"),
    wide("epoch"),
    wide("leader"),
    column("detail"),
];

/// The latest `limit` operations, rendered, the newest last.
pub(super) async fn view(query: &Query, limit: u32) -> Result<String> {
    let request = wire::ListOperationsRequest { limit };
    let answer = query.coordinators.ask(async |mut client| Ok(client.list_operations(request).await?.into_inner()));
    output::list(query.output, &COLUMNS, &oldest_first(answer.await?), OperationView::row)
}

/// The operations of a coordinator's answer, the newest last.
pub(super) fn oldest_first(answer: wire::ListOperationsResponse) -> Vec<OperationView> {
    answer.operations.into_iter().rev().map(OperationView::from).collect()
}

impl OperationView {
    /// One text for each of [`COLUMNS`].
    pub(super) fn row(&self) -> Vec<String> {
        let dash = |text: &str| if text.is_empty() { "-".to_owned() } else { text.to_owned() };
        vec![
            time::when(self.started_ms),
            dash(&self.by),
            self.kind.clone(),
            dash(&self.subject),
            self.state.clone(),
            if self.took().is_zero() { "-".to_owned() } else { time::duration(self.took()) },
            self.id.to_string(),
            self.epoch.map_or("-".to_owned(), |epoch| epoch.to_string()),
            self.leader.clone(),
            self.detail.clone(),
        ]
    }

    /// What it does, and to what.
    pub(super) fn title(&self) -> String {
        [self.kind.as_str(), self.subject.as_str()].join(" ").trim_end().to_owned()
    }

    /// How long it took, or has taken so far.
    pub(super) fn took(&self) -> Duration {
        match self.ended_ms {
            Some(ended) => Duration::from_millis(ended.saturating_sub(self.started_ms)),
            None => time::since(self.started_ms),
        }
    }
}

impl From<wire::Operation> for OperationView {
    fn from(operation: wire::Operation) -> Self {
        Self {
            id: operation.id,
            kind: operation.kind,
            subject: operation.subject,
            by: operation.by,
            state: operation.state,
            detail: operation.detail,
            epoch: Some(operation.epoch).filter(|epoch| *epoch > 0),
            leader: operation.leader,
            started_ms: operation.started_ms,
            ended_ms: Some(operation.ended_ms).filter(|ended| *ended > 0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_are_listed_newest_last_with_what_they_took() {
        let operation =
            |id, ended_ms| wire::Operation { id, started_ms: 5_000, ended_ms, ..wire::Operation::default() };
        let views =
            oldest_first(wire::ListOperationsResponse { operations: vec![operation(2, 4_000), operation(1, 5_300)] });
        assert_eq!(views.iter().map(|view| view.id).collect::<Vec<_>>(), [1, 2]);
        assert_eq!(views[0].took(), Duration::from_millis(300));
        // Clocks of two leaders may differ.
        assert_eq!(views[1].took(), Duration::ZERO);
        assert!(views.iter().all(|view| view.row().len() == COLUMNS.len()));
    }
}
