//! The experts of a layer, wherever they are: groups a batch's rows by node, asks all nodes at once, and puts what comes
//! back where it belongs. The weighted sum is then taken in each token's own top-k order, never in the order of arrival.
//!
//! Rows that a node refused go to another replica at once, or wait for a placement that has one, until time is up. Rows that are
//! late by what is usual ([`crate::standing`]) are asked of another replica too; whichever answers first counts, for both answer
//! with the same bits. Which replica computes what is for [`crate::replicas`] to say. Where many calls fail, they are repeated only
//! as fast as a budget allows; and what every replica calls impossible is not repeated.

mod parts;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod wire_faults;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use sirocco_model::{Experts, ExpertsError, combine};
use sirocco_proto::expert::{DispatchRequest, ExpertOutputs, Refusal};
use sirocco_types::{ExpertId, ExpertKey, Fingerprint, LayerId, Routing};
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use crate::load::ExpertCounts;
use crate::metrics::Metrics;
use crate::standing::{Budget, Usual};
use crate::topology::Topology;
use parts::{Choice, Collected, Part, Share, parts, share};

/// Waits between attempts: the first, and the longest after doubling.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(500));

/// After this long without an answer, or twice what is late, nothing is saved by not asking another replica.
const LOST: Duration = Duration::from_secs(1);

/// The experts of a cluster.
#[derive(Clone, Debug)]
pub(crate) struct RemoteExperts {
    pub(crate) topology: watch::Receiver<Arc<Topology>>,
    pub(crate) fingerprint: Fingerprint,
    pub(crate) hidden_size: usize,
    /// How long one layer may wait for its experts, re-placement included.
    pub(crate) timeout: Duration,
    /// Routed tokens, each counted once for each of its experts, however often they are asked.
    pub(crate) tokens: Arc<ExpertCounts>,
    /// Choices made among the replicas of each expert.
    pub(crate) turns: Arc<ExpertCounts>,
    /// What answers usually take.
    pub(crate) usual: Arc<Usual>,
    pub(crate) hedges: Arc<Budget>,
    pub(crate) retries: Arc<Budget>,
    pub(crate) metrics: Arc<Metrics>,
}

/// A call that is not answered yet.
struct Call {
    share: Share,
    /// Rows sent.
    rows: usize,
    sent: Instant,
    /// When to look whether others should be asked.
    late: Instant,
    /// Whether it counts against its node that this is late.
    struck: bool,
    /// Whether others were asked for all of it.
    hedged: bool,
}

/// One layer under way.
struct LayerCall<'a> {
    experts: &'a RemoteExperts,
    layer: LayerId,
    hidden: &'a [f32],
    top_k: usize,
    began: Instant,
    deadline: Instant,
    collected: Collected,
    calls: BTreeMap<usize, Call>,
    next_call: usize,
    /// How many calls are under way for each slot, late ones left out.
    asked: Vec<usize>,
    /// What is asked of nobody now.
    stranded: Vec<Part>,
    /// Whether some of it may not have been tried everywhere.
    eager: bool,
    /// When what was tried everywhere is tried again.
    retry: Instant,
    backoff: Duration,
}

impl Experts for RemoteExperts {
    async fn forward(
        &self,
        layer: LayerId,
        hidden: &[f32],
        routing: &Routing,
        until: Option<std::time::Instant>,
    ) -> Result<Vec<f32>, ExpertsError> {
        let began = Instant::now();
        let most = began + self.timeout;
        let deadline = until.map_or(most, |until| most.min(until.into()));
        let mut state = LayerCall::new(self, layer, (hidden, routing), (began, deadline));
        let mut topology = self.topology.clone();
        let mut answers = FuturesUnordered::new();
        while !state.collected.is_complete() {
            let fresh = topology.has_changed().unwrap_or(false);
            if state.acts_at(fresh) <= Instant::now() {
                let current = Arc::clone(&topology.borrow_and_update());
                for share in state.act(&current, fresh, Instant::now())? {
                    let connection = Arc::clone(&share.connection);
                    let (id, request) = state.open(share, Instant::now());
                    // The placement is in use until what is sent by it is answered.
                    let placement = Arc::clone(&current);
                    answers.push(async move {
                        let result = connection.call(request).await;
                        drop(placement);
                        (id, result)
                    });
                }
            }
            let wake = state.acts_at(false).min(state.deadline);
            tokio::select! {
                biased;
                Some((id, result)) = answers.next() => state.answered(id, result, Instant::now()),
                () = sleep_until(wake) => {
                    if Instant::now() >= state.deadline {
                        return Err(ExpertsError::Unavailable(state.describe()));
                    }
                }
                Ok(()) = topology.changed() => topology.mark_changed(),
            }
        }
        let collected = Instant::now();
        let combined = combine(&state.collected.rows, routing, self.hidden_size);
        self.metrics.layer(collected - began, collected.elapsed());
        Ok(combined)
    }
}

