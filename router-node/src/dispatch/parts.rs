//! What of a layer is asked of whom, and where the answers belong.

use std::collections::BTreeMap;
use std::sync::Arc;

use sirocco_proto::Rows;
use sirocco_proto::expert::{DispatchRequest, ExpertOutputs, ExpertRows, Refusal, RefusalReason};
use sirocco_types::{ExpertId, ExpertKey, Fingerprint, LayerId, NodeId, Routing};
use tokio::time::Instant;

use crate::connection::Connection;
use crate::load::ExpertCounts;
use crate::replicas::{Demand, Replica, assign, least_asked};
use crate::topology::Topology;

/// Rows of one expert that are asked for together.
#[derive(Clone, Debug)]
pub(super) struct Part {
    pub(super) expert: ExpertId,
    /// Where its rows belong: `token * top_k + rank`.
    pub(super) slots: Vec<usize>,
    /// Nodes asked so far, in this order; the next attempt prefers another.
    pub(super) asked: Vec<NodeId>,
    /// Why the last attempt failed.
    pub(super) refusal: Option<Refusal>,
    /// How many of the nodes asked say that it is impossible.
    rejections: usize,
}

/// What one node is asked for.
#[derive(Debug)]
pub(super) struct Share {
    pub(super) node: NodeId,
    pub(super) connection: Arc<Connection>,
    /// In percent of an ordinary node.
    pub(super) speed: u32,
    pub(super) parts: Vec<Part>,
}

/// Which nodes a part may be asked of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Choice {
    /// Those asked least often.
    LeastAsked,
    /// Those not asked yet.
    NotAsked,
}

/// One part for each expert that `routing` chose.
pub(super) fn parts(routing: &Routing) -> Vec<Part> {
    let part = |(expert, slots)| Part { expert, slots, asked: Vec::new(), refusal: None, rejections: 0 };
    routing.by_expert().into_iter().map(part).collect()
}

/// Deals `parts` to the nodes that serve them; what no node serves comes back. `turns` counts the choices.
///
/// A node that is suspended is passed over while another serves the same.
pub(super) fn share(
    layer: LayerId,
    parts: Vec<Part>,
    topology: &Topology,
    choice: Choice,
    turns: &ExpertCounts,
) -> (Vec<Share>, Vec<Part>) {
    let (now, mut dealt, mut demands, mut unserved) = (Instant::now(), Vec::new(), Vec::new(), Vec::new());
    for mut part in parts {
        let key = ExpertKey { layer, expert: part.expert };
        let replicas = choose(topology, key, &part.asked, choice, now);
        if replicas.is_empty() {
            part.refusal.get_or_insert_with(|| Refusal::new(RefusalReason::NotHeld, "no expert node serves it"));
            unserved.push(part);
            continue;
        }
        demands.push(Demand { rows: part.slots.len(), replicas, turn: turns.add(key, 1) });
        dealt.push(part);
    }
    let mut shares: BTreeMap<&NodeId, Share> = BTreeMap::new();
    for (mut part, pieces) in dealt.into_iter().zip(assign(&demands)) {
        for (node, rows) in pieces {
            let share = shares.entry(node).or_insert_with(|| Share {
                node: node.clone(),
                connection: Arc::clone(topology.connection(node)),
                speed: topology.speed(node),
                parts: Vec::new(),
            });
            share.parts.push(part.take(rows, node));
        }
    }
    (shares.into_values().collect(), unserved)
}

/// The replicas of `key` that may be asked after those in `asked`.
fn choose<'a>(
    topology: &'a Topology,
    key: ExpertKey,
    asked: &[NodeId],
    choice: Choice,
    now: Instant,
) -> Vec<Replica<'a>> {
    let trusted = |replica: &Replica| !topology.connection(replica.node).standing.suspended(now);
    let fresh = |replica: &Replica| choice == Choice::LeastAsked || !asked.contains(replica.node);
    let of_trusted = least_asked(topology.replicas(key).filter(trusted).filter(fresh), asked);
    if of_trusted.is_empty() { least_asked(topology.replicas(key).filter(fresh), asked) } else { of_trusted }
}

