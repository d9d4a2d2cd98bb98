//! The experts of a layer, wherever they are: groups a batch's rows by node, asks all nodes at once, and puts what comes
//! back where it belongs. The weighted sum is then taken in each token's own top-k order, never in the order of arrival.
//!
//! Rows that a node could not answer go to another replica, or wait for a placement that has one, until time is up. Which
//! replica computes what is for [`crate::replicas`] to say.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use sirocco_model::{Experts, ExpertsError, combine};
use sirocco_proto::Rows;
use sirocco_proto::expert::{DispatchRequest, ExpertOutputs, ExpertRows, Refusal, RefusalReason};
use sirocco_types::{ExpertId, ExpertKey, Fingerprint, LayerId, NodeId, Routing};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::connection::Connection;
use crate::load::ExpertCounts;
use crate::metrics::Metrics;
use crate::replicas::{Demand, assign, least_asked};
use crate::topology::Topology;

/// Waits between attempts: the first, and the longest after doubling.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(500));

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
    pub(crate) metrics: Arc<Metrics>,
}

/// Rows of one expert that are still missing.
#[derive(Debug)]
struct Missing {
    expert: ExpertId,
    /// Where its rows belong: `token * top_k + rank`.
    slots: Vec<usize>,
    /// Nodes asked so far, in this order; the next attempt prefers another.
    asked: Vec<NodeId>,
    /// Why the last attempt failed.
    refusal: Option<Refusal>,
}

/// What one node is asked for.
struct Share {
    node: NodeId,
    connection: Arc<Connection>,
    parts: Vec<Missing>,
}

impl Experts for RemoteExperts {
    async fn forward(&self, layer: LayerId, hidden: &[f32], routing: &Routing) -> Result<Vec<f32>, ExpertsError> {
        let mut rows = vec![0.0; routing.experts.len() * self.hidden_size]; // [tokens * top_k, hidden]
        let deadline = Instant::now() + self.timeout;
        let mut topology = self.topology.clone();
        let mut backoff = BACKOFF.0;
        let began = Instant::now();
        let mut combining = Duration::ZERO;
        let mut missing: Vec<Missing> = routing
            .by_expert()
            .into_iter()
            .map(|(expert, slots)| Missing { expert, slots, asked: Vec::new(), refusal: None })
            .collect();
        for part in &missing {
            self.tokens.add(ExpertKey { layer, expert: part.expert }, part.slots.len() as u64);
        }
        loop {
            let current = Arc::clone(&topology.borrow_and_update());
            let (shares, unreachable) = share(layer, missing, &current, &self.turns);
            missing = unreachable;
            let calls = shares.into_iter().map(|share| self.ask(share, layer, hidden, routing.top_k, deadline));
            let answers = join_all(calls).await;
            let answered = Instant::now();
            for (parts, result) in answers {
                missing.extend(place(parts, result, &mut rows, self.hidden_size)?);
            }
            if missing.is_empty() {
                let combined = combine(&rows, routing, self.hidden_size);
                combining += answered.elapsed();
                self.metrics.layer(began.elapsed().saturating_sub(combining), combining);
                return Ok(combined);
            }
            combining += answered.elapsed();
            if Instant::now() >= deadline {
                return Err(ExpertsError::Unavailable(describe(layer, &missing, self.timeout)));
            }
            tracing::debug!(%layer, experts = missing.len(), "experts did not answer, trying again");
            drop(current);
            let wait = tokio::time::sleep_until(deadline.min(Instant::now() + backoff));
            tokio::select! {
                () = wait => backoff = (backoff * 2).min(BACKOFF.1),
                Ok(()) = topology.changed() => {}
            }
        }
    }
}

