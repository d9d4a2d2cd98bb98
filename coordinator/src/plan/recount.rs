//! How many replicas each expert should have, so that the largest share is as small as it can be.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::layer::Layer;
use super::steps::Change;

/// Experts by the share each of their replicas answers for.
pub(super) struct Shares<'a, 'b> {
    layer: &'a Layer<'b>,
    /// No expert gets more replicas than this.
    most: u64,
    heap: BinaryHeap<(u64, Reverse<u32>)>,
    /// [experts]
    pub(super) counts: Vec<u64>,
}

impl<'a, 'b> Shares<'a, 'b> {
    /// Every expert with the replicas it must have.
    pub(super) fn required(layer: &'a Layer<'b>) -> Self {
        let open = (0..layer.on.len()).filter(|&node| layer.room[node] > 0 || !layer.on[node].is_empty()).count();
        let counts: Vec<u64> = layer.required.iter().map(|&required| u64::from(required)).collect();
        let mut shares = Self { layer, most: open as u64, heap: BinaryHeap::new(), counts };
        (0..layer.required.len() as u32).for_each(|expert| shares.offer(expert));
        shares
    }

    fn offer(&mut self, expert: u32) {
        let count = self.counts[expert as usize];
        if count < self.most {
            self.heap.push((self.layer.share(expert, count), Reverse(expert)));
        }
    }

    /// The largest share of an expert that can have another replica.
    pub(super) fn largest(&self) -> Option<u64> {
        self.heap.peek().map(|&(share, _)| share)
    }

    /// Gives the expert with the largest share another replica.
    pub(super) fn add(&mut self) {
        if let Some((_, Reverse(expert))) = self.heap.pop() {
            self.counts[expert as usize] += 1;
            self.offer(expert);
        }
    }
}

/// Changes, two for each, by which experts that have too few replicas take the places of replicas of experts that have
/// too many, where the node is fastest afterwards. As many replicas as before are dealt, the largest shares first.
pub(super) fn replacements(layer: &Layer<'_>) -> Vec<[Change; 2]> {
    let mut shares = Shares::required(layer);
    let required: u64 = shares.counts.iter().sum();
    for _ in required..layer.replicas {
        shares.add();
    }
    let wanted = shares.counts;
    let experts = || 0..layer.holders.len() as u32;
    let mut surplus: Vec<(u32, u32)> = Vec::new();
    for expert in experts().filter(|&expert| layer.count(expert) > wanted[expert as usize].max(1)) {
        surplus.extend(layer.holders[expert as usize].iter().map(|&node| (expert, node)));
    }
    let mut left: Vec<u64> =
        experts().map(|expert| layer.count(expert).saturating_sub(wanted[expert as usize])).collect();
    let mut missing: Vec<u32> = Vec::new();
    for expert in experts().filter(|&expert| layer.count(expert) > 0) {
        let more = wanted[expert as usize].saturating_sub(layer.count(expert));
        missing.extend((0..more).map(|_| expert));
    }
    missing.sort_by_key(|&expert| (Reverse(layer.share(expert, wanted[expert as usize])), expert));
    let mut changed = std::collections::BTreeSet::new();
    let mut changes = Vec::new();
    for expert in missing {
        let share = layer.share(expert, wanted[expert as usize]);
        let time = |&(other, node): &(u32, u32)| {
            let raw = layer.raw[node as usize] + share - layer.present_share(other);
            (layer.time_at(node, raw), node, other)
        };
        let may = |&(other, node): &(u32, u32)| {
            left[other as usize] > 0
                && !changed.contains(&node)
                && !layer.closed(node)
                && !layer.holds(node, expert)
                && layer.spreads(other, Some(node), None)
                && layer.spreads(expert, None, Some(node))
        };
        let Some((other, node)) = surplus.iter().copied().filter(may).min_by_key(time) else { continue };
        left[other as usize] -= 1;
        changed.insert(node);
        changes.push([Change::Unload(other, node), Change::Load(expert, node)]);
    }
    changes
}
