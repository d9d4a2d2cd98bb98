//! One layer's balance: the time of every node, kept up while experts are loaded and unloaded.

use std::collections::BTreeSet;

use super::state::{Fleet, State};

/// A layer while it is changed. Experts and nodes are indices within the layer and the fleet.
///
/// All times are exact functions of who holds what, so undoing a change restores them.
#[derive(Clone)]
pub(super) struct Layer<'a> {
    fleet: &'a Fleet<'a>,
    /// [experts]
    pub(super) weights: &'a [u64],
    /// [experts]
    pub(super) required: &'a [u32],
    /// [experts]: nodes, ascending.
    pub(super) holders: Vec<Vec<u32>>,
    /// [nodes]: experts, ascending.
    pub(super) on: Vec<Vec<u32>>,
    /// [nodes]: how many more experts of this layer each may take.
    pub(super) room: Vec<u32>,
    /// [nodes]: the weight each answers for.
    pub(super) raw: Vec<u64>,
    /// [nodes]: `raw` over speed.
    pub(super) times: Vec<u64>,
    /// Nodes, fastest first; equal ones by rank.
    pub(super) order: BTreeSet<(u64, u32, u32)>,
    ranks: Vec<u32>,
    /// Replicas of all experts.
    pub(super) replicas: u64,
    /// The fastest node's speed.
    pub(super) fastest: u64,
    /// The time each node would take if the load were spread perfectly.
    pub(super) ideal: u64,
}

impl<'a> Layer<'a> {
    /// The layer as it is in `state`. Equal nodes rank by index.
    pub(super) fn new(fleet: &'a Fleet<'a>, state: &State, layer: usize) -> Self {
        Self::ranked(fleet, state, layer, (0..fleet.nodes.len() as u32).collect())
    }

    /// The same, but of equal nodes those with more free memory come first: cheap when everything is to be loaded anyway.
    pub(super) fn ranked_by_memory(fleet: &'a Fleet<'a>, state: &State, layer: usize) -> Self {
        let mut nodes: Vec<u32> = (0..fleet.nodes.len() as u32).collect();
        nodes.sort_by_key(|&node| (std::cmp::Reverse(state.free[node as usize]), node));
        let mut ranks = vec![0; nodes.len()];
        for (rank, &node) in (0..).zip(&nodes) {
            ranks[node as usize] = rank;
        }
        Self::ranked(fleet, state, layer, ranks)
    }

    fn ranked(fleet: &'a Fleet<'a>, state: &State, layer: usize, ranks: Vec<u32>) -> Self {
        let experts = layer * fleet.shape.experts..(layer + 1) * fleet.shape.experts;
        let weights = &fleet.weights[experts.clone()];
        let total_speed: u64 = fleet.speeds.iter().sum();
        let nodes = fleet.nodes.len();
        let mut layer = Self {
            fleet,
            weights,
            required: &fleet.required[experts.clone()],
            holders: state.holders[experts].to_vec(),
            on: vec![Vec::new(); nodes],
            room: state.room(fleet, layer),
            raw: vec![0; nodes],
            times: vec![0; nodes],
            order: BTreeSet::new(),
            ranks,
            replicas: 0,
            fastest: fleet.speeds.iter().copied().max().unwrap_or(1),
            ideal: over(weights.iter().sum(), total_speed),
        };
        layer.refresh();
        layer
    }

    /// Recomputes everything from `holders`.
    pub(super) fn refresh(&mut self) {
        self.on.iter_mut().for_each(Vec::clear);
        self.raw.iter_mut().for_each(|raw| *raw = 0);
        self.replicas = 0;
        for (expert, nodes) in self.holders.iter().enumerate() {
            self.replicas += nodes.len() as u64;
            for &node in nodes {
                self.on[node as usize].push(expert as u32);
                self.raw[node as usize] += self.weights[expert] / nodes.len() as u64;
            }
        }
        for node in 0..self.raw.len() {
            self.times[node] = over(self.raw[node], self.fleet.speeds[node]);
        }
        let nodes = 0..self.raw.len();
        self.order = nodes.map(|node| (self.times[node], self.ranks[node], node as u32)).collect();
    }

    /// The slowest node.
    pub(super) fn slowest(&self) -> u32 {
        self.order.last().expect("there are nodes").2
    }

    /// The slowest node's time.
    pub(super) fn top(&self) -> u64 {
        self.order.last().map_or(0, |&(time, ..)| time)
    }

    /// Whether `node` gets nothing new.
    pub(super) fn closed(&self, node: u32) -> bool {
        self.fleet.nodes[node as usize].cordoned
    }

    pub(super) fn speed(&self, node: u32) -> u64 {
        self.fleet.speeds[node as usize]
    }

    /// How many nodes hold `expert`.
    pub(super) fn count(&self, expert: u32) -> u64 {
        self.holders[expert as usize].len() as u64
    }

    /// The weight each of `expert`'s replicas would answer for if there were `replicas`.
    pub(super) fn share(&self, expert: u32, replicas: u64) -> u64 {
        self.weights[expert as usize] / replicas
    }

    /// The weight each of `expert`'s replicas answers for.
    pub(super) fn present_share(&self, expert: u32) -> u64 {
        self.share(expert, self.count(expert))
    }

    /// Whether `expert` has more replicas than it must have.
    pub(super) fn spare(&self, expert: u32) -> bool {
        self.holders[expert as usize].len() > self.required[expert as usize] as usize
    }

    pub(super) fn holds(&self, node: u32, expert: u32) -> bool {
        self.on[node as usize].binary_search(&expert).is_ok()
    }