impl RemoteExperts {
    /// Asks one node for its share; each token's row is sent once however many of its experts the node holds.
    async fn ask(
        &self,
        share: Share,
        layer: LayerId,
        hidden: &[f32],
        top_k: usize,
        deadline: Instant,
    ) -> (Vec<Missing>, Result<ExpertOutputs, Refusal>) {
        let mut row_of_token = BTreeMap::new();
        let mut data = Vec::new(); // [rows, hidden]
        let mut experts = Vec::with_capacity(share.parts.len());
        for part in &share.parts {
            let rows = part.slots.iter().map(|slot| {
                let token = slot / top_k;
                *row_of_token.entry(token).or_insert_with(|| {
                    data.extend_from_slice(&hidden[token * self.hidden_size..][..self.hidden_size]);
                    (data.len() / self.hidden_size - 1) as u32
                })
            });
            experts.push(ExpertRows { expert: part.expert, rows: rows.collect() });
        }
        let (hop, sent) = (Arc::clone(&share.connection.hop), Instant::now());
        let retries = share.parts.iter().filter(|part| part.asked.len() > 1).count();
        hop.asked(data.len() / self.hidden_size, retries);
        let request = DispatchRequest {
            id: 0,
            fingerprint: self.fingerprint,
            layer,
            deadline: Some(deadline.saturating_duration_since(Instant::now())),
            hidden_states: Rows::new(data, self.hidden_size),
            experts,
        };
        let result = match tokio::time::timeout_at(deadline, share.connection.call(request)).await {
            Ok(result) => result,
            Err(_) => Err(Refusal::new(
                RefusalReason::DeadlineExceeded,
                format!("expert node {} at {} did not answer in time", share.node, share.connection.address()),
            )),
        };
        match &result {
            Ok(outputs) => {
                hop.answered(sent.elapsed());
                let refusals = outputs.experts.iter().filter_map(|(_, result)| result.as_ref().err());
                refusals.for_each(|refusal| hop.refused(refusal.reason));
            }
            Err(refusal) => hop.refused(refusal.reason),
        }
        (share.parts, result)
    }
}

/// Deals `missing` to the nodes that serve it; what no known node serves comes back. `turns` counts the choices.
fn share(
    layer: LayerId,
    missing: Vec<Missing>,
    topology: &Topology,
    turns: &ExpertCounts,
) -> (Vec<Share>, Vec<Missing>) {
    let (mut parts, mut demands, mut unreachable) = (Vec::new(), Vec::new(), Vec::new());
    for mut part in missing {
        let key = ExpertKey { layer, expert: part.expert };
        let replicas = least_asked(topology.replicas(key), &part.asked);
        if replicas.is_empty() {
            part.refusal.get_or_insert_with(|| Refusal::new(RefusalReason::NotHeld, "no expert node serves it"));
            unreachable.push(part);
            continue;
        }
        demands.push(Demand { rows: part.slots.len(), replicas, turn: turns.add(key, 1) });
        parts.push(part);
    }
    let mut shares: BTreeMap<&NodeId, Share> = BTreeMap::new();
    for (mut part, pieces) in parts.into_iter().zip(assign(&demands)) {
        for (node, rows) in pieces {
            let share = shares.entry(node).or_insert_with(|| Share {
                node: node.clone(),
                connection: Arc::clone(topology.connection(node)),
                parts: Vec::new(),
            });
            share.parts.push(part.take(rows, node));
        }
    }
    (shares.into_values().collect(), unreachable)
}

