//! The steps of a walk: small changes around a layer's slowest node.
//!
//! No step leaves a node without an expert of the layer, crowds a zone, or exceeds what a node may take.

use super::layer::Layer;
use super::search::Prices;

/// An expert comes to a node or leaves it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// The expert comes to the node.
    Load(u32, u32),
    /// The expert leaves the node.
    Unload(u32, u32),
}

impl Change {
    pub(super) fn undone(self) -> Self {
        match self {
            Self::Load(expert, node) => Self::Unload(expert, node),
            Self::Unload(expert, node) => Self::Load(expert, node),
        }
    }
}

/// The best step so far: its price, its changes.
struct Best {
    /// The time it must stay under.
    top: u64,
    score: u128,
    step: Vec<Change>,
}

impl Best {
    /// Whether a step after which the slowest node it touches takes `peak` and which costs `price` would be better.
    fn beaten_by(&self, peak: u64, price: u128) -> bool {
        peak < self.top && u128::from(peak) + price < self.score
    }
}

/// The step that speeds up the slowest node most for its price; empty when there is none.
pub(super) fn best(layer: &Layer<'_>, prices: Prices) -> Vec<Change> {
    let slow = layer.slowest();
    let mut best = Best { top: layer.top(), score: u128::MAX, step: Vec::new() };
    // a step is chosen mostly by what it does: even dear loads weigh little here, and free ones enough to break ties
    let load = prices.load.clamp(u128::from(layer.ideal / 300), u128::from(layer.ideal / 64));
    let prices = Prices { load, ..prices };
    sheds(layer, slow, &mut best);
    trades(layer, prices, slow, &mut best);
    replicas(layer, prices, slow, &mut best);
    replacements(layer, prices, slow, &mut best);
    best.step
}

/// Steps that unload a replica from the slowest node.
fn sheds(layer: &Layer<'_>, slow: u32, best: &mut Best) {
    if layer.on[slow as usize].len() < 2 {
        return;
    }
    for &expert in &layer.on[slow as usize] {
        let replicas = layer.count(expert);
        if !layer.spare(expert) || !layer.spreads(expert, Some(slow), None) {
            continue;
        }
        let more = layer.share(expert, replicas - 1) - layer.share(expert, replicas);
        let left = layer.time_at(slow, layer.raw[slow as usize] - layer.share(expert, replicas));
        let peak = left.max(layer.slowest_holder(expert, slow, more));
        // what it saves counts for nothing here: a replica that earns no rent goes at the end of the walk
        if best.beaten_by(peak, 0) {
            *best = Best { score: u128::from(peak), step: vec![Change::Unload(expert, slow)], ..*best };
        }
    }
}

/// Steps that move an expert from the slowest node to another one, or swap it for one of its experts.
fn trades(layer: &Layer<'_>, prices: Prices, slow: u32, best: &mut Best) {
    let slow_raw = layer.raw[slow as usize];
    let slow_speed = layer.speed(slow);
    for &(time, _, node) in &layer.order {
        // the slower of two nodes cannot be faster than both are together
        let least = time + (best.top - time.min(best.top)) / (slow_speed + layer.fastest) * slow_speed;
        if u128::from(least) + prices.load >= best.score || time >= best.top {
            break;
        }
        if layer.closed(node) {
            continue;
        }
        let raw = layer.raw[node as usize];
        for &expert in &layer.on[slow as usize] {
            if layer.holds(node, expert) {
                continue;
            }
            let share = layer.present_share(expert);
            if layer.room[node as usize] > 0 && layer.on[slow as usize].len() > 1 {
                let peak = layer.time_at(slow, slow_raw - share).max(layer.time_at(node, raw + share));
                if best.beaten_by(peak, prices.load) && layer.spreads(expert, Some(slow), Some(node)) {
                    let step = vec![Change::Unload(expert, slow), Change::Load(expert, node)];
                    *best = Best { score: u128::from(peak) + prices.load, step, ..*best };
                }
            }
            if layer.closed(slow) {
                continue;
            }
            for &other in &layer.on[node as usize] {
                let back = layer.present_share(other);
                if back >= share || layer.holds(slow, other) {
                    continue;
                }
                let peak = layer.time_at(slow, slow_raw - share + back).max(layer.time_at(node, raw - back + share));
                if best.beaten_by(peak, 2 * prices.load)
                    && layer.spreads(expert, Some(slow), Some(node))
                    && layer.spreads(other, Some(node), Some(slow))
                {
                    let step = vec![
                        Change::Unload(expert, slow),
                        Change::Unload(other, node),
                        Change::Load(expert, node),
                        Change::Load(other, slow),
                    ];
                    *best = Best { score: u128::from(peak) + 2 * prices.load, step, ..*best };
                }
            }
        }
    }
}

/// Steps that put another replica of one of the slowest node's experts on a node with room.
fn replicas(layer: &Layer<'_>, prices: Prices, slow: u32, best: &mut Best) {
    for &expert in &layer.on[slow as usize] {
        let replicas = layer.count(expert);
        let left = relieved(layer, slow, expert);
        let price = prices.load + prices.rent;
        if !best.beaten_by(left, price) {
            continue;
        }
        let may = |node| layer.spreads(expert, None, Some(node));
        let Some(node) = layer.best_home(expert, may) else { continue };
        let peak = left.max(layer.time_at(node, layer.raw[node as usize] + layer.share(expert, replicas + 1)));
        if best.beaten_by(peak, price) {
            *best = Best { score: u128::from(peak) + price, step: vec![Change::Load(expert, node)], ..*best };
        }
    }
}

