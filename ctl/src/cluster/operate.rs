//! What changes the cluster: an order is given once, then its operation is followed to its end.
//!
//! Following survives a change of leaders and coordinators that come and go: any of them knows the operation. The order itself
//! is never repeated.

use std::io::IsTerminal as _;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde::Serialize;
use sirocco_proto::tonic::Code;
use sirocco_proto::wire::cluster as wire;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use wire::operate_request::Action;

use super::Query;
use super::client::Refused;
use super::events::OperationView;
use super::plan::{self, Budget, PlanView};
use crate::Unreachable;
use crate::output::{self, Format};
use crate::time;

/// How often an operation is looked at.
const POLL: Duration = Duration::from_millis(200);

/// Flags of every command that changes the cluster.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Act {
    #[command(flatten)]
    pub(super) query: Query,
    /// Who asks, for the record; you@this-machine when absent
    #[arg(long, env = "SIROCCO_BY", value_name = "WHO", default_value_t = whoever(), hide_default_value = true)]
    by: String,
    /// Longest wait, in seconds, for the operation's end
    #[arg(long, env = "SIROCCO_TIMEOUT_S", value_name = "SECONDS", default_value_t = 300)]
    timeout_s: u64,
    /// Return once the operation is recorded
    #[arg(long, env = "SIROCCO_NO_WAIT")]
    no_wait: bool,
}

/// Flags of `cordon`, `uncordon` and `drain`.
#[derive(Debug, clap::Args)]
pub(crate) struct NodeArgs {
    /// The expert node's name
    node: String,
    #[command(flatten)]
    act: Act,
}

/// Flags of `rebalance`.
#[derive(Debug, clap::Args)]
pub(crate) struct RebalanceArgs {
    /// Show what would move; changes nothing
    #[arg(long, env = "SIROCCO_DRY_RUN")]
    dry_run: bool,
    #[command(flatten)]
    budget: Budget,
    #[command(flatten)]
    act: Act,
}

/// Flags of `placement rollback`.
#[derive(Debug, clap::Args)]
pub(crate) struct RollbackArgs {
    /// The placement to bring back, one that `placement history` lists
    epoch: u64,
    #[command(flatten)]
    act: Act,
}

/// What an order came to, as shown to programs.
#[derive(Serialize)]
struct Outcome {
    #[serde(flatten)]
    operation: OperationView,
    #[serde(skip_serializing_if = "Option::is_none")]
    plan: Option<PlanView>,
}

/// Lets the node keep its experts and get no new ones.
pub(super) async fn cordon(args: NodeArgs, shutdown: &CancellationToken) -> Result<()> {
    operate(args.act, Action::Cordon(wire::NodeAction { node: args.node }), shutdown).await
}

/// Lets the node be used freely again.
pub(super) async fn uncordon(args: NodeArgs, shutdown: &CancellationToken) -> Result<()> {
    operate(args.act, Action::Uncordon(wire::NodeAction { node: args.node }), shutdown).await
}

/// Has the node's experts moved elsewhere.
pub(super) async fn drain(args: NodeArgs, shutdown: &CancellationToken) -> Result<()> {
    operate(args.act, Action::Drain(wire::NodeAction { node: args.node }), shutdown).await
}

/// Has the experts placed anew by their load, or shows how they would be.
pub(super) async fn rebalance(args: RebalanceArgs, shutdown: &CancellationToken) -> Result<()> {
    let max_moved_bytes = args.budget.max_moved_bytes;
    if args.dry_run {
        return plan::show(&args.act.query, wire::PlanRequest { max_moved_bytes, ..wire::PlanRequest::default() })
            .await;
    }
    operate(args.act, Action::Rebalance(wire::Rebalance { max_moved_bytes }), shutdown).await
}

/// Brings an earlier placement back.
pub(super) async fn rollback(args: RollbackArgs, shutdown: &CancellationToken) -> Result<()> {
    operate(args.act, Action::Rollback(wire::Rollback { epoch: args.epoch }), shutdown).await
}

