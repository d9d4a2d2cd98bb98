//! Phase 2: the replicas that experts must have, spread over zones.

use super::layer::Layer;
use super::state::{Fleet, State};

/// Takes away what crowds a zone, moves what must be kept to other zones and adds replicas that are missing, where there is
/// room or a replica beyond what its expert must have. Returns whether anything changed.
pub(super) fn require(fleet: &Fleet<'_>, state: &mut State) -> bool {
    let mut evictable = None;
    let mut changed = false;
    for layer in 0..fleet.shape.layers {
        let first = layer * fleet.shape.experts;
        let wanting = |&expert: &u32| {
            let holders = &state.holders[first + expert as usize];
            let short = holders.len() < fleet.required[first + expert as usize] as usize;
            !holders.is_empty() && (short || fleet.crowding(holders.iter().copied()) > 0)
        };
        let wanting: Vec<u32> = (0..fleet.shape.experts as u32).filter(wanting).collect();
        if wanting.is_empty() {
            continue;
        }
        let mut work = Require { fleet, state, layer, times: None, evictable: &mut evictable };
        for expert in wanting {
            while work.uncrowd(expert) || work.add(expert) {
                changed = true;
            }
        }
    }
    changed
}

struct Require<'a, 'b> {
    fleet: &'b Fleet<'b>,
    state: &'a mut State,
    layer: usize,
    /// The layer's times; made again after a change.
    times: Option<Layer<'b>>,
    /// [nodes]: experts each held beyond what they must have, when it was made: the coldest replica last.
    evictable: &'a mut Option<Vec<Vec<u32>>>,
}

impl Require<'_, '_> {
    fn index(&self, expert: u32) -> usize {
        self.layer * self.fleet.shape.experts + expert as usize
    }

    fn holders(&self, expert: u32) -> &[u32] {
        &self.state.holders[self.index(expert)]
    }

    fn crowding(&self, expert: u32, minus: Option<u32>, plus: Option<u32>) -> usize {
        self.fleet.crowding(self.holders(expert).iter().copied().filter(|&node| Some(node) != minus).chain(plus))
    }

    /// Takes `expert` from a zone that holds two and, if it must be kept, puts it into one that has none.
    fn uncrowd(&mut self, expert: u32) -> bool {
        let crowding = self.crowding(expert, None, None);
        if crowding == 0 {
            return false;
        }
        // without a replica of a zone that holds two, what is left crowds no more than before
        let surplus = |&&node: &&u32| {
            let covered = |nodes: &mut dyn Iterator<Item = u32>| {
                let mut zones: Vec<u32> = nodes.map(|node| self.fleet.zone(node)).collect();
                zones.sort_unstable();
                zones.dedup();
                zones.len()
            };
            let all = self.holders(expert).iter().copied();
            covered(&mut all.clone().filter(|&other| other != node)) == covered(&mut all.clone())
        };
        let slowest = |&&node: &&u32| (self.times_of(node), node);
        let Some(&node) = self.holders(expert).iter().filter(surplus).max_by_key(slowest) else { return false };
        let index = self.index(expert);
        if self.holders(expert).len() > self.fleet.required[index] as usize {
            self.state.unload(self.fleet, index, node);
            self.times = None;
            return true;
        }
        let better = |to: u32, work: &Self| work.crowding(expert, Some(node), Some(to)) < crowding;
        let Some(to) = self.find(expert, better) else { return false };
        self.state.unload(self.fleet, index, node);
        self.state.load(self.fleet, index, to);
        self.times = None;
        true
    }

    /// Adds a replica that is missing: where it crowds no zone, else anywhere.
    fn add(&mut self, expert: u32) -> bool {
        let index = self.index(expert);
        if self.holders(expert).len() >= self.fleet.required[index] as usize {
            return false;
        }
        let spread = |to: u32, work: &Self| work.crowding(expert, None, Some(to)) == 0;
        let Some(to) = self.find(expert, spread).or_else(|| self.find(expert, |_, _| true)) else { return false };
        self.state.load(self.fleet, index, to);
        self.times = None;
        true
    }

    /// A node for which `may` that has room for `expert`, or where a replica beyond what is needed made room.
    fn find(&mut self, expert: u32, may: impl Fn(u32, &Self) -> bool) -> Option<u32> {
        if self.times.is_none() {
            self.times = Some(Layer::new(self.fleet, self.state, self.layer));
        }
        let times = self.times.as_ref().expect("they have just been made");
        if let Some(node) = times.best_home(expert, |node| may(node, self)) {
            return Some(node);
        }
        let nodes = 0..self.fleet.nodes.len() as u32;
        let candidate =
            |&node: &u32| self.fleet.open(node) && !self.state.holds(self.index(expert), node) && may(node, self);
        let candidates: Vec<u32> = nodes.filter(candidate).collect();
        candidates.into_iter().find(|&node| self.evict_for(expert, node))
    }

    /// Makes room for `expert` on `node` by unloading one replica beyond what its expert must have.
    fn evict_for(&mut self, expert: u32, node: u32) -> bool {
        let full = self.state.count(self.layer, node) >= self.fleet.slots[node as usize];
        let (fleet, state) = (self.fleet, &mut *self.state);
        let spare = |state: &State, index: usize| {
            let rest = || state.holders[index].iter().copied().filter(|&other| other != node);
            state.holds(index, node)
                && state.holders[index].len() > fleet.required[index] as usize
                && fleet.crowding(rest()) == 0
        };
        let first = self.layer * fleet.shape.experts;
        let found = if full {
            let same_layer = (first..first + fleet.shape.experts).filter(|&index| index != first + expert as usize);
            same_layer.filter(|&index| spare(state, index)).min_by_key(|&index| (share(fleet, state, index), index))
        } else {
            let evictable = self.evictable.get_or_insert_with(|| evictable(fleet, state));
            let list = &mut evictable[node as usize];
            std::iter::from_fn(|| list.pop()).map(|index| index as usize).find(|&index| spare(state, index))
        };
        let Some(index) = found else { return false };
        state.unload(fleet, index, node);
        self.times = None;
        true
    }

    fn times_of(&self, node: u32) -> u64 {
        let first = self.layer * self.fleet.shape.experts;
        let on = |&index: &usize| self.state.holds(index, node);
        let raw: u64 = (first..first + self.fleet.shape.experts)
            .filter(on)
            .map(|index| share(self.fleet, self.state, index))
            .sum();
        (raw << 16) / self.fleet.speeds[node as usize]
    }
}

fn share(fleet: &Fleet<'_>, state: &State, index: usize) -> u64 {
    fleet.weights[index] / state.holders[index].len().max(1) as u64
}

/// [nodes]: the experts each holds that have more replicas than they must, coldest last.
fn evictable(fleet: &Fleet<'_>, state: &State) -> Vec<Vec<u32>> {
    let mut lists = vec![Vec::new(); fleet.nodes.len()];
    let spare = |&index: &usize| state.holders[index].len() > fleet.required[index] as usize;
    let mut spare: Vec<usize> = (0..fleet.shape.total()).filter(spare).collect();
    spare.sort_by_key(|&index| (std::cmp::Reverse(share(fleet, state, index)), index));
    for index in spare {
        for &node in &state.holders[index] {
            lists[node as usize].push(index as u32);
        }
    }
    lists
}