impl Part {
    /// Takes the first `rows` of its slots away, for `node` to be asked.
    fn take(&mut self, rows: usize, node: &NodeId) -> Self {
        let rest = self.slots.split_off(rows);
        let asked = self.asked.iter().chain([node]).cloned().collect();
        Self {
            expert: self.expert,
            slots: std::mem::replace(&mut self.slots, rest),
            asked,
            refusal: self.refusal.clone(),
            rejections: self.rejections,
        }
    }

    /// The part, after it was refused.
    fn refused(mut self, refusal: Refusal) -> Self {
        self.rejections += usize::from(rejects(refusal.reason));
        self.refusal = Some(refusal);
        self
    }

    /// Why it is impossible, if all that were asked say so.
    pub(super) fn impossible(&self) -> Option<&Refusal> {
        self.refusal.as_ref().filter(|_| self.rejections > 0 && self.rejections == self.asked.len())
    }
}

impl Share {
    /// The rows of `hidden`, `[tokens, width]`, that the node is asked about, and which expert runs on which; each token's row
    /// is sent once however many of its experts the node holds.
    pub(super) fn request(
        &self,
        (fingerprint, layer): (Fingerprint, LayerId),
        hidden: &[f32],
        (width, top_k): (usize, usize),
        deadline: Instant,
    ) -> DispatchRequest {
        let mut row_of_token = BTreeMap::new();
        let mut data = Vec::new(); // [rows, width]
        let mut experts = Vec::with_capacity(self.parts.len());
        for part in &self.parts {
            let rows = part.slots.iter().map(|slot| {
                let token = slot / top_k;
                *row_of_token.entry(token).or_insert_with(|| {
                    data.extend_from_slice(&hidden[token * width..][..width]);
                    (data.len() / width - 1) as u32
                })
            });
            experts.push(ExpertRows { expert: part.expert, rows: rows.collect() });
        }
        DispatchRequest {
            id: 0,
            fingerprint,
            layer,
            deadline: Some(deadline.saturating_duration_since(Instant::now())),
            hidden_states: Rows::new(data, width),
            experts,
        }
    }
}

/// The rows of a layer as they come in.
#[derive(Debug)]
pub(super) struct Collected {
    width: usize,
    /// `[tokens * top_k, width]`
    pub(super) rows: Vec<f32>,
    /// By slot.
    there: Vec<bool>,
    missing: usize,
}

impl Collected {
    /// None of `slots` rows of `width` yet.
    pub(super) fn new(slots: usize, width: usize) -> Self {
        Self { width, rows: vec![0.0; slots * width], there: vec![false; slots], missing: slots }
    }

    /// Whether every row is there.
    pub(super) fn is_complete(&self) -> bool {
        self.missing == 0
    }

    /// Leaves only those slots in `part` whose rows are missing and for which no call counts in `asked`; none when there are
    /// none.
    pub(super) fn rest_of(&self, mut part: Part, asked: &[usize]) -> Option<Part> {
        part.slots.retain(|slot| !self.there[*slot] && asked[*slot] == 0);
        (!part.slots.is_empty()).then_some(part)
    }

    /// Puts a node's rows where they belong. Returns the parts that it refused, and why if it failed as a whole. An answer that
    /// does not fit what was asked is a failure and counts for nothing.
    pub(super) fn take(
        &mut self,
        parts: Vec<Part>,
        result: Result<ExpertOutputs, Refusal>,
    ) -> (Vec<Part>, Option<RefusalReason>) {
        let misfit = || Refusal::new(RefusalReason::Internal, "an expert node's answer does not fit the request");
        let fitting = result.and_then(|outputs| if self.fits(&parts, &outputs) { Ok(outputs) } else { Err(misfit()) });
        let outputs = match fitting {
            Ok(outputs) => outputs,
            Err(refusal) => {
                let reason = refusal.reason;
                return (parts.into_iter().map(|part| part.refused(refusal.clone())).collect(), Some(reason));
            }
        };
        let mut next = 0;
        let mut refused = Vec::new();
        for (part, (_, result)) in parts.into_iter().zip(outputs.experts) {
            match result {
                Err(refusal) => refused.push(part.refused(refusal)),
                Ok(()) => {
                    for &slot in &part.slots {
                        outputs.rows.copy_row(next, &mut self.rows[slot * self.width..][..self.width]);
                        next += 1;
                        self.missing -= usize::from(!std::mem::replace(&mut self.there[slot], true));
                    }
                }
            }
        }
        (refused, None)
    }

