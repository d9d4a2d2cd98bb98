//! Stands for election, and while it leads writes what the cluster needs, one step after the other.
//!
//! A step is one of: what an operator asks for ([`decide`]), what follows from the state ([`next_actions`]), a placement for
//! changed nodes or for changed load, the measured load. Every write carries the leadership's fence, so a coordinator that was
//! deposed without noticing writes nothing. After each write it waits until it sees it in its own copy of the state before it
//! decides again.

#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;
mod writes;

pub(crate) use writes::ops;

use std::sync::Arc;
use std::time::Duration;

use sirocco_process::chain;
use sirocco_store::{
    ClusterState, Keys, LEADER_TTL, Leadership, Lease, MAX_TXN_OPS, Op, Revision, Store, StoreError, Txn, campaign,
};
use sirocco_types::{NodeId, Operation, OperationKind, OperationState};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::inputs::Inputs;
use crate::load::{LoadSnapshot, now_ms};
use crate::metrics::Metrics;
use crate::operations::{Decision, Refusal, Request, decide, summary};
use crate::rebalance::{Policy, due, pays};
use crate::reconcile::{Action, Signature, begin, end, model_to_adopt, needs_plan, next_actions, place, publish};

/// Wait before a step that failed is tried again.
const RETRY: Duration = Duration::from_millis(500);

/// How often it is asked whether placing experts anew would pay.
const EVALUATE_EVERY: Duration = Duration::from_secs(5);

/// How often the measured load is written, at most. One transaction holds 127 entries, so with 58 layers and 2,000 nodes that
/// is 17 transactions in this time: 1.7 a second.
const LOAD_EVERY: Duration = Duration::from_secs(10);

/// A candidate, and the leader once elected.
pub(crate) struct Candidate {
    pub(crate) id: NodeId,
    pub(crate) store: Arc<dyn Store>,
    pub(crate) keys: Keys,
    pub(crate) states: watch::Receiver<Arc<ClusterState>>,
    pub(crate) loads: watch::Receiver<Arc<LoadSnapshot>>,
    pub(crate) commands: mpsc::Receiver<Command>,
    /// How long the nodes must have stayed the same before a new placement is made for them.
    pub(crate) settle: Duration,
    /// When load moves experts; never when absent.
    pub(crate) policy: Option<Policy>,
    pub(crate) metrics: Arc<Metrics>,
}

/// An operator's request on its way to the leader. Its sender is told nothing when this coordinator does not lead.
#[derive(Debug)]
pub(crate) struct Command {
    pub(crate) request: Request,
    pub(crate) by: String,
    pub(crate) answer: oneshot::Sender<Result<Decision, CommandError>>,
}

/// Why a command came to nothing.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CommandError {
    /// The cluster does not allow it.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The store failed; what was asked may or may not have been written.
    #[error("the store failed, look at the operations before asking again: {0}")]
    Store(String),
    /// Another leads by now.
    #[error("this coordinator no longer leads; ask again")]
    Deposed,
}

/// Why a leader stopped leading.
enum Deposed {
    /// It was asked to stop.
    Shutdown,
    /// Its lease is gone, or another leads.
    Lost,
}

/// What came of a step.
enum Step {
    /// Something was written and is visible; there may be more.
    Wrote,
    /// Nothing to do until the state changes, or for this long.
    Wait(Option<Duration>),
    /// Another leads.
    Fenced,
}

/// What a leader keeps in mind; a new one begins without.
struct Term {
    leadership: Leadership,
    /// The inputs last seen, and since when they have been the same.
    inputs: (String, Instant),
    evaluate_at: Instant,
    write_load_at: Instant,
    written: Arc<LoadSnapshot>,
}

impl Candidate {
    /// Stands for election again and again until `shutdown`.
    pub(crate) async fn run(mut self, shutdown: CancellationToken) {
        while !shutdown.is_cancelled() {
            let (store, election, id) = (Arc::clone(&self.store), self.keys.election(), self.id.clone());
            let term = async {
                let lease = tokio::select! {
                    lease = Lease::grant(&store, LEADER_TTL) => lease?,
                    () = shutdown.cancelled() => return Ok(None),
                };
                tokio::select! {
                    leadership = campaign(&store, &election, id.as_str(), &lease) => {
                        Ok::<_, StoreError>(Some((lease, Some(leadership?))))
                    }
                    () = shutdown.cancelled() => Ok(Some((lease, None))),
                }
            };
            tokio::pin!(term);
            let elected = loop {
                tokio::select! {
                    elected = &mut term => break elected,
                    // Dropped, which tells the sender that this coordinator does not lead.
                    Some(_) = self.commands.recv() => {}
                }
            };
            match elected {
                Ok(Some((lease, Some(leadership)))) => {
                    tracing::info!(id = %self.id, "leads the cluster");
                    let end = self.lead(&lease, leadership, &shutdown).await;
                    let resigned = lease.revoke(&self.store).await;
                    if let (Deposed::Shutdown, Err(error)) = (end, resigned) {
                        tracing::warn!(%error, "could not resign; the lease will expire");
                    }
                    tracing::info!(id = %self.id, "no longer leads");
                }
                // Who stands behind a candidate that is gone would wait for its lease to end.
                Ok(Some((lease, None))) => {
                    if let Err(error) = lease.revoke(&self.store).await {
                        tracing::warn!(%error, "could not withdraw the candidacy; its lease will expire");
                    }
                }
                Ok(None) => {}
                Err(error) => {
                    self.metrics.store_failed();
                    tracing::warn!(%error, "cannot stand for election, trying again");
                    tokio::select! {
                        () = shutdown.cancelled() => return,
                        () = tokio::time::sleep(RETRY) => {}
                    }
                }
            }
        }
    }