    /// The time of `node` if it answered for `raw`.
    pub(super) fn time_at(&self, node: u32, raw: u64) -> u64 {
        over(raw, self.fleet.speeds[node as usize])
    }

    /// The slowest of `expert`'s nodes other than `but` if each answered for `more` in addition.
    pub(super) fn slowest_holder(&self, expert: u32, but: u32, more: u64) -> u64 {
        let others = self.holders[expert as usize].iter().filter(|&&node| node != but);
        others.map(|&node| self.time_at(node, self.raw[node as usize] + more)).max().unwrap_or(0)
    }

    /// Whether zones make no difference.
    pub(super) fn has_one_zone(&self) -> bool {
        self.fleet.has_one_zone()
    }

    /// Whether zones let `expert` give up its replica on `minus` and get one on `plus`: a replica more may not crowd a zone,
    /// otherwise it may not be more crowded than it is.
    pub(super) fn spreads(&self, expert: u32, minus: Option<u32>, plus: Option<u32>) -> bool {
        if self.has_one_zone() {
            return true;
        }
        let now = self.holders[expert as usize].iter().copied();
        let then = now.clone().filter(|&node| Some(node) != minus).chain(plus);
        let crowding = self.fleet.crowding(then);
        crowding == 0 || (minus.is_some() && crowding <= self.fleet.crowding(now))
    }

    /// The node with room, and for which `may`, that would be fastest with another replica of `expert`.
    pub(super) fn best_home(&self, expert: u32, may: impl Fn(u32) -> bool) -> Option<u32> {
        self.best_home_for(expert, self.share(expert, self.count(expert) + 1), may)
    }

    /// The same for a replica that answers for `share`.
    pub(super) fn best_home_for(&self, expert: u32, share: u64, may: impl Fn(u32) -> bool) -> Option<u32> {
        let least = over(share, self.fastest);
        let mut best: Option<(u64, u32)> = None;
        for &(time, _, node) in &self.order {
            if best.is_some_and(|(best, _)| time + least >= best) {
                break;
            }
            if self.room[node as usize] == 0 || self.holds(node, expert) || !may(node) {
                continue;
            }
            let after = self.time_at(node, self.raw[node as usize] + share);
            if best.is_none_or(|(best, _)| after < best) {
                best = Some((after, node));
            }
        }
        best.map(|(_, node)| node)
    }

    /// The layer with no expert on any node that takes new ones, ready for [`Layer::put`].
    pub(super) fn emptied(&self) -> Self {
        let mut emptied = self.clone();
        for node in 0..self.on.len() {
            if !self.closed(node as u32) {
                emptied.room[node] += self.on[node].len() as u32;
            }
        }
        emptied.holders.iter_mut().for_each(Vec::clear);
        emptied.refresh();
        emptied
    }

    /// Puts `expert` on `node` to answer for `share`, which is right only once all its replicas are put: then refresh.
    pub(super) fn put(&mut self, expert: u32, node: u32, share: u64) {
        insert(&mut self.holders[expert as usize], node);
        insert(&mut self.on[node as usize], expert);
        self.room[node as usize] -= 1;
        self.set_raw(node, self.raw[node as usize] + share);
    }

    /// Puts `expert` on `node`, which does not hold it.
    pub(super) fn load(&mut self, expert: u32, node: u32) {
        let holders = std::mem::take(&mut self.holders[expert as usize]);
        let (old, new) = (holders.len() as u64, holders.len() as u64 + 1);
        self.holders[expert as usize] = holders;
        self.reshare(expert, old, new);
        self.set_raw(node, self.raw[node as usize] + self.share(expert, new));
        insert(&mut self.holders[expert as usize], node);
        insert(&mut self.on[node as usize], expert);
        self.replicas += 1;
        if !self.fleet.nodes[node as usize].cordoned {
            self.room[node as usize] -= 1;
        }
    }

    /// Takes `expert` from `node`, which holds it.
    pub(super) fn unload(&mut self, expert: u32, node: u32) {
        let old = self.count(expert);
        remove(&mut self.holders[expert as usize], node);
        remove(&mut self.on[node as usize], expert);
        self.set_raw(node, self.raw[node as usize] - self.share(expert, old));
        self.reshare(expert, old, old - 1);
        self.replicas -= 1;
        if !self.fleet.nodes[node as usize].cordoned {
            self.room[node as usize] += 1;
        }
    }

    /// The present holders of `expert` go from a share among `old` to one among `new`.
    fn reshare(&mut self, expert: u32, old: u64, new: u64) {
        for i in 0..self.holders[expert as usize].len() {
            let node = self.holders[expert as usize][i];
            self.set_raw(node, self.raw[node as usize] - self.share(expert, old) + self.share(expert, new));
        }
    }

    fn set_raw(&mut self, node: u32, raw: u64) {
        let at = node as usize;
        self.order.remove(&(self.times[at], self.ranks[at], node));
        self.raw[at] = raw;
        self.times[at] = self.time_at(node, raw);
        self.order.insert((self.times[at], self.ranks[at], node));
    }
}

/// The time that `raw` takes at `speed`. `raw` is at most about 2^41, so 2^16 of it fit.
fn over(raw: u64, speed: u64) -> u64 {
    (raw << 16) / speed.max(1)
}

fn insert(sorted: &mut Vec<u32>, item: u32) {
    let at = sorted.binary_search(&item).expect_err("it is not there yet");
    sorted.insert(at, item);
}

fn remove(sorted: &mut Vec<u32>, item: u32) {
    let at = sorted.binary_search(&item).expect("it is there");
    sorted.remove(at);
}
