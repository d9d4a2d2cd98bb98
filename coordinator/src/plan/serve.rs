//! Phase 1: a node for every expert.
//!
//! Experts stay where they were. One without a node goes to the node with room where its layer ends soonest. When no node
//! can take it, room is made along a chain: it takes the place of another layer's expert, that one takes another's place,
//! and the last one goes where there is memory, or the place of a replica that is not needed to serve. Such chains
//! (augmenting paths) reach the largest number of experts that can be served at all, and move little.

use super::state::{Fleet, State};
use super::{Layout, layer::Layer};

const NOBODY: u32 = u32::MAX;

/// The state in which as many experts as possible have a node, with as much of `previous` as fits.
pub(super) fn serve(fleet: &Fleet<'_>, previous: Option<&Layout>) -> State {
    let mut state = State::empty(fleet);
    if !fleet.can_serve() {
        return state;
    }
    let mut seats = Seats::new(fleet);
    if let Some(previous) = previous {
        keep(fleet, &mut state, &mut seats, previous);
    }
    let stuck = home(fleet, &mut state, &mut seats);
    let mut full = vec![false; fleet.shape.layers];
    for index in stuck {
        let layer = index / fleet.shape.experts;
        full[layer] = full[layer] || !seats.make_room(fleet, &mut state, index);
    }
    state
}

/// Keeps what nodes held: first one node for each expert, a cordoned one if possible because it takes nothing else, else
/// the one with most memory left; then the other replicas that still fit.
fn keep(fleet: &Fleet<'_>, state: &mut State, seats: &mut Seats, previous: &Layout) {
    let nodes = fleet.nodes.len() as u32;
    let layer_of = |index: usize| index / fleet.shape.experts;
    let held = |index: usize| previous.of(index).iter().copied().filter(move |&node| node < nodes);
    for cordoned in [true, false] {
        for index in 0..fleet.shape.total() {
            if seats.of[index] != NOBODY {
                continue;
            }
            let may = |&node: &u32| {
                fleet.nodes[node as usize].cordoned == cordoned && state.fits(fleet, layer_of(index), node)
            };
            let most_free = |&node: &u32| (state.free[node as usize], std::cmp::Reverse(node));
            if let Some(node) = held(index).filter(may).max_by_key(most_free) {
                state.load(fleet, index, node);
                seats.sit(fleet, index, node);
            }
        }
    }
    for index in 0..fleet.shape.total() {
        for node in held(index) {
            if !state.holds(index, node) && state.fits(fleet, layer_of(index), node) {
                state.load(fleet, index, node);
            }
        }
        if !state.holders[index].is_empty() {
            state.fresh[layer_of(index)] = false;
        }
    }
}

/// Gives experts without a node one that has room, hottest first. Returns those for which there is none, in that order.
fn home(fleet: &Fleet<'_>, state: &mut State, seats: &mut Seats) -> Vec<usize> {
    let mut stuck = Vec::new();
    for layer in 0..fleet.shape.layers {
        let first = layer * fleet.shape.experts;
        let homeless = |&expert: &u32| state.holders[first + expert as usize].is_empty();
        let mut homeless: Vec<u32> = (0..fleet.shape.experts as u32).filter(homeless).collect();
        if homeless.is_empty() {
            continue;
        }
        let mut times = Layer::ranked_by_memory(fleet, state, layer);
        homeless.sort_by_key(|&expert| (std::cmp::Reverse(times.weights[expert as usize]), expert));
        for expert in homeless {
            let index = first + expert as usize;
            match times.best_home(expert, |_| true) {
                Some(node) => {
                    times.load(expert, node);
                    state.load(fleet, index, node);
                    seats.sit(fleet, index, node);
                }
                None => stuck.push(index),
            }
        }
    }
    stuck
}

/// Which node serves each expert, of those that hold it: the replicas that only leave a node for another one.
struct Seats {
    /// [layers * experts]
    of: Vec<u32>,
    /// [nodes]
    totals: Vec<u64>,
    /// [layers * nodes]
    counts: Vec<u32>,
}

impl Seats {
    fn new(fleet: &Fleet<'_>) -> Self {
        let nodes = fleet.nodes.len();
        let counts = vec![0; fleet.shape.layers * nodes];
        Self { of: vec![NOBODY; fleet.shape.total()], totals: vec![0; nodes], counts }
    }