    async fn lead(&mut self, lease: &Lease, leadership: Leadership, shutdown: &CancellationToken) -> Deposed {
        let lost = lease.lost().clone();
        tokio::select! {
            () = self.work(leadership) => Deposed::Lost,
            () = lost.cancelled() => Deposed::Lost,
            () = shutdown.cancelled() => Deposed::Shutdown,
        }
    }

    /// Step after step, until another leads. May be dropped at any point: whoever leads next goes on from the store.
    async fn work(&mut self, leadership: Leadership) {
        let now = Instant::now();
        let mut term = Term {
            leadership,
            inputs: (String::new(), now),
            evaluate_at: now + EVALUATE_EVERY,
            write_load_at: now + LOAD_EVERY,
            written: Arc::default(),
        };
        let mut introduced = false;
        loop {
            let state = Arc::clone(&self.states.borrow_and_update());
            let step = match self.introduce(&state, &term, &mut introduced).await {
                Ok(Step::Wait(_)) => self.step(&state, &mut term).await,
                other => other,
            };
            let wait = match step {
                Ok(Step::Wrote) => continue,
                Ok(Step::Fenced) => return,
                Ok(Step::Wait(wait)) => wait,
                Err(error) => {
                    self.metrics.store_failed();
                    tracing::warn!(error = chain(&error), "a step of the leader failed, trying again");
                    Some(RETRY)
                }
            };
            tokio::select! {
                changed = self.states.changed() => if changed.is_err() { return },
                changed = self.loads.changed() => if changed.is_err() { return },
                Some(command) = self.commands.recv() => if !self.obey(command, &term).await { return },
                () = tokio::time::sleep(wait.unwrap_or_default()), if wait.is_some() => {}
            }
        }
    }

    /// Records once that this coordinator leads.
    async fn introduce(&self, state: &ClusterState, term: &Term, introduced: &mut bool) -> Result<Step, StoreError> {
        if *introduced {
            return Ok(Step::Wait(None));
        }
        let signature = self.signature();
        let began = begin(state, OperationKind::Lead, self.id.as_str(), String::new(), &signature);
        let done = end(&began, OperationState::Done, "leads the cluster".to_owned(), &signature);
        let step = self.write(vec![Action::Record(done)], &term.leadership).await?;
        *introduced = true;
        Ok(step)
    }

    /// Writes what is next, if there is anything.
    async fn step(&self, state: &Arc<ClusterState>, term: &mut Term) -> Result<Step, StoreError> {
        if let Some(model) = model_to_adopt(state) {
            return self.write(vec![Action::AdoptModel(model)], &term.leadership).await;
        }
        let actions = next_actions(state, &self.signature());
        if !actions.is_empty() {
            return self.write(actions, &term.leadership).await;
        }
        let loads = Arc::clone(&self.loads.borrow());
        let Some(inputs) = Inputs::of(state, &loads) else { return Ok(Step::Wait(None)) };
        if term.inputs.0 != inputs.digest() {
            term.inputs = (inputs.digest().to_owned(), Instant::now());
        }
        if needs_plan(state, &inputs) {
            let unsettled = self.settle.saturating_sub(term.inputs.1.elapsed());
            if !unsettled.is_zero() {
                return Ok(Step::Wait(Some(unsettled)));
            }
            return self.place(state, inputs, term).await;
        }
        let step = self.rebalance(state, inputs, term).await?;
        if !matches!(step, Step::Wait(_)) {
            return Ok(step);
        }
        self.write_load(state, &loads, term).await
    }

    /// Plans for nodes or limits that have changed.
    async fn place(&self, state: &ClusterState, inputs: Inputs, term: &Term) -> Result<Step, StoreError> {
        let signature = self.signature();
        let metrics = Arc::clone(&self.metrics);
        let Ok((inputs, planned)) = in_background(move || {
            let began = Instant::now();
            let planned = inputs.plan(None);
            metrics.planned(began.elapsed());
            (inputs, planned)
        })
        .await
        else {
            return Ok(Step::Wait(Some(RETRY)));
        };
        self.write(place(state, &inputs, planned, &signature), &term.leadership).await
    }