/// Gives the order, waits for its end unless told otherwise, and shows what came of it.
///
/// Errors: the coordinator's reason when it refuses; the operation's when it fails.
pub(super) async fn operate(act: Act, action: Action, shutdown: &CancellationToken) -> Result<()> {
    let request = wire::OperateRequest { by: act.by.clone(), action: Some(action) };
    let order = act.query.coordinators.tell(async |mut client| Ok(client.operate(request).await?.into_inner()));
    let Some(answer) = shutdown.run_until_cancelled(order).await else {
        bail!("interrupted; it is not known whether this was done, `sirocco events` tells");
    };
    let wire::OperateResponse { operation, plan } = answer?;
    let mut operation = OperationView::from(operation.context("the coordinator's answer names no operation")?);
    if !act.no_wait {
        operation = follow(&act, operation, shutdown).await?;
    }
    let outcome = Outcome { operation, plan: plan.map(PlanView::from) };
    let failed = outcome.operation.state == "failed";
    if !failed || matches!(act.query.output, Format::Json | Format::Yaml) {
        output::print(&output::one(act.query.output, &outcome, || sentence(&outcome.operation))?)?;
    }
    if failed {
        bail!("{} failed: {}", outcome.operation.title(), outcome.operation.detail);
    }
    Ok(())
}

/// Waits for the end of an operation and says on a terminal how far it is.
async fn follow(act: &Act, mut latest: OperationView, shutdown: &CancellationToken) -> Result<OperationView> {
    let id = latest.id;
    let give_up = Instant::now() + Duration::from_secs(act.timeout_s);
    let mut said = String::new();
    while latest.state == "running" {
        if latest.detail != said && std::io::stderr().is_terminal() {
            eprintln!("{}: {}", latest.title(), latest.detail);
        }
        said.clone_from(&latest.detail);
        let next = async {
            tokio::time::sleep(POLL).await;
            let request = wire::GetOperationRequest { id };
            act.query.coordinators.ask(async |mut client| Ok(client.get_operation(request).await?.into_inner())).await
        };
        let still = format!("operation {id} goes on: {}, {}", latest.title(), latest.detail);
        let late = match shutdown.run_until_cancelled(next).await {
            None => bail!("interrupted; {still}"),
            Some(Ok(operation)) => {
                latest = OperationView::from(operation);
                anyhow::anyhow!("not done within {} s", act.timeout_s)
            }
            Some(Err(error)) if passes(&error) => error,
            Some(Err(error)) => return Err(error.context(still)),
        };
        if latest.state == "running" && Instant::now() >= give_up {
            return Err(late.context(still));
        }
    }
    Ok(latest)
}

/// Whether asking again may help: coordinators come and go, leaders change, and one that follows may not know the newest
/// operation yet.
fn passes(error: &anyhow::Error) -> bool {
    let refused = error.downcast_ref::<Refused>();
    error.is::<Unreachable>()
        || refused.is_some_and(|refused| matches!(refused.code, Code::NotFound | Code::Unavailable))
}

/// What was done, in one line.
fn sentence(operation: &OperationView) -> String {
    if operation.state == "running" {
        return format!("{}: under way as operation {}, `sirocco events` tells", operation.title(), operation.id);
    }
    let took = match operation.took() {
        Duration::ZERO => String::new(),
        took => format!(" ({})", time::duration(took)),
    };
    format!("{}: {}{took}", operation.title(), operation.detail)
}

/// `user@host` of whoever runs this program.
fn whoever() -> String {
    let user = std::env::var("USER").unwrap_or_else(|_| rustix::process::getuid().as_raw().to_string());
    format!("{user}@{}", rustix::system::uname().nodename().to_string_lossy())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_operation_is_told_in_one_line() {
        let operation = |state: &str| {
            OperationView::from(wire::Operation {
                id: 12,
                kind: "drain".into(),
                subject: "expert-3".into(),
                state: state.into(),
                detail: "its 4 experts are elsewhere".into(),
                started_ms: 1_000,
                ended_ms: 4_200,
                ..wire::Operation::default()
            })
        };
        assert_eq!(sentence(&operation("done")), "drain expert-3: its 4 experts are elsewhere (3.2 s)");
        assert!(sentence(&operation("running")).starts_with("drain expert-3: under way as operation 12"));
    }

    #[test]
    fn whoever_asks_is_a_user_at_a_host() {
        let by = whoever();
        let (user, host) = by.split_once('@').unwrap();
        assert!(!user.is_empty() && !host.is_empty(), "{by}");
    }
}
