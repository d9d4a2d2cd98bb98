//! How many replicas each expert should have, so that the largest share is as small as it can be.

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap};

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

/// Light nodes that a rotation considers.
const LIGHT: usize = 24;

/// Steps by which experts that have too few replicas take the places of replicas of experts that have too many, the
/// largest shares first; as many replicas remain as there were.
///
/// Where such a place would leave the node slower than the layer's slowest, a light node takes part: it gives one of its
/// experts to the place that became free and takes the replica.
pub(super) fn steps(layer: &Layer<'_>) -> Vec<Vec<Change>> {
    let mut shares = Shares::required(layer);
    let required: u64 = shares.counts.iter().sum();
    (required..layer.replicas).for_each(|_| shares.add());
    let wanted = shares.counts;
    let mut missing: Vec<(u64, u32)> = Vec::new();
    let mut surplus: Vec<(u32, u32)> = Vec::new();
    for (expert, &wanted) in (0..).zip(&wanted) {
        let present = layer.count(expert);
        if present > wanted {
            surplus.extend(layer.holders[expert as usize].iter().map(|&node| (expert, node)));
        } else if present > 0 {
            missing.extend((present..wanted).map(|_| (layer.share(expert, wanted), expert)));
        }
    }
    missing.sort_unstable_by_key(|&(share, expert)| (Reverse(share), expert));
    let mut dealer = Dealer { layer, wanted, surplus, changed: BTreeSet::new() };
    missing.into_iter().filter_map(|(share, expert)| dealer.place(expert, share)).collect()
}

struct Dealer<'a, 'b> {
    layer: &'a Layer<'b>,
    /// [experts]: how many replicas each should have.
    wanted: Vec<u64>,
    /// Replicas of experts that have too many: expert and node. A node occurs once in the steps, so each goes once.
    surplus: Vec<(u32, u32)>,
    changed: BTreeSet<u32>,
}

impl Dealer<'_, '_> {
    /// The step that gives `expert` a replica with this share.
    fn place(&mut self, expert: u32, share: u64) -> Option<Vec<Change>> {
        let layer = self.layer;
        let mut best: Option<(u64, Vec<Change>)> = None;
        for &(other, node) in &self.surplus {
            if !self.free(node) || !layer.spreads(other, Some(node), None) {
                continue;
            }
            let rest = layer.raw[node as usize] - layer.present_share(other);
            let arrival = layer.time_at(node, rest + share);
            let better = best.as_ref().is_none_or(|(peak, _)| arrival < *peak);
            if better && !layer.holds(node, expert) && layer.spreads(expert, None, Some(node)) {
                best = Some((arrival, vec![Change::Unload(other, node), Change::Load(expert, node)]));
            }
        }
        if best.as_ref().is_none_or(|(peak, _)| *peak >= layer.top()) {
            self.rotate(expert, share, &mut best);
        }
        let (_, step) = best?;
        for change in &step {
            let (Change::Load(expert, node) | Change::Unload(expert, node)) = *change;
            self.changed.insert(node);
            let surplus = matches!(change, Change::Unload(..)) && layer.count(expert) > self.wanted[expert as usize];
            if surplus && !step.iter().any(|change| matches!(change, Change::Load(moved, _) if *moved == expert)) {
                self.wanted[expert as usize] += 1;
            }
        }
        let (layer, wanted) = (self.layer, &self.wanted);
        self.surplus.retain(|&(other, _)| layer.count(other) > wanted[other as usize]);
        Some(step)
    }

    /// Looks for a better step in which a light node takes the replica and gives an expert to where one became free.
    fn rotate(&self, expert: u32, share: u64, best: &mut Option<(u64, Vec<Change>)>) {
        let layer = self.layer;
        let light: Vec<u32> = layer.order.iter().take(LIGHT).map(|&(.., node)| node).collect();
        for &(other, node) in &self.surplus {
            if !self.free(node) || !layer.spreads(other, Some(node), None) {
                continue;
            }
            let rest = layer.raw[node as usize] - layer.present_share(other);
            for &taker in
                light.iter().filter(|&&taker| taker != node && self.free(taker) && !layer.holds(taker, expert))
            {
                for &given in layer.on[taker as usize].iter().filter(|&&given| !layer.holds(node, given)) {
                    let back = layer.present_share(given);
                    let taken = layer.time_at(taker, layer.raw[taker as usize] - back + share);
                    let peak = taken.max(layer.time_at(node, rest + back));
                    if best.as_ref().is_none_or(|(best, _)| peak < *best)
                        && layer.spreads(given, Some(taker), Some(node))
                        && layer.spreads(expert, None, Some(taker))
                    {
                        let step = vec![
                            Change::Unload(other, node),
                            Change::Unload(given, taker),
                            Change::Load(given, node),
                            Change::Load(expert, taker),
                        ];
                        *best = Some((peak, step));
                    }
                }
            }
        }
    }

    /// Whether `node` may take part in a step and has not yet.
    fn free(&self, node: u32) -> bool {
        !self.layer.closed(node) && !self.changed.contains(&node)
    }
}
