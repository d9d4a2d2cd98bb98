//! Which experts go on which nodes: a pure function over plain integers.
//!
//! [`plan`] starts from the previous layout and goes through four phases:
//!
//! 1. **serve** (`serve`): every expert keeps its nodes; one without any goes where its layer ends soonest, through
//!    chains of moves when the nodes that have room cannot take it directly;
//! 2. **require** (`require`): experts get the replicas they must have, spread over zones;
//! 3. **occupy** (`occupy`): a node with room and no expert of a layer gets one;
//! 4. **balance** (`search`): layer by layer, moves, swaps and replicas that make the layer's slowest node faster.
//!
//! It repeats 2 to 4 until nothing changes. What holds of every plan, each the claim of a test in `properties.rs`:
//!
//! - **served**: as many experts have a node as memory and slots allow at all, given what cordoned nodes keep; the others
//!   are named in [`Plan::unserved`] with the reason.
//! - **limits**: no node exceeds its memory or its slots in a layer.
//! - **spread**: an expert's replicas are on different nodes. No zone holds two of them while another zone that can take
//!   experts holds none; only replicas that [`Problem::min_replicas`] requires may break this, only when no such zone has
//!   room, and [`Plan::crowded`] names them.
//! - **speed**: a node's time is its share of the load divided by its speed; an expert's replicas share its load equally.
//! - **few moves**: loading an expert costs [`Knobs::move_cost`], keeping a replica [`Knobs::replica_rent`]; a layer is
//!   changed for its balance only when the time gained covers both. A lost node moves only its own experts when memory is ample.
//! - **deterministic**: equal problems have equal plans. No clock, no floats, no random numbers.
//! - **settled**: planning again from the result changes nothing, unless [`Knobs::max_moved_bytes`] cut it short.
//! - **bounded**: moves for balance load no more than [`Knobs::max_moved_bytes`], the layers that gain most first. What the
//!   first three phases load is necessary and never bounded, and neither is a layer that no node held before.
//! - **cordoned**: a cordoned node gets nothing new.
//! - **occupied**: a node that may take experts and has memory left holds an expert of every layer, unless every way to
//!   give it one would crowd a zone.
//! - **no worse**: when memory is ample and phases 1 to 3 left nothing for a later round (no required replica without its
//!   zone, no idle node that zones kept idle), the sum over layers of the slowest node's time, rent included, is at most
//!   what they leave.

mod layer;
mod load;
pub mod measure;
mod occupy;
mod pack;
#[cfg(test)]
mod properties;
mod recount;
mod require;
mod search;
mod serve;
mod state;
mod steps;

use state::{Fleet, State};

/// What is placed: `layers` times `experts` experts of `expert_bytes` each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Layers that have experts.
    pub layers: usize,
    /// Experts of each layer.
    pub experts: usize,
    /// Memory one of them takes, in bytes.
    pub expert_bytes: u64,
}

impl Shape {
    /// Experts of all layers.
    pub fn total(&self) -> usize {
        self.layers * self.experts
    }
}

/// A node that experts can be placed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlanNode {
    /// Bytes of expert weights it may hold.
    pub capacity_bytes: u64,
    /// Experts of one layer it may hold; `u32::MAX` sets no limit.
    pub experts_per_layer: u32,
    /// How fast it is, in any unit that is the same for all nodes. Zero counts as one.
    pub speed: u32,
    /// What it fails together with. All nodes without a zone are in one.
    pub zone: Option<u32>,
    /// It may keep what it has but gets nothing new.
    pub cordoned: bool,
}

impl PlanNode {
    /// An ordinary node with this much memory.
    pub fn new(capacity_bytes: u64) -> Self {
        Self { capacity_bytes, experts_per_layer: u32::MAX, speed: 100, zone: None, cordoned: false }
    }
}

/// What a change must earn, in millionths of the layer's ideal time: its whole load over the speed of all nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Knobs {
    /// What loading one expert costs once.
    pub move_cost: u64,
    /// What keeping one replica costs.
    pub replica_rent: u64,
    /// Bytes that moves for balance may load; `None` sets no limit.
    pub max_moved_bytes: Option<u64>,
}

impl Default for Knobs {
    fn default() -> Self {
        Self { move_cost: 2_000, replica_rent: 10_000, max_moved_bytes: None }
    }
}

/// A planning problem.
#[derive(Clone, Copy, Debug)]
pub struct Problem<'a> {
    /// What is placed.
    pub shape: Shape,
    /// Where it can be placed. A layout names nodes by their index here.
    pub nodes: &'a [PlanNode],
    /// [layers * experts], in any unit. A layer that is all zero counts as uniform.
    pub loads: &'a [u64],
    /// [layers * experts]: how many replicas each expert must have; zero counts as one.
    pub min_replicas: &'a [u32],
    /// Where experts are now. Nodes that left are simply absent from it.
    pub previous: Option<&'a Layout>,
    /// What changes must earn.
    pub knobs: Knobs,
}

/// Which nodes hold which expert.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    /// [layers * experts]: the nodes of each expert, ascending.
    pub holders: Vec<Vec<u32>>,
}