/// Steps that put another replica of one of the slowest node's experts in the place of a replica that can be spared.
fn replacements(layer: &Layer<'_>, prices: Prices, slow: u32, best: &mut Best) {
    each_replacement(layer, slow, |layer, found| {
        let peak = found.peak.max(found.arrival);
        if best.beaten_by(peak, prices.load) && found.spreads(layer) {
            *best = Best { score: u128::from(peak) + prices.load, step: found.step(), ..*best };
        }
    });
}

/// The replacement that speeds up the slowest node and overloads only the node it happens on, as little as possible:
/// later steps may relieve that one. Empty when there is none.
pub(super) fn detour(layer: &Layer<'_>) -> Vec<Change> {
    let (slow, top) = (layer.slowest(), layer.top());
    let mut best: Option<(u64, Vec<Change>)> = None;
    each_replacement(layer, slow, |layer, found| {
        let better = best.as_ref().is_none_or(|(arrival, _)| found.arrival < *arrival);
        if found.peak < top && better && found.spreads(layer) {
            best = Some((found.arrival, found.step()));
        }
    });
    best.map(|(_, step)| step).unwrap_or_default()
}

/// `expert` takes the place of `other` on `node`.
struct Replacement {
    expert: u32,
    other: u32,
    node: u32,
    /// The slower of the slowest node and the other nodes of `other` afterwards.
    peak: u64,
    /// The time of `node` afterwards.
    arrival: u64,
}

impl Replacement {
    fn step(&self) -> Vec<Change> {
        vec![Change::Unload(self.other, self.node), Change::Load(self.expert, self.node)]
    }

    fn spreads(&self, layer: &Layer<'_>) -> bool {
        layer.spreads(self.other, Some(self.node), None) && layer.spreads(self.expert, None, Some(self.node))
    }
}

fn each_replacement(layer: &Layer<'_>, slow: u32, mut visit: impl FnMut(&Layer<'_>, &Replacement)) {
    let relieved: Vec<(u32, u64)> =
        layer.on[slow as usize].iter().map(|&expert| (expert, relieved(layer, slow, expert))).collect();
    for other in (0..layer.holders.len() as u32).filter(|&other| layer.spare(other)) {
        let replicas = layer.count(other);
        let share = layer.share(other, replicas);
        let more = layer.share(other, replicas - 1) - share;
        // the two slowest holders of the other expert, to know the slowest besides any one
        let mut slowest = [(0, u32::MAX); 2];
        for &node in &layer.holders[other as usize] {
            let after = (layer.time_at(node, layer.raw[node as usize] + more), node);
            if after > slowest[0] {
                slowest = [after, slowest[0]];
            } else if after > slowest[1] {
                slowest[1] = after;
            }
        }
        for &node in &layer.holders[other as usize] {
            if node == slow || layer.closed(node) {
                continue;
            }
            let rest = if slowest[0].1 == node { slowest[1].0 } else { slowest[0].0 };
            for &(expert, left) in &relieved {
                if expert == other || layer.holds(node, expert) {
                    continue;
                }
                let arriving = layer.share(expert, layer.count(expert) + 1);
                let arrival = layer.time_at(node, layer.raw[node as usize] - share + arriving);
                visit(layer, &Replacement { expert, other, node, peak: left.max(rest), arrival });
            }
        }
    }
}

/// The time of the slowest node once `expert`, which it holds, has one more replica.
fn relieved(layer: &Layer<'_>, slow: u32, expert: u32) -> u64 {
    let replicas = layer.count(expert);
    let less = layer.share(expert, replicas) - layer.share(expert, replicas + 1);
    layer.time_at(slow, layer.raw[slow as usize] - less)
}

/// Unloads a replica whose absence slows down no node beyond the slowest, if replicas cost rent. Of several the coldest.
pub(super) fn drop_unneeded(layer: &Layer<'_>, prices: Prices) -> Vec<Change> {
    let mut best: Option<(u64, Change)> = None;
    if prices.rent > 0 {
        for expert in (0..layer.holders.len() as u32).filter(|&expert| layer.spare(expert)) {
            let replicas = layer.count(expert);
            let share = layer.share(expert, replicas - 1);
            if best.is_some_and(|(coldest, _)| coldest <= share) {
                continue;
            }
            let may = |&&node: &&u32| layer.on[node as usize].len() > 1 && layer.spreads(expert, Some(node), None);
            let slowest = |&&node: &&u32| (layer.times[node as usize], node);
            let Some(&node) = layer.holders[expert as usize].iter().filter(may).max_by_key(slowest) else { continue };
            let more = share - layer.share(expert, replicas);
            if layer.slowest_holder(expert, node, more) <= layer.top() {
                best = Some((share, Change::Unload(expert, node)));
            }
        }
    }
    best.map(|(_, change)| vec![change]).unwrap_or_default()
}