    fn count(&mut self, fleet: &Fleet<'_>, layer: usize, node: u32) -> &mut u32 {
        &mut self.counts[layer * fleet.nodes.len() + node as usize]
    }

    fn sit(&mut self, fleet: &Fleet<'_>, index: usize, node: u32) {
        self.of[index] = node;
        self.totals[node as usize] += 1;
        *self.count(fleet, index / fleet.shape.experts, node) += 1;
    }

    fn rise(&mut self, fleet: &Fleet<'_>, index: usize) {
        let node = std::mem::replace(&mut self.of[index], NOBODY);
        self.totals[node as usize] -= 1;
        *self.count(fleet, index / fleet.shape.experts, node) -= 1;
    }

    /// Gives expert `index` a node along the shortest chain of moves. Returns whether there is one.
    fn make_room(&mut self, fleet: &Fleet<'_>, state: &mut State, index: usize) -> bool {
        let layers = fleet.shape.layers;
        let start = index / fleet.shape.experts;
        // how the search came to each node (from a layer) and to each layer (from a node)
        let mut node_from = vec![None; fleet.nodes.len()];
        let mut layer_from: Vec<Option<u32>> = vec![None; layers];
        let mut queue = std::collections::VecDeque::from([start]);
        while let Some(layer) = queue.pop_front() {
            for node in 0..fleet.nodes.len() as u32 {
                let at = node as usize;
                let taken = *self.count(fleet, layer, node) >= fleet.slots[at];
                if fleet.nodes[at].cordoned || node_from[at].is_some() || taken {
                    continue;
                }
                node_from[at] = Some(layer);
                if self.totals[at] < fleet.memory[at] {
                    self.shift(fleet, state, index, node, (&node_from, &layer_from));
                    return true;
                }
                for other in 0..layers {
                    if other != start && layer_from[other].is_none() && *self.count(fleet, other, node) > 0 {
                        layer_from[other] = Some(node);
                        queue.push_back(other);
                    }
                }
            }
        }
        false
    }

    /// Moves an expert of every layer on the chain that ends at `node`, from its end back to expert `index`.
    fn shift(
        &mut self,
        fleet: &Fleet<'_>,
        state: &mut State,
        index: usize,
        mut node: u32,
        (node_from, layer_from): (&[Option<usize>], &[Option<u32>]),
    ) {
        loop {
            let layer = node_from[node as usize].expect("the search came here");
            let Some(from) = layer_from[layer] else {
                self.seat(fleet, state, index, node);
                return;
            };
            let mut experts = layer * fleet.shape.experts..(layer + 1) * fleet.shape.experts;
            let moved = experts.find(|&expert| self.of[expert] == from).expect("the node serves one of this layer");
            self.rise(fleet, moved);
            state.unload(fleet, moved, from);
            self.seat(fleet, state, moved, node);
            node = from;
        }
    }

    /// Has `node` serve expert `index`; a replica that is not needed to serve makes room.
    fn seat(&mut self, fleet: &Fleet<'_>, state: &mut State, index: usize, node: u32) {
        let layer = index / fleet.shape.experts;
        if !state.holds(index, node) {
            if state.count(layer, node) >= fleet.slots[node as usize] {
                let experts = layer * fleet.shape.experts..(layer + 1) * fleet.shape.experts;
                self.evict(fleet, state, experts, node);
            }
            if state.free[node as usize] == 0 {
                self.evict(fleet, state, 0..fleet.shape.total(), node);
            }
            state.load(fleet, index, node);
        }
        self.sit(fleet, index, node);
    }

    /// Unloads the replica that `node` holds of one of `experts` which another node serves and which has most replicas.
    fn evict(&self, fleet: &Fleet<'_>, state: &mut State, experts: std::ops::Range<usize>, node: u32) {
        let unneeded = experts.filter(|&expert| state.holds(expert, node) && self.of[expert] != node);
        let most = unneeded.max_by_key(|&expert| (state.holders[expert].len(), std::cmp::Reverse(expert)));
        state.unload(fleet, most.expect("the node holds more than it serves"), node);
    }
}
