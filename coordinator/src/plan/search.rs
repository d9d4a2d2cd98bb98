//! Phase 4 for one layer: a walk of steps that each speed up the slowest node, of which the best beginning is kept.
//!
//! The potential of a layer is its slowest node's time plus the rent of its replicas. Steps are taken while there are any;
//! then the beginning of the walk that lowers the potential most, what it loads paid for, is what remains. The walk follows
//! from the layer alone, so a layer from which the walk found nothing better stays as it is for good.

use super::layer::Layer;
use super::recount;
use super::state::{Fleet, State};
use super::steps::{self, Change};

/// What gains less than this part of the ideal time is not worth doing: it bounds how often a layer is improved.
const LEAST_GAIN: u64 = 4096;

/// Walks at dead ends go on this often through a step that does not speed up the slowest node by itself.
const DETOURS: usize = 12;

/// A better layer.
pub(super) struct Better {
    /// By how much the potential is lower than before, beyond what the loads cost.
    pub(super) gain: u128,
    /// Experts that nodes must load.
    pub(super) loads: u64,
    /// [experts]: the nodes of each.
    pub(super) holders: Vec<Vec<u32>>,
}

/// Improves `layer` until a walk finds nothing better. Returns whether it changed.
pub(super) fn settle(fleet: &Fleet<'_>, state: &mut State, layer: usize) -> bool {
    let mut changed = false;
    while let Some(found) = improve(fleet, state, layer, u64::MAX) {
        state.set_layer(fleet, layer, found.holders);
        changed = true;
    }
    changed
}

/// The best beginning of a walk from `layer` that loads at most `budget` experts, if it is better than the layer is.
pub(super) fn improve(fleet: &Fleet<'_>, state: &State, layer: usize, budget: u64) -> Option<Better> {
    let mut layer = Layer::new(fleet, state, layer);
    let prices = Prices::new(fleet, &layer);
    let Found { gain, loads } = walk(&mut layer, prices, budget);
    (gain > 0).then_some(Better { gain, loads, holders: layer.holders })
}

/// Walks on from `layer` until nothing better is found.
pub(super) fn polish(layer: &mut Layer<'_>, prices: Prices) {
    while walk(layer, prices, u64::MAX).gain > 0 {}
}

/// Goes to the best beginning of a walk from `layer`, or, if that is no better, of one that deals replicas anew first.
fn walk(layer: &mut Layer<'_>, prices: Prices, budget: u64) -> Found {
    let found = Walk::new(layer, prices, budget).run(Vec::new());
    if found.gain > 0 {
        return found;
    }
    let opening = recount::steps(layer);
    if opening.is_empty() { found } else { Walk::new(layer, prices, budget).run(opening) }
}

/// What things cost in a layer, in its time.
#[derive(Clone, Copy)]
pub(super) struct Prices {
    /// Loading an expert, once.
    pub(super) load: u128,
    /// Keeping a replica.
    pub(super) rent: u128,
    /// What a walk must gain to be followed.
    pub(super) least_gain: u128,
}

impl Prices {
    pub(super) fn new(fleet: &Fleet<'_>, layer: &Layer<'_>) -> Self {
        let of = |millionths: u64| u128::from(layer.ideal) * u128::from(millionths) / 1_000_000;
        Self {
            load: of(fleet.knobs.move_cost),
            rent: of(fleet.knobs.replica_rent),
            least_gain: u128::from(layer.ideal / LEAST_GAIN + 1),
        }
    }

    /// The layer's potential.
    pub(super) fn potential(&self, layer: &Layer<'_>) -> u128 {
        u128::from(layer.top()) + self.rent * u128::from(layer.replicas)
    }
}

/// What a finished walk found: the layer is left at its best beginning.
pub(super) struct Found {
    gain: u128,
    loads: u64,
}

struct Walk<'a, 'b> {
    layer: &'a mut Layer<'b>,
    prices: Prices,
    budget: u64,
    /// Who held what at the start.
    start: Vec<Vec<u32>>,
    changes: Vec<Change>,
    /// Experts that are where they were not at the start.
    loads: u64,
}

impl<'a, 'b> Walk<'a, 'b> {
    fn new(layer: &'a mut Layer<'b>, prices: Prices, budget: u64) -> Self {
        let start = layer.holders.clone();
        Self { layer, prices, budget, start, changes: Vec::new(), loads: 0 }
    }

    /// Walks from `opening` on, or from the start if that is empty.
    fn run(mut self, opening: Vec<Vec<Change>>) -> Found {
        let before = self.prices.potential(self.layer);
        let mut best = (before, 0, 0);
        let mut detours = 0;
        let mut opening = opening.into_iter();
        let longest = 4 * (self.layer.replicas as usize + self.layer.on.len());
        while self.changes.len() < longest {
            let mut step = opening.next().unwrap_or_default();
            if step.is_empty() {
                step = steps::best(self.layer, self.prices);
            }
            if step.is_empty() {
                step = steps::drop_unneeded(self.layer, self.prices);
            }
            if step.is_empty() && detours < DETOURS {
                detours += 1;
                step = steps::detour(self.layer);
            }
            if step.is_empty() {
                break;
            }
            for change in step {
                self.apply(change);
                self.changes.push(change);
            }
            let cost = self.prices.potential(self.layer) + self.prices.load * u128::from(self.loads);
            if self.loads <= self.budget && cost < best.0 {
                best = (cost, self.changes.len(), self.loads);
            }
        }
        let (cost, length, loads) = best;
        let keep = if before - cost >= self.prices.least_gain { length } else { 0 };
        while self.changes.len() > keep {
            let change = self.changes.pop().expect("there are more than are kept");
            self.apply(change.undone());
        }
        if keep == 0 { Found { gain: 0, loads: 0 } } else { Found { gain: before - cost, loads } }
    }

    fn apply(&mut self, change: Change) {
        let (Change::Load(expert, node) | Change::Unload(expert, node)) = change;
        let new = u64::from(self.start[expert as usize].binary_search(&node).is_err());
        match change {
            Change::Load(..) => {
                self.layer.load(expert, node);
                self.loads += new;
            }
            Change::Unload(..) => {
                self.layer.unload(expert, node);
                self.loads -= new;
            }
        }
    }
}