    fn fits(&self, parts: &[Part], outputs: &ExpertOutputs) -> bool {
        let asked = parts.iter().map(|part| part.expert);
        let expected: usize =
            parts.iter().zip(&outputs.experts).filter(|(_, (_, r))| r.is_ok()).map(|(part, _)| part.slots.len()).sum();
        asked.eq(outputs.experts.iter().map(|(expert, _)| *expert))
            && outputs.rows.len() == expected
            && (outputs.rows.is_empty() || outputs.rows.width() == self.width)
    }
}

/// Whether a node that refuses for `reason` says that asking again cannot help.
fn rejects(reason: RefusalReason) -> bool {
    use RefusalReason::{Corrupt, DeadlineExceeded, Internal, Invalid, NotHeld, Unavailable, WrongModel};
    match reason {
        Invalid | WrongModel => true,
        NotHeld | Corrupt | Unavailable | DeadlineExceeded | Internal => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::tests::spec;
    use crate::topology::tests::topology;

    const WIDTH: usize = 2;

    fn part(expert: u32, slots: &[usize]) -> Part {
        Part { expert: ExpertId(expert), slots: slots.to_vec(), asked: Vec::new(), refusal: None, rejections: 0 }
    }

    fn outputs(experts: &[(u32, Result<(), Refusal>)], rows: Vec<f32>) -> ExpertOutputs {
        let experts = experts.iter().map(|(expert, result)| (ExpertId(*expert), result.clone())).collect();
        ExpertOutputs { experts, rows: Rows::new(rows, WIDTH) }
    }

    #[test]
    fn rows_go_to_their_slots_and_what_was_refused_stays_missing() {
        let not_held = Refusal::new(RefusalReason::NotHeld, "not here");
        let parts = vec![part(3, &[4, 1]), part(5, &[0]), part(6, &[2])];
        let answer =
            outputs(&[(3, Ok(())), (5, Err(not_held.clone())), (6, Ok(()))], vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        let mut collected = Collected::new(5, WIDTH);
        let (refused, failure) = collected.take(parts, Ok(answer));
        assert_eq!(failure, None);
        assert_eq!(collected.rows, [0.0, 0.0, 3.0, 4.0, 5.0, 6.0, 0.0, 0.0, 1.0, 2.0]);
        let left: Vec<_> = refused.iter().map(|part| (part.expert, part.slots.clone(), part.refusal.clone())).collect();
        assert_eq!(left, [(ExpertId(5), vec![0], Some(not_held))]);
        let rest_of = |part, asked| collected.rest_of(part, asked).map(|part| part.slots);
        assert_eq!(rest_of(part(5, &[4, 0, 1, 3]), &[0; 5]), Some(vec![0, 3]));
        assert_eq!(rest_of(part(5, &[4, 0, 1, 3]), &[1, 0, 0, 0, 0]), Some(vec![3]), "slot 0 is asked for");
        assert!(rest_of(part(6, &[2]), &[0; 5]).is_none() && !collected.is_complete());

        let again = collected.take(vec![part(3, &[4, 1])], Ok(outputs(&[(3, Ok(()))], vec![1.0, 2.0, 3.0, 4.0])));
        assert!(again.0.is_empty(), "a second answer changes nothing");
        let rest = outputs(&[(5, Ok(())), (7, Ok(()))], vec![7.0; 4]);
        assert!(collected.take(vec![part(5, &[0]), part(7, &[3])], Ok(rest)).0.is_empty());
        assert!(collected.is_complete());
    }

    #[test]
    fn an_answer_that_does_not_fit_is_a_refusal_and_not_a_wrong_sum() {
        let cases = [
            outputs(&[(3, Ok(()))], vec![1.0; 2 * WIDTH]),
            outputs(&[(4, Ok(()))], vec![1.0; WIDTH]),
            outputs(&[], vec![]),
            ExpertOutputs { experts: vec![(ExpertId(3), Ok(()))], rows: Rows::new(vec![1.0; 3], 3) },
        ];
        for answer in cases {
            let mut collected = Collected::new(1, WIDTH);
            let (refused, failure) = collected.take(vec![part(3, &[0])], Ok(answer));
            assert_eq!(failure, Some(RefusalReason::Internal));
            assert_eq!(refused[0].refusal.as_ref().map(|refusal| refusal.reason), Some(RefusalReason::Internal));
            assert!(!collected.is_complete() && collected.rows == [0.0; WIDTH]);
        }
    }

    #[test]
    fn a_part_is_impossible_once_all_that_were_asked_say_so() {
        use RefusalReason::*;
        let ids = ["a", "b"].map(|name| NodeId::new(name).unwrap());
        for (reasons, impossible) in [
            (&[Invalid][..], true),
            (&[WrongModel, Invalid], true),
            (&[Unavailable, Invalid], false),
            (&[WrongModel, Corrupt], false),
            (&[NotHeld], false),
            (&[DeadlineExceeded], false),
            (&[Internal], false),
        ] {
            let mut collected = Collected::new(1, WIDTH);
            let mut parts = vec![part(3, &[0])];
            for (reason, node) in reasons.iter().zip(&ids) {
                let asked = vec![parts[0].take(1, node)];
                let single = outputs(&[(3, Err(Refusal::new(*reason, "why")))], vec![]);
                (parts, _) = collected.take(asked, Ok(single));
            }
            assert_eq!(parts[0].impossible().is_some(), impossible, "{reasons:?}");
        }
    }

    #[tokio::test]
    async fn a_retry_goes_to_another_replica_and_a_split_loses_no_row() {
        let topology = topology(&[("a", None), ("b", None)]);
        let turns = ExpertCounts::new(&spec());
        let ask = |parts, choice| share(LayerId(1), parts, &topology, choice, &turns);
        let slots: Vec<usize> = (0..32).map(|row| 3 * row).collect();
        let (halves, unserved) = ask(vec![part(3, &slots)], Choice::LeastAsked);
        assert!(unserved.is_empty());
        assert_eq!(halves.iter().map(|share| share.node.as_str()).collect::<Vec<_>>(), ["a", "b"]);
        let asked: Vec<usize> = halves.iter().flat_map(|share| &share.parts).flat_map(|p| p.slots.clone()).collect();
        assert_eq!(asked, slots);

        for half in halves {
            let (first, parts) = (half.node, half.parts);
            let second = ask(parts, Choice::LeastAsked).0.pop().unwrap();
            assert_ne!(second.node, first);
            assert_eq!(second.parts[0].asked, [first, second.node.clone()]);
            let (third, rest) = ask(second.parts, Choice::NotAsked);
            assert!(third.is_empty() && rest.len() == 1, "both were asked");
        }
    }

    #[tokio::test]
    async fn a_suspended_node_is_asked_only_for_what_no_other_serves() {
        let topology = topology(&[("a", None), ("b", None)]);
        let turns = ExpertCounts::new(&spec());
        let asks = |asked: &[&NodeId]| {
            let asked = asked.iter().copied().cloned().collect();
            let part = Part { asked, ..part(3, &[0]) };
            share(LayerId(1), vec![part], &topology, Choice::LeastAsked, &turns).0.pop().unwrap().node
        };
        let [a, b] = ["a", "b"].map(|name| NodeId::new(name).unwrap());
        while !topology.connection(&a).standing.failed(Instant::now()) {}
        assert!((0..8).all(|_| asks(&[]) == b), "it is passed over");
        assert_eq!(asks(&[&b]), b, "even by those who have asked the other in vain");
        while !topology.connection(&b).standing.failed(Instant::now()) {}
        assert_eq!(asks(&[&b]), a, "with all suspended none is");
    }
}
