//! Whose turn it is: shares what the engine computes among clients, by what each was given so far.
//!
//! A flow is what one client asks at one priority. It counts the tokens computed for it, cheaper ones at a higher priority, and
//! who has the least goes first; a flow that comes back after a rest starts at the level of the others, so nobody saves up and
//! nobody waits for ever. Source: fairness by a virtual token counter, Sheng et al., OSDI 2024.

use std::collections::{BTreeMap, VecDeque};

use sirocco_types::Priority;

use super::SequenceId;

/// Who a request is from, among those who share the engine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct ClientId(pub(crate) u64);

/// One client at one priority.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Flow {
    pub(crate) client: ClientId,
    pub(crate) priority: Priority,
}

/// A waiting sequence, in the order in which they are admitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Turn {
    /// Whether its flow has another one that runs.
    pub(super) runs: bool,
    /// What its flow has been given, now or when it was first admitted.
    pub(super) rank: u64,
    pub(super) id: SequenceId,
    pub(super) flow: Flow,
}

#[derive(Debug, Default)]
pub(super) struct Flows {
    flows: BTreeMap<Flow, State>,
    /// The least that an active flow has been given.
    floor: u64,
}

#[derive(Debug, Default)]
struct State {
    served: u64,
    waiting: VecDeque<SequenceId>,
    running: usize,
}

impl State {
    fn is_active(&self) -> bool {
        self.running > 0 || !self.waiting.is_empty()
    }
}

impl Flows {
    /// Queues `id`.
    pub(super) fn enqueue(&mut self, flow: Flow, id: SequenceId) {
        self.wake(flow).waiting.push_back(id);
    }

    /// The first waiting sequence of the flow that is next: of those with nothing running, or else of all, the one that was
    /// given least.
    pub(super) fn next(&self) -> Option<Turn> {
        let turn = |(flow, state): (&Flow, &State)| {
            let id = *state.waiting.front()?;
            Some(Turn { runs: state.running > 0, rank: state.served, id, flow: *flow })
        };
        self.flows.iter().filter_map(turn).min()
    }

    /// Whether a sequence of `flow` runs.
    pub(super) fn runs(&self, flow: Flow) -> bool {
        self.flows.get(&flow).is_some_and(|state| state.running > 0)
    }

    /// Takes `id` out of the queue, wherever it stands in it.
    pub(super) fn dequeue(&mut self, flow: Flow, id: SequenceId) {
        if let Some(state) = self.flows.get_mut(&flow) {
            state.waiting.retain(|waiting| *waiting != id);
        }
        self.settle();
    }

    /// A sequence of `flow` begins to run.
    pub(super) fn began(&mut self, flow: Flow) {
        self.wake(flow).running += 1;
    }

    /// A sequence of `flow` runs no more.
    pub(super) fn ended(&mut self, flow: Flow) {
        if let Some(state) = self.flows.get_mut(&flow) {
            state.running -= 1;
        }
        self.settle();
    }

    /// `tokens` are computed for `flow`.
    pub(super) fn charge(&mut self, flow: Flow, tokens: usize) {
        if let Some(state) = self.flows.get_mut(&flow) {
            state.served += tokens as u64 * cost(flow.priority);
        }
        self.settle();
    }

    /// What `flow` was given so far.
    pub(super) fn served(&self, flow: Flow) -> u64 {
        self.flows.get(&flow).map_or(self.floor, |state| state.served)
    }

    /// A flow that should give a place to `flow`: the one with the most running sequences, when `flow` has none, that one has
    /// more than one, and it is of no higher priority.
    pub(super) fn donor(&self, flow: Flow) -> Option<Flow> {
        if self.runs(flow) {
            return None;
        }
        let lower = self.flows.iter().filter(|(other, state)| other.priority <= flow.priority && state.running > 1);
        lower.max_by_key(|(_, state)| (state.running, state.served)).map(|(other, _)| *other)
    }

    fn wake(&mut self, flow: Flow) -> &mut State {
        let floor = self.floor;
        let state = self.flows.entry(flow).or_default();
        if !state.is_active() {
            state.served = state.served.max(floor);
        }
        state
    }

    /// Raises the floor to the least of the active flows, and forgets resting ones that have nothing left to pay.
    fn settle(&mut self) {
        let least = self.flows.values().filter(|state| state.is_active()).map(|state| state.served).min();
        match least {
            Some(least) => {
                self.floor = self.floor.max(least);
                let floor = self.floor;
                self.flows.retain(|_, state| state.is_active() || state.served > floor);
            }
            None => self.flows.clear(),
        }
    }
}

/// What a token counts at this priority: each has four times the share of the one below.
fn cost(priority: Priority) -> u64 {
    match priority {
        Priority::Low => 16,
        Priority::Normal => 4,
        Priority::High => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flow(client: u64, priority: Priority) -> Flow {
        Flow { client: ClientId(client), priority }
    }

    #[test]
    fn who_was_given_least_is_next_and_priorities_have_four_times_the_share() {
        let mut flows = Flows::default();
        let ours = [flow(1, Priority::Low), flow(2, Priority::Normal), flow(3, Priority::High)];
        for (index, flow) in ours.into_iter().enumerate() {
            for i in 0..500 {
                flows.enqueue(flow, SequenceId(index as u64 * 1000 + i));
            }
        }
        let mut turns = BTreeMap::new();
        for _ in 0..420 {
            let Turn { id, flow, .. } = flows.next().unwrap();
            flows.dequeue(flow, id);
            flows.charge(flow, 10);
            *turns.entry(flow.priority).or_insert(0) += 1;
        }
        assert_eq!(turns.into_values().collect::<Vec<_>>(), [20, 80, 320]);
    }

    #[test]
    fn a_rest_saves_nothing_up_and_a_debt_is_kept() {
        let mut flows = Flows::default();
        let (busy, late) = (flow(1, Priority::Normal), flow(2, Priority::Normal));
        flows.began(busy);
        flows.charge(busy, 1000);
        flows.began(late);
        assert_eq!(flows.served(late), flows.served(busy));
        flows.charge(late, 50);
        flows.ended(late);
        flows.began(late);
        assert_eq!(flows.served(late), flows.served(busy) + 200);
        flows.ended(late);
        flows.charge(busy, 100);
        assert_eq!(flows.flows.len(), 1, "what has nothing left to pay is forgotten");
    }

    #[test]
    fn a_place_is_given_by_who_has_most_and_no_higher_priority() {
        let mut flows = Flows::default();
        let [a, b, high] = [flow(1, Priority::Normal), flow(2, Priority::Normal), flow(3, Priority::High)];
        for taker in [a, a, a, b, b, high, high, high, high] {
            flows.began(taker);
        }
        assert_eq!(flows.donor(flow(4, Priority::Normal)), Some(a));
        assert_eq!(flows.donor(flow(4, Priority::High)), Some(high));
        assert_eq!(flows.donor(flow(4, Priority::Low)), None);
        assert_eq!(flows.donor(b), None, "it has places of its own");
    }
}
