//! What a plan is made of while it is made: the nodes' limits, and who holds what with the memory that leaves.

use super::{Knobs, Layout, PlanNode, Problem, Shape, load};

/// A problem in the units of the planner: memory in experts, zones counted from zero, loads as weights.
pub(super) struct Fleet<'a> {
    pub(super) shape: Shape,
    pub(super) nodes: &'a [PlanNode],
    pub(super) knobs: Knobs,
    /// [layers * experts]
    pub(super) weights: Vec<u64>,
    /// [layers * experts], each at least 1.
    pub(super) required: Vec<u32>,
    /// [nodes]: how many experts each can hold.
    pub(super) memory: Vec<u64>,
    /// [nodes]: how many experts of one layer each may hold.
    pub(super) slots: Vec<u32>,
    /// [nodes]: relative speeds, each at least 1.
    pub(super) speeds: Vec<u64>,
    /// [nodes]
    zones: Vec<u32>,
    /// [zones]: whether a node of the zone takes experts.
    open_zones: Vec<bool>,
}

impl<'a> Fleet<'a> {
    pub(super) fn new(problem: &'a Problem<'a>) -> Self {
        let Problem { shape, nodes, .. } = *problem;
        let memory: Vec<u64> = nodes.iter().map(|node| node.capacity_bytes / shape.expert_bytes.max(1)).collect();
        let mut names: Vec<Option<u32>> = nodes.iter().map(|node| node.zone).collect();
        names.sort_unstable();
        names.dedup();
        let zone = |node: &PlanNode| names.binary_search(&node.zone).expect("every node's zone is named") as u32;
        let zones: Vec<u32> = nodes.iter().map(zone).collect();
        let mut open_zones = vec![false; names.len()];
        for (node, &zone) in zones.iter().enumerate() {
            open_zones[zone as usize] |= !nodes[node].cordoned && memory[node] > 0 && nodes[node].experts_per_layer > 0;
        }
        Self {
            shape,
            nodes,
            knobs: problem.knobs,
            weights: problem.loads.chunks(shape.experts.max(1)).flat_map(load::weights).collect(),
            required: problem.min_replicas.iter().map(|&replicas| replicas.max(1)).collect(),
            memory,
            slots: nodes.iter().map(|node| node.experts_per_layer.min(shape.experts as u32)).collect(),
            speeds: nodes.iter().map(|node| u64::from(node.speed.max(1))).collect(),
            zones,
            open_zones,
        }
    }

    /// The zone of `node`, counted from zero.
    pub(super) fn zone(&self, node: u32) -> u32 {
        self.zones[node as usize]
    }

    /// Whether `node` may get experts at all.
    pub(super) fn open(&self, node: u32) -> bool {
        let node = node as usize;
        !self.nodes[node].cordoned && self.slots[node] > 0 && self.memory[node] > 0
    }

    /// Bytes of one expert, never zero.
    pub(super) fn expert_bytes(&self) -> u64 {
        self.shape.expert_bytes.max(1)
    }

    /// Whether zones make no difference.
    pub(super) fn has_one_zone(&self) -> bool {
        self.open_zones.len() < 2
    }

    /// Whether there is anything to place and anywhere to place it.
    pub(super) fn can_serve(&self) -> bool {
        self.shape.experts > 0 && !self.nodes.is_empty()
    }

    /// How many of an expert's replicas on `nodes` should move to a zone that has none; zero when it is well spread.
    pub(super) fn crowding(&self, nodes: impl Iterator<Item = u32>) -> usize {
        if self.has_one_zone() {
            return 0;
        }
        let mut uncovered = self.open_zones.clone();
        let mut surplus = 0;
        let mut seen = vec![false; self.open_zones.len()];
        for node in nodes {
            let zone = self.zones[node as usize] as usize;
            surplus += usize::from(seen[zone]);
            seen[zone] = true;
            uncovered[zone] = false;
        }
        if surplus == 0 { 0 } else { surplus.min(uncovered.iter().filter(|&&open| open).count()) }
    }
}