impl<'a> LayerCall<'a> {
    /// The rows of `hidden`, `[tokens, hidden_size]`, for the experts of `routing`, from now, `began`, to `deadline`.
    fn new(
        experts: &'a RemoteExperts,
        layer: LayerId,
        (hidden, routing): (&'a [f32], &Routing),
        (began, deadline): (Instant, Instant),
    ) -> Self {
        let stranded = parts(routing);
        for part in &stranded {
            experts.tokens.add(ExpertKey { layer, expert: part.expert }, part.slots.len() as u64);
        }
        let slots = routing.experts.len();
        Self {
            experts,
            layer,
            hidden,
            top_k: routing.top_k,
            began,
            deadline,
            collected: Collected::new(slots, experts.hidden_size),
            calls: BTreeMap::new(),
            next_call: 0,
            asked: vec![0; slots],
            stranded,
            eager: true,
            retry: began,
            backoff: BACKOFF.0,
        }
    }

    /// When [`LayerCall::act`] has something to do: at once when the placement is `fresh`.
    fn acts_at(&self, fresh: bool) -> Instant {
        let now = Instant::now();
        if fresh || (self.eager && !self.stranded.is_empty()) {
            return now;
        }
        let retry = (!self.stranded.is_empty()).then_some(self.retry);
        let late = self.calls.values().filter(|call| !call.hedged).map(|call| call.late);
        late.chain(retry).min().unwrap_or(self.deadline)
    }

    /// What to ask now, of whom: what is stranded, and what is late. Errors when asking again cannot help.
    fn act(&mut self, topology: &Topology, fresh: bool, now: Instant) -> Result<Vec<Share>, ExpertsError> {
        let mut shares = self.retry(topology, fresh, now)?;
        for call in self.calls.values_mut() {
            let waits = call.struck && fresh;
            if !call.hedged && (call.late <= now || waits) {
                shares.extend(call.hedge(self.experts, self.layer, (&self.collected, &mut self.asked), topology, now));
            }
        }
        Ok(shares)
    }

    /// Deals what is stranded: to nodes that were not asked yet at once, as far as the budget goes, to others when it is time or
    /// the placement is `fresh`. Errors when every node that serves something of it says that it is impossible.
    fn retry(&mut self, topology: &Topology, fresh: bool, now: Instant) -> Result<Vec<Share>, ExpertsError> {
        self.eager = false;
        let due = fresh || now >= self.retry;
        let again = self.stranded.iter().any(|part| !part.asked.is_empty());
        if again && !due && !self.experts.retries.allows() {
            return Ok(Vec::new());
        }
        let deal = |parts, choice| share(self.layer, parts, topology, choice, &self.experts.turns);
        let (mut shares, tried) = deal(std::mem::take(&mut self.stranded), Choice::NotAsked);
        if let Some(refusal) = tried.iter().find_map(Part::impossible) {
            return Err(ExpertsError::Internal(refusal.message.clone()));
        }
        if !due {
            self.stranded = tried;
            return Ok(shares);
        }
        let (again, unserved) = deal(tried, Choice::LeastAsked);
        shares.extend(again);
        if !unserved.is_empty() {
            self.stranded = unserved;
            self.back_off(now);
        }
        Ok(shares)
    }

    fn back_off(&mut self, now: Instant) {
        if self.retry <= now {
            self.retry = now + self.backoff;
            self.backoff = (self.backoff * 2).min(BACKOFF.1);
        }
    }

    /// Notes a call of `share` and says what to send.
    fn open(&mut self, share: Share, now: Instant) -> (usize, DispatchRequest) {
        let model = (self.experts.fingerprint, self.layer);
        let request = share.request(model, self.hidden, (self.experts.hidden_size, self.top_k), self.deadline);
        let rows = request.hidden_states.len();
        let again = share.parts.iter().filter(|part| part.asked.len() > 1).count();
        share.connection.hop.asked(rows, again);
        share.parts.iter().flat_map(|part| &part.slots).for_each(|slot| self.asked[*slot] += 1);
        self.experts.hedges.earn();
        if again > 0 {
            self.experts.retries.spend();
        } else {
            self.experts.retries.earn();
        }
        let late = now + self.experts.usual.patience(rows, share.speed);
        let call = Call { share, rows, sent: now, late, struck: false, hedged: false };
        self.calls.insert(self.next_call, call);
        self.next_call += 1;
        (self.next_call - 1, request)
    }

    /// Takes in what call `id` brought.
    fn answered(&mut self, id: usize, result: Result<ExpertOutputs, Refusal>, now: Instant) {
        let Some(Call { share, rows, sent, struck, .. }) = self.calls.remove(&id) else { return };
        let Share { node, connection, speed, parts } = share;
        if !struck {
            parts.iter().flat_map(|part| &part.slots).for_each(|slot| self.asked[*slot] -= 1);
        }
        let (hop, standing) = (&connection.hop, &connection.standing);
        let (refused, failure) = self.collected.take(parts, result);
        match failure {
            None => {
                hop.answered(now - sent);
                refused.iter().filter_map(|part| part.refusal.as_ref()).for_each(|refusal| hop.refused(refusal.reason));
                self.experts.usual.took(rows, speed, now - sent);
                if !struck {
                    standing.answered();
                }
            }
            Some(reason) => {
                hop.refused(reason);
                if standing.failed(now) {
                    tracing::warn!(%node, reason = reason.as_str(), "an expert node failed again and again, others are asked");
                }
            }
        }
        for part in refused.into_iter().filter_map(|part| self.collected.rest_of(part, &self.asked)) {
            tracing::debug!(layer = %self.layer, expert = %part.expert, "an expert did not answer, trying again");
            self.stranded.push(part);
            self.eager = true;
        }
        if self.eager {
            self.back_off(now);
        }
    }

    /// Names the first expert that is missing and what is known of why.
    fn describe(&self) -> String {
        let silent = self.calls.values().flat_map(|call| {
            let why = format!("expert node {} at {} did not answer", call.share.node, call.share.connection.address());
            call.share.parts.iter().map(move |part| (part.expert, why.clone()))
        });
        let stranded = self.stranded.iter().map(|part| {
            let why = part.refusal.as_ref().map_or("no reason given", |refusal| refusal.message.as_str());
            (part.expert, why.to_owned())
        });
        let missing: BTreeMap<ExpertId, String> = silent.chain(stranded).collect();
        let others = match missing.len().saturating_sub(1) {
            0 => String::new(),
            n => format!(" (and {n} more experts of the layer)"),
        };
        let (expert, why) = missing.into_iter().next().unwrap_or_default();
        let (key, seconds) = (ExpertKey { layer: self.layer, expert }, (self.deadline - self.began).as_secs_f64());
        format!("{key} did not answer within {seconds} s{others}: {why}")
    }
}

impl Call {
    /// What others are asked for because this is late: all of it that is missing and `asked` of nobody who may still be in time.
    fn hedge(
        &mut self,
        experts: &RemoteExperts,
        layer: LayerId,
        (collected, asked): (&Collected, &mut [usize]),
        topology: &Topology,
        now: Instant,
    ) -> Vec<Share> {
        let Share { node, connection, parts, speed } = &self.share;
        // To look again in case nobody else can be asked now.
        self.late = now + experts.usual.patience(self.rows, *speed);
        if !self.struck {
            self.struck = true;
            parts.iter().flat_map(|part| &part.slots).for_each(|slot| asked[*slot] -= 1);
            connection.hop.late();
            connection.probe();
            if connection.standing.failed(now) {
                let late_ms = (now - self.sent).as_millis();
                tracing::warn!(%node, late_ms, "an expert node is late again and again, others are asked");
            }
        }
        let missing: Vec<Part> = parts.iter().filter_map(|part| collected.rest_of(part.clone(), asked)).collect();
        let serves = |part: &Part| {
            topology.replicas(ExpertKey { layer, expert: part.expert }).any(|replica| replica.node == node)
        };
        // A node that serves it no more, or is taken for lost, is not hedged but replaced.
        let lost = now - self.sent >= LOST.max(experts.usual.patience(self.rows, *speed) * 2);
        if !lost && missing.iter().any(serves) {
            if !experts.hedges.allows() {
                return Vec::new();
            }
            experts.hedges.spend();
        }
        let (shares, unserved) = share(layer, missing, topology, Choice::NotAsked, &experts.turns);
        self.hedged = unserved.is_empty();
        shares
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::tests::spec;

    #[tokio::test]
    async fn a_token_is_counted_once_for_each_of_its_experts_however_often_they_are_asked() {
        let experts = RemoteExperts { timeout: 3 * BACKOFF.0, ..simulation::experts(Arc::default()) };
        let routing = Routing { top_k: 2, experts: [3, 5, 5, 0].map(ExpertId).to_vec(), weights: vec![0.5; 4] };
        let hidden = vec![0.0; 2 * experts.hidden_size];
        let result = experts.forward(LayerId(1), &hidden, &routing, None).await;
        let Err(ExpertsError::Unavailable(text)) = result else { panic!("{result:?}") };
        assert_eq!(
            text,
            "expert 0 of layer 1 did not answer within 0.015 s (and 2 more experts of the layer): no expert node serves it"
        );
        assert_eq!(experts.tokens.totals(), [[0; 8], [1, 0, 0, 1, 0, 2, 0, 0]]);
        assert_eq!(spec().num_hidden_layers, 2);
    }
}
