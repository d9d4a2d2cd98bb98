//! Phase 3: no node is idle in a layer while it has room.

use std::collections::BinaryHeap;

use super::layer::Layer;
use super::state::{Fleet, State};

/// Gives every node that has room and no expert of a layer one of its experts. Returns whether anything changed.
pub(super) fn occupy(fleet: &Fleet<'_>, state: &mut State) -> bool {
    let mut changed = false;
    for layer in 0..fleet.shape.layers {
        let mut nodes = 0..fleet.nodes.len() as u32;
        let idle = |node| fleet.open(node) && state.count(layer, node) == 0 && state.fits(fleet, layer, node);
        if !nodes.any(idle) {
            continue;
        }
        let mut work = Layer::new(fleet, state, layer);
        if fill(&mut work) {
            state.set_layer(fleet, layer, work.holders);
            changed = true;
        }
    }
    changed
}

/// Gives every idle node with room an expert: one from the slowest node that has several, else a replica of the expert
/// whose replicas answer for most. Returns whether there was one.
pub(super) fn fill(layer: &mut Layer<'_>) -> bool {
    let nodes = 0..layer.on.len() as u32;
    let idle: Vec<u32> =
        nodes.filter(|&node| layer.on[node as usize].is_empty() && layer.room[node as usize] > 0).collect();
    let mut rest = Vec::new();
    let mut donors = layer.on.iter().filter(|experts| experts.len() > 1).count();
    let mut changed = false;
    for node in idle {
        match if donors > 0 { donation(layer, node) } else { None } {
            Some((expert, donor)) => {
                layer.unload(expert, donor);
                layer.load(expert, node);
                donors -= usize::from(layer.on[donor as usize].len() == 1);
                changed = true;
            }
            None => rest.push(node),
        }
    }
    replicate(layer, &rest) || changed
}

/// The expert that `node` should take from the slowest node that has several, so that the slower of both is fastest.
fn donation(layer: &Layer<'_>, node: u32) -> Option<(u32, u32)> {
    for &(_, _, donor) in layer.order.iter().rev() {
        if layer.on[donor as usize].len() < 2 {
            continue;
        }
        let slower = |&expert: &u32| {
            let share = layer.present_share(expert);
            let left = layer.time_at(donor, layer.raw[donor as usize] - share);
            (left.max(layer.time_at(node, share)), expert)
        };
        let may = |&expert: &u32| layer.spreads(expert, Some(donor), Some(node));
        if let Some(expert) = layer.on[donor as usize].iter().copied().filter(may).min_by_key(slower) {
            return Some((expert, donor));
        }
    }
    None
}

/// Puts a replica on each of `nodes`, which hold nothing: of the expert with the largest share that crowds no zone.
///
/// Times are made again at the end: with hundreds of replicas of one expert that is much cheaper than keeping them up.
fn replicate(layer: &mut Layer<'_>, nodes: &[u32]) -> bool {
    let served = (0..layer.holders.len() as u32).filter(|&expert| layer.count(expert) > 0);
    let mut shares: BinaryHeap<(u64, std::cmp::Reverse<u32>)> =
        served.map(|expert| (layer.present_share(expert), std::cmp::Reverse(expert))).collect();
    let mut changed = false;
    for &node in nodes {
        let mut passed = Vec::new();
        while let Some((share, std::cmp::Reverse(expert))) = shares.pop() {
            if layer.spreads(expert, None, Some(node)) {
                let holders = &mut layer.holders[expert as usize];
                let at = holders.binary_search(&node).expect_err("the node holds nothing");
                holders.insert(at, node);
                shares.push((layer.present_share(expert), std::cmp::Reverse(expert)));
                layer.room[node as usize] -= 1;
                changed = true;
                break;
            }
            passed.push((share, std::cmp::Reverse(expert)));
        }
        shares.extend(passed);
    }
    if changed {
        layer.refresh();
    }
    changed
}