/// Who holds what.
#[derive(Clone)]
pub(super) struct State {
    /// [layers * experts]: nodes, ascending.
    pub(super) holders: Vec<Vec<u32>>,
    /// [nodes]: how many more experts fit into each one's memory.
    pub(super) free: Vec<u64>,
    /// [layers]: whether no node held an expert of the layer before.
    pub(super) fresh: Vec<bool>,
    /// [layers * nodes]: how many experts of the layer each holds.
    counts: Vec<u32>,
}

impl State {
    pub(super) fn empty(fleet: &Fleet<'_>) -> Self {
        Self {
            holders: vec![Vec::new(); fleet.shape.total()],
            free: fleet.memory.clone(),
            fresh: vec![true; fleet.shape.layers],
            counts: vec![0; fleet.shape.layers * fleet.nodes.len()],
        }
    }

    /// How many experts of `layer` are on `node`.
    pub(super) fn count(&self, layer: usize, node: u32) -> u32 {
        self.counts[layer * self.free.len() + node as usize]
    }

    pub(super) fn holds(&self, index: usize, node: u32) -> bool {
        self.holders[index].binary_search(&node).is_ok()
    }

    /// Whether memory and slots of `node` let it hold one more expert of `layer`.
    pub(super) fn fits(&self, fleet: &Fleet<'_>, layer: usize, node: u32) -> bool {
        self.free[node as usize] > 0 && self.count(layer, node) < fleet.slots[node as usize]
    }

    /// Puts expert `index` on `node`, which does not hold it and has room.
    pub(super) fn load(&mut self, fleet: &Fleet<'_>, index: usize, node: u32) {
        let at = self.holders[index].binary_search(&node).expect_err("it is not there yet");
        self.holders[index].insert(at, node);
        self.free[node as usize] -= 1;
        self.counts[index / fleet.shape.experts * fleet.nodes.len() + node as usize] += 1;
    }

    /// Takes expert `index` from `node`, which holds it.
    pub(super) fn unload(&mut self, fleet: &Fleet<'_>, index: usize, node: u32) {
        let at = self.holders[index].binary_search(&node).expect("it is there");
        self.holders[index].remove(at);
        self.free[node as usize] += 1;
        self.counts[index / fleet.shape.experts * fleet.nodes.len() + node as usize] -= 1;
    }

    /// [nodes]: how many more experts of `layer` each node may take; none for a cordoned one.
    pub(super) fn room(&self, fleet: &Fleet<'_>, layer: usize) -> Vec<u32> {
        let room = |node: usize| {
            let slots = fleet.slots[node].saturating_sub(self.count(layer, node as u32));
            if fleet.nodes[node].cordoned { 0 } else { u64::from(slots).min(self.free[node]) as u32 }
        };
        (0..fleet.nodes.len()).map(room).collect()
    }

    /// Replaces who holds the experts of `layer`.
    pub(super) fn set_layer(&mut self, fleet: &Fleet<'_>, layer: usize, holders: Vec<Vec<u32>>) {
        let first = layer * fleet.shape.experts;
        for (expert, after) in holders.into_iter().enumerate() {
            let before = std::mem::take(&mut self.holders[first + expert]);
            for &node in &before {
                self.free[node as usize] += 1;
                self.counts[layer * fleet.nodes.len() + node as usize] -= 1;
            }
            self.holders[first + expert] = after;
        }
        for expert in first..first + fleet.shape.experts {
            for &node in &self.holders[expert] {
                self.free[node as usize] -= 1;
                self.counts[layer * fleet.nodes.len() + node as usize] += 1;
            }
        }
    }
}

impl Layout {
    /// The nodes of expert `index`; none when the layout does not know it.
    pub fn of(&self, index: usize) -> &[u32] {
        self.holders.get(index).map_or(&[], Vec::as_slice)
    }
}