/// Puts a node's rows where they belong and returns what is still missing. Errors when asking again cannot help.
fn place(
    parts: Vec<Missing>,
    result: Result<ExpertOutputs, Refusal>,
    rows: &mut [f32],
    hidden_size: usize,
) -> Result<Vec<Missing>, ExpertsError> {
    let outputs = match result {
        Ok(outputs) => outputs,
        Err(refusal) => return parts.into_iter().map(|part| part.refused(refusal.clone())).collect(),
    };
    let asked = parts.iter().map(|part| part.expert);
    let expected: usize =
        parts.iter().zip(&outputs.experts).filter(|(_, (_, r))| r.is_ok()).map(|(part, _)| part.slots.len()).sum();
    let fits = outputs.rows.is_empty() || outputs.rows.width() == hidden_size;
    if !asked.eq(outputs.experts.iter().map(|(expert, _)| *expert)) || outputs.rows.len() != expected || !fits {
        return Err(ExpertsError::Internal("an expert node's answer does not fit the request".into()));
    }
    let mut next = 0;
    let mut missing = Vec::new();
    for (part, (_, result)) in parts.into_iter().zip(outputs.experts) {
        if let Err(refusal) = result {
            missing.push(part.refused(refusal)?);
            continue;
        }
        for &slot in &part.slots {
            outputs.rows.copy_row(next, &mut rows[slot * hidden_size..][..hidden_size]);
            next += 1;
        }
    }
    Ok(missing)
}

impl Missing {
    /// Takes the first `rows` of its slots away, for `node` to be asked.
    fn take(&mut self, rows: usize, node: &NodeId) -> Self {
        let rest = self.slots.split_off(rows);
        let asked = self.asked.iter().chain([node]).cloned().collect();
        Self {
            expert: self.expert,
            slots: std::mem::replace(&mut self.slots, rest),
            asked,
            refusal: self.refusal.clone(),
        }
    }

    /// Still missing because of `refusal`; an error when that is final.
    fn refused(mut self, refusal: Refusal) -> Result<Self, ExpertsError> {
        use RefusalReason::{Corrupt, DeadlineExceeded, Internal, Invalid, NotHeld, Unavailable, WrongModel};
        match refusal.reason {
            Invalid | WrongModel => Err(ExpertsError::Internal(refusal.message)),
            NotHeld | Corrupt | Unavailable | DeadlineExceeded | Internal => {
                self.refusal = Some(refusal);
                Ok(self)
            }
        }
    }
}

