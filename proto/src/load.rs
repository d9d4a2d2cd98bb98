//! Load reports: how router and expert nodes tell the leader what they counted.

use std::sync::Arc;
use std::time::Duration;

use sirocco_types::{LoadCounters, LoadReport, NodeId};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

use crate::wire::cluster as wire;
use crate::wire::cluster::load_report::Counters;
pub use crate::wire::cluster::load_service_client::LoadServiceClient;
pub use crate::wire::cluster::load_service_server::{LoadService, LoadServiceServer};
use crate::{Invalid, channel};

/// Time between two reports of a node.
pub const REPORT_EVERY: Duration = Duration::from_secs(1);

/// Reports what `sample` gives to the coordinator at the address that `leader` finds in `states`, until `shutdown`.
///
/// Follows the leadership; while there is no leader nothing is sent, and nothing is lost by that, since reports carry
/// running totals. Never fails: a report that does not get through is logged at debug and tried again with the next.
pub async fn report<S>(
    mut states: watch::Receiver<Arc<S>>,
    leader: impl Fn(&S) -> Option<String>,
    mut sample: impl FnMut() -> LoadReport,
    shutdown: CancellationToken,
) {
    loop {
        let address = leader(&states.borrow_and_update());
        let Some(address) = address else {
            tokio::select! {
                () = shutdown.cancelled() => return,
                changed = states.changed() => if changed.is_err() { return },
            }
            continue;
        };
        // Whether there is a state to follow any more.
        let moved = async {
            loop {
                if states.changed().await.is_err() {
                    return false;
                }
                if leader(&states.borrow_and_update()).as_ref() != Some(&address) {
                    return true;
                }
            }
        };
        tokio::select! {
            () = shutdown.cancelled() => return,
            reason = stream(&address, &mut sample) => tracing::debug!(address, reason, "load reports broke off"),
            follows = moved => if follows { continue } else { return },
        }
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(REPORT_EVERY) => {}
        }
    }
}

/// Sends reports to one coordinator until that breaks off; returns why it did.
async fn stream(address: &str, sample: &mut impl FnMut() -> LoadReport) -> String {
    let channel = match channel::connect(address).await {
        Ok(channel) => channel,
        Err(error) => return error.to_string(),
    };
    let mut client = LoadServiceClient::new(channel);
    let (reports, outgoing) = mpsc::channel(1);
    let sending = async {
        let mut every = tokio::time::interval(REPORT_EVERY);
        loop {
            every.tick().await;
            if reports.send(wire::LoadReport::from(sample())).await.is_err() {
                return std::future::pending().await;
            }
        }
    };
    tokio::select! {
        answer = client.report(ReceiverStream::new(outgoing)) => {
            answer.err().map_or("it closed the stream".to_owned(), |status| status.message().to_owned())
        }
        reason = sending => reason,
    }
}

impl From<LoadReport> for wire::LoadReport {
    fn from(report: LoadReport) -> Self {
        let counters = match report.counters {
            LoadCounters::Router { tokens } => {
                let layers = tokens.into_iter().map(|tokens| wire::LayerTokens { tokens });
                Counters::Router(wire::RouterCounters { layers: layers.collect() })
            }
            LoadCounters::Expert { busy_us, batches, rows, queue } => {
                Counters::Expert(wire::ExpertCounters { busy_us, batches, rows, queue })
            }
        };
        Self {
            node: report.node.to_string(),
            incarnation: report.incarnation,
            uptime_us: report.uptime_us,
            counters: Some(counters),
        }
    }
}

impl TryFrom<wire::LoadReport> for LoadReport {
    type Error = Invalid;

    /// Checks names; whether the counters fit the model is for the leader to say.
    fn try_from(report: wire::LoadReport) -> Result<Self, Invalid> {
        let node = NodeId::new(&report.node).map_err(|error| Invalid::new("node", error.to_string()))?;
        let counters = match report.counters {
            Some(Counters::Router(router)) => {
                LoadCounters::Router { tokens: router.layers.into_iter().map(|layer| layer.tokens).collect() }
            }
            Some(Counters::Expert(expert)) => LoadCounters::Expert {
                busy_us: expert.busy_us,
                batches: expert.batches,
                rows: expert.rows,
                queue: expert.queue,
            },
            None => return Err(Invalid::new("counters", "absent")),
        };
        Ok(Self { node, incarnation: report.incarnation, uptime_us: report.uptime_us, counters })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_crosses_the_wire_unchanged() {
        let report =
            |counters| LoadReport { node: NodeId::new("router-0").unwrap(), incarnation: 7, uptime_us: 5, counters };
        for counters in [
            LoadCounters::Router { tokens: vec![vec![1, 2], vec![3, 4]] },
            LoadCounters::Expert { busy_us: 1, batches: 2, rows: vec![3, 4], queue: 5 },
        ] {
            let sent = report(counters);
            assert_eq!(LoadReport::try_from(wire::LoadReport::from(sent.clone())), Ok(sent));
        }
        let nameless = wire::LoadReport { node: "A b".into(), ..Default::default() };
        assert_eq!(LoadReport::try_from(nameless).unwrap_err().field, "node");
    }
}