    /// Plans for load that has changed, when that is due and pays.
    async fn rebalance(&self, state: &ClusterState, inputs: Inputs, term: &mut Term) -> Result<Step, StoreError> {
        let Some(policy) = self.policy.filter(|_| Instant::now() >= term.evaluate_at) else {
            return Ok(Step::Wait(None));
        };
        term.evaluate_at = Instant::now() + EVALUATE_EVERY;
        let signature = self.signature();
        let Some(bytes) = due(state, &inputs, &policy, signature.at_ms) else { return Ok(Step::Wait(None)) };
        let metrics = Arc::clone(&self.metrics);
        let Ok((inputs, planned)) = in_background(move || {
            let began = Instant::now();
            let planned = inputs.plan(Some(bytes));
            metrics.planned(began.elapsed());
            (inputs, planned)
        })
        .await
        else {
            return Ok(Step::Wait(None));
        };
        if !pays(&planned) {
            // The same load would give the same plan; it is asked again when it may have changed.
            term.evaluate_at = Instant::now() + policy.cooldown.max(EVALUATE_EVERY);
            return Ok(Step::Wait(None));
        }
        let detail = summary(&planned, "by the measured load");
        tracing::info!(detail, "rebalances");
        let operation = begin(state, OperationKind::Rebalance, self.id.as_str(), detail, &signature);
        self.write(publish(state, &inputs, planned, operation, &signature), &term.leadership).await
    }

    /// Writes the measured load when that is due and it has changed.
    async fn write_load(
        &self,
        state: &ClusterState,
        loads: &Arc<LoadSnapshot>,
        term: &mut Term,
    ) -> Result<Step, StoreError> {
        if Instant::now() < term.write_load_at {
            return Ok(Step::Wait(None));
        }
        term.write_load_at = Instant::now() + LOAD_EVERY;
        let ops = writes::load(&self.keys, state, loads, &term.written);
        term.written = Arc::clone(loads);
        if ops.is_empty() {
            return Ok(Step::Wait(None));
        }
        self.commit(ops, &term.leadership).await
    }

    /// Does what an operator asks. Returns false when another leads.
    async fn obey(&self, command: Command, term: &Term) -> bool {
        let Command { request, by, answer } = command;
        if answer.is_closed() {
            return true;
        }
        let (state, loads, signature) =
            (Arc::clone(&self.states.borrow()), Arc::clone(&self.loads.borrow()), self.signature());
        tracing::info!(?request, by, "an operator asks");
        let began = Instant::now();
        let decision = in_background(move || decide(&state, &loads, &request, &by, &signature)).await;
        let decision = match decision {
            Ok(Ok(decision)) => {
                if decision.planned.is_some() {
                    self.metrics.planned(began.elapsed());
                }
                decision
            }
            Ok(Err(refusal)) => {
                let _ = answer.send(Err(refusal.into()));
                return true;
            }
            Err(()) => return true,
        };
        let step = self.write(decision.actions.clone(), &term.leadership).await;
        let leads = !matches!(step, Ok(Step::Fenced));
        // Nobody to tell when the asker has gone.
        let _ = answer.send(match step {
            Ok(Step::Fenced) => Err(CommandError::Deposed),
            Ok(_) => Ok(decision),
            Err(error) => {
                self.metrics.store_failed();
                Err(CommandError::Store(chain(&error)))
            }
        });
        leads
    }

    async fn write(&self, actions: Vec<Action>, leadership: &Leadership) -> Result<Step, StoreError> {
        for action in &actions {
            writes::log(action);
        }
        let leader = self.id.as_str();
        let operation = |action: &Action| match action {
            Action::Record(operation) => Some(operation.clone()),
            _ => None,
        };
        let recorded: Vec<Operation> = actions.iter().filter_map(operation).collect();
        let ops = actions.into_iter().flat_map(|action| ops(&self.keys, action, leader)).collect();
        let step = self.commit(ops, leadership).await?;
        if matches!(step, Step::Wrote) {
            for operation in &recorded {
                self.metrics.recorded(operation);
            }
        }
        Ok(step)
    }

    /// Makes changes, fenced and in order, and waits until they are seen.
    async fn commit(&self, ops: Vec<Op>, leadership: &Leadership) -> Result<Step, StoreError> {
        let mut revision = Revision(0);
        // The key that makes others count comes after them, so what is cut in two is never half in force.
        for ops in ops.chunks(MAX_TXN_OPS - 1) {
            let txn = Txn { compares: vec![leadership.fence()], ops: ops.to_vec() };
            let outcome = self.store.txn(txn).await?;
            if !outcome.succeeded {
                return Ok(Step::Fenced);
            }
            revision = outcome.revision;
        }
        let seen = self.states.clone().wait_for(|state| state.revision() >= revision).await.is_ok();
        Ok(if seen { Step::Wrote } else { Step::Fenced })
    }

    fn signature(&self) -> Signature {
        Signature { leader: self.id.to_string(), at_ms: now_ms() }
    }
}

/// Plans away from the I/O threads: a plan for thousands of nodes takes up to seconds.
async fn in_background<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, ()> {
    tokio::task::spawn_blocking(work).await.map_err(|error| tracing::error!(%error, "planning failed"))
}