/// Names the first expert that is missing and what is known of why.
fn describe(layer: LayerId, missing: &[Missing], timeout: Duration) -> String {
    let first = &missing[0];
    let key = ExpertKey { layer, expert: first.expert };
    let why = first.refusal.as_ref().map_or("no reason given", |refusal| refusal.message.as_str());
    let others = match missing.len() - 1 {
        0 => String::new(),
        n => format!(" (and {n} more experts of the layer)"),
    };
    format!("{key} did not answer within {} s{others}: {why}", timeout.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::tests::spec;
    use crate::topology::tests::topology;

    const HIDDEN: usize = 2;

    fn part(expert: u32, slots: &[usize]) -> Missing {
        Missing { expert: ExpertId(expert), slots: slots.to_vec(), asked: Vec::new(), refusal: None }
    }

    fn outputs(experts: &[(u32, Result<(), Refusal>)], rows: Vec<f32>) -> ExpertOutputs {
        let experts = experts.iter().map(|(expert, result)| (ExpertId(*expert), result.clone())).collect();
        ExpertOutputs { experts, rows: Rows::new(rows, HIDDEN) }
    }

    #[test]
    fn rows_go_to_their_slots_and_what_was_refused_stays_missing() {
        let not_held = Refusal::new(RefusalReason::NotHeld, "not here");
        let parts = vec![part(3, &[4, 1]), part(5, &[0]), part(6, &[2])];
        let answer =
            outputs(&[(3, Ok(())), (5, Err(not_held.clone())), (6, Ok(()))], vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        let mut rows = vec![0.0; 5 * HIDDEN];
        let missing = place(parts, Ok(answer), &mut rows, HIDDEN).unwrap();
        assert_eq!(rows, [0.0, 0.0, 3.0, 4.0, 5.0, 6.0, 0.0, 0.0, 1.0, 2.0]);
        let left: Vec<_> = missing.iter().map(|part| (part.expert, part.slots.clone(), part.refusal.clone())).collect();
        assert_eq!(left, [(ExpertId(5), vec![0], Some(not_held))]);
    }

    #[test]
    fn an_answer_that_does_not_fit_is_an_error_and_not_a_wrong_sum() {
        let cases = [
            outputs(&[(3, Ok(()))], vec![1.0; 2 * HIDDEN]),
            outputs(&[(4, Ok(()))], vec![1.0; HIDDEN]),
            outputs(&[], vec![]),
            ExpertOutputs { experts: vec![(ExpertId(3), Ok(()))], rows: Rows::new(vec![1.0; 3], 3) },
        ];
        for answer in cases {
            let result = place(vec![part(3, &[0])], Ok(answer), &mut [0.0; HIDDEN], HIDDEN);
            assert!(matches!(result, Err(ExpertsError::Internal(_))));
        }
    }

    #[test]
    fn only_refusals_that_may_pass_are_tried_again() {
        use RefusalReason::*;
        for (reason, again) in [
            (NotHeld, true),
            (Corrupt, true),
            (Unavailable, true),
            (DeadlineExceeded, true),
            (Internal, true),
            (Invalid, false),
            (WrongModel, false),
        ] {
            let result = place(vec![part(3, &[0])], Err(Refusal::new(reason, "why")), &mut [0.0; HIDDEN], HIDDEN);
            assert_eq!(result.is_ok_and(|missing| missing.len() == 1), again, "{reason:?}");
        }
    }

    #[tokio::test]
    async fn a_retry_goes_to_another_replica_and_a_split_loses_no_row() {
        let topology = topology(&[("a", None), ("b", None)]);
        let turns = ExpertCounts::new(&spec());
        let ask = |parts| {
            let (shares, unreachable) = share(LayerId(1), parts, &topology, &turns);
            assert!(unreachable.is_empty());
            shares
        };
        let slots: Vec<usize> = (0..32).map(|row| 3 * row).collect();
        let halves = ask(vec![part(3, &slots)]);
        assert_eq!(halves.iter().map(|share| share.node.as_str()).collect::<Vec<_>>(), ["a", "b"]);
        let asked: Vec<usize> = halves.iter().flat_map(|share| &share.parts).flat_map(|p| p.slots.clone()).collect();
        assert_eq!(asked, slots);

        for half in halves {
            let (first, parts) = (half.node, half.parts);
            let second = ask(parts).pop().unwrap();
            assert_ne!(second.node, first);
            assert_eq!(second.parts[0].asked, [first, second.node.clone()]);
        }
    }

    #[tokio::test]
    async fn a_token_is_counted_once_for_each_of_its_experts_however_often_they_are_asked() {
        let tokens = Arc::new(ExpertCounts::new(&spec()));
        let experts = RemoteExperts {
            topology: watch::Sender::new(Arc::default()).subscribe(),
            fingerprint: Fingerprint([7; 32]),
            hidden_size: HIDDEN,
            timeout: 3 * BACKOFF.0,
            tokens: Arc::clone(&tokens),
            turns: Arc::new(ExpertCounts::new(&spec())),
            metrics: crate::metrics::tests::metrics().0,
        };
        let routing = Routing { top_k: 2, experts: [3, 5, 5, 0].map(ExpertId).to_vec(), weights: vec![0.5; 4] };
        let result = experts.forward(LayerId(1), &[0.0; 2 * HIDDEN], &routing).await;
        assert!(matches!(result, Err(ExpertsError::Unavailable(_))));
        assert_eq!(tokens.totals(), [[0; 8], [1, 0, 0, 1, 0, 2, 0, 0]]);
    }

    #[test]
    fn an_expert_that_nobody_serves_is_named() {
        let (shares, missing) =
            share(LayerId(1), vec![part(7, &[0])], &Topology::default(), &ExpertCounts::new(&spec()));
        assert!(shares.is_empty());
        let text = describe(LayerId(1), &missing, Duration::from_mins(1));
        assert_eq!(text, "expert 7 of layer 1 did not answer within 60 s: no expert node serves it");
    }
}