/// Why an expert has no node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// No node takes experts.
    NoNode,
    /// The nodes that take experts are full.
    Memory {
        /// What all experts without a node would take.
        missing_bytes: u64,
    },
    /// The nodes that have memory left hold as many experts of this layer as they may.
    Slots {
        /// The experts of this layer without a node.
        missing_slots: usize,
    },
}

/// What [`plan`] found. Experts are named by their index: layer * experts + expert.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Where experts should be.
    pub layout: Layout,
    /// Experts without a node, ascending.
    pub unserved: Vec<(usize, Why)>,
    /// Experts with fewer replicas than they must have and how many are missing, ascending. Without the unserved.
    pub short: Vec<(usize, u32)>,
    /// Experts with two replicas in one zone and none in another that takes experts, ascending.
    pub crowded: Vec<usize>,
}

/// Plans where experts should be. The module says what holds of the result.
///
/// Nodes that `previous` names beyond `nodes` are ignored. Panics when `loads` or `min_replicas` do not have an entry for
/// each expert.
pub fn plan(problem: &Problem<'_>) -> Plan {
    let (fleet, mut state) = start(problem);
    if fleet.can_serve() {
        balance(&fleet, &mut state);
    }
    report(&fleet, state)
}

/// Phases 1 to 3: all that is necessary.
fn start<'a>(problem: &'a Problem<'a>) -> (Fleet<'a>, State) {
    assert_eq!(problem.loads.len(), problem.shape.total(), "a load for each expert");
    assert_eq!(problem.min_replicas.len(), problem.shape.total(), "a number of replicas for each expert");
    let fleet = Fleet::new(problem);
    let mut state = serve::serve(&fleet, problem.previous);
    while repair(&fleet, &mut state) {}
    (fleet, state)
}

/// Phases 2 and 3. Returns whether anything changed.
fn repair(fleet: &Fleet<'_>, state: &mut State) -> bool {
    let required = require::require(fleet, state);
    let occupied = occupy::occupy(fleet, state);
    required || occupied
}

/// Phase 4, and phases 2 and 3 again where it made room, until nothing changes.
///
/// It ends: every round lowers, in this order, what is short, crowded or idle, or else the layers' potentials.
fn balance(fleet: &Fleet<'_>, state: &mut State) {
    for layer in 0..fleet.shape.layers {
        if state.fresh[layer] {
            pack::pack(fleet, state, layer);
        }
    }
    if let Some(limit) = fleet.knobs.max_moved_bytes {
        balance_within(fleet, state, limit / fleet.expert_bytes());
        return;
    }
    let mut settled: Vec<Option<Vec<u32>>> = vec![None; fleet.shape.layers];
    loop {
        let mut changed = false;
        while repair(fleet, state) {
            changed = true;
        }
        for (layer, settled) in settled.iter_mut().enumerate() {
            let room = state.room(fleet, layer);
            if !changed && settled.as_ref() == Some(&room) {
                continue;
            }
            if search::settle(fleet, state, layer) {
                changed = true;
            }
            *settled = Some(state.room(fleet, layer));
        }
        if !changed {
            return;
        }
    }
}

/// Phase 4 when moves for balance may load only `budget` experts: the layers that gain most for their loads first.
fn balance_within(fleet: &Fleet<'_>, state: &mut State, mut budget: u64) {
    let mut gains: Vec<(u128, usize)> = (0..fleet.shape.layers)
        .filter_map(|layer| search::improve(fleet, state, layer, budget).map(|found| (found.gain, layer)))
        .collect();
    gains.sort_by_key(|&(gain, layer)| (std::cmp::Reverse(gain), layer));
    for (_, layer) in gains {
        if let Some(found) = search::improve(fleet, state, layer, budget) {
            budget -= found.loads;
            state.set_layer(fleet, layer, found.holders);
        }
    }
}

fn report(fleet: &Fleet<'_>, state: State) -> Plan {
    let unserved_total = state.holders.iter().filter(|nodes| nodes.is_empty()).count();
    let why = |layer: usize| {
        let mut open = (0..fleet.nodes.len() as u32).filter(|&node| fleet.open(node)).peekable();
        if open.peek().is_none() {
            Why::NoNode
        } else if open.any(|node| state.free[node as usize] > 0) {
            let experts = layer * fleet.shape.experts..(layer + 1) * fleet.shape.experts;
            Why::Slots { missing_slots: state.holders[experts].iter().filter(|nodes| nodes.is_empty()).count() }
        } else {
            Why::Memory { missing_bytes: unserved_total as u64 * fleet.expert_bytes() }
        }
    };
    let mut plan = Plan { layout: Layout::default(), unserved: Vec::new(), short: Vec::new(), crowded: Vec::new() };
    for (index, nodes) in state.holders.iter().enumerate() {
        let missing = fleet.required[index].saturating_sub(nodes.len() as u32);
        if nodes.is_empty() {
            plan.unserved.push((index, why(index / fleet.shape.experts)));
        } else if missing > 0 {
            plan.short.push((index, missing));
        }
        if fleet.crowding(nodes.iter().copied()) > 0 {
            plan.crowded.push(index);
        }
    }
    plan.layout = Layout { holders: state.holders };
    plan
}
