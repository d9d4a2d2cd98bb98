//! A layer that no node held before is packed anew: how many replicas each expert gets, then the largest share first.

use std::cmp::Reverse;

use super::layer::Layer;
use super::occupy;
use super::recount::Shares;
use super::search::{self, Prices};
use super::state::{Fleet, State};

/// Packs `layer` with several numbers of replicas, improves each packing by walks, and keeps the best.
///
/// It takes no more than its part of the memory that is left, so that later layers get theirs.
pub(super) fn pack(fleet: &Fleet<'_>, state: &mut State, layer: usize) {
    let layers_left = state.fresh[layer..].iter().filter(|&&fresh| fresh).count() as u64;
    let mut present = Layer::ranked_by_memory(fleet, state, layer);
    for (room, &free) in present.room.iter_mut().zip(&state.free) {
        *room = u64::from(*room).min(free.div_ceil(layers_left)) as u32;
    }
    let prices = Prices { load: 0, ..Prices::new(fleet, &present) };
    let lacking = Lacking::of(fleet, &present);
    let trials: Vec<Layer<'_>> =
        extra_replicas(fleet, &present, prices).into_iter().filter_map(|extra| packed(&present, extra)).collect();
    search::polish(&mut present, prices);
    let mut best = present;
    for mut trial in trials {
        if Lacking::of(fleet, &trial) > lacking {
            continue;
        }
        search::polish(&mut trial, prices);
        if prices.potential(&trial) < prices.potential(&best) {
            best = trial;
        }
    }
    state.set_layer(fleet, layer, best.holders);
}

/// What a layer lacks, most important first.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Lacking {
    unserved: usize,
    replicas: u64,
    crowding: usize,
    idle: usize,
}

impl Lacking {
    fn of(fleet: &Fleet<'_>, layer: &Layer<'_>) -> Self {
        let short = layer.holders.iter().zip(layer.required);
        Self {
            unserved: layer.holders.iter().filter(|nodes| nodes.is_empty()).count(),
            replicas: short.map(|(nodes, &required)| u64::from(required).saturating_sub(nodes.len() as u64)).sum(),
            crowding: layer.holders.iter().map(|nodes| fleet.crowding(nodes.iter().copied())).sum(),
            idle: (0..layer.on.len()).filter(|&node| layer.on[node].is_empty() && layer.room[node] > 0).count(),
        }
    }
}

/// Numbers of replicas beyond the required ones that are worth trying.
///
/// No layer ends before its largest share does: the best number, by that bound and the rent, and twice that (beyond what no
/// node's idling takes); when replicas cost nothing also as many as there is room for.
fn extra_replicas(fleet: &Fleet<'_>, layer: &Layer<'_>, prices: Prices) -> Vec<usize> {
    let open = (0..layer.on.len()).filter(|&node| layer.room[node] > 0 || !layer.on[node].is_empty()).count();
    let places: usize = (0..layer.on.len()).map(|node| layer.room[node] as usize + layer.on[node].len()).sum();
    let required: usize = layer.required.iter().map(|&replicas| replicas as usize).sum();
    let most = places.saturating_sub(required);
    let least = open.saturating_sub(required).min(most);
    let mut shares = Shares::required(layer);
    let mut best = (u128::MAX, least);
    for extra in 0..=most {
        let Some(share) = shares.largest() else { break };
        let slowest = u128::from((share << 16) / layer.fastest).max(u128::from(layer.ideal));
        let bound = slowest + prices.rent * extra as u128;
        if extra >= least && bound < best.0 {
            best = (bound, extra);
        }
        if slowest == u128::from(layer.ideal) && extra >= least {
            break;
        }
        shares.add();
    }
    let mut numbers = vec![best.1, (2 * best.1 - least + fleet.shape.experts / 16).min(most)];
    if prices.rent == 0 {
        numbers.push(most);
    }
    numbers.dedup();
    numbers
}

/// The layer emptied and filled again with `extra` replicas beyond the required ones; `None` when an expert found no node.
fn packed<'a>(layer: &Layer<'a>, extra: usize) -> Option<Layer<'a>> {
    let mut shares = Shares::required(layer);
    (0..extra).for_each(|_| shares.add());
    let mut items: Vec<(u64, Reverse<u32>, u64)> =
        (0..).zip(shares.counts).map(|(expert, count)| (layer.share(expert, count), Reverse(expert), count)).collect();
    items.sort_unstable_by(|a, b| b.cmp(a));
    let mut packed = layer.emptied();
    for (share, Reverse(expert), replicas) in items {
        for _ in 0..replicas {
            let may = |node| packed.spreads(expert, None, Some(node));
            match packed.best_home_for(expert, share, may) {
                Some(node) => packed.put(expert, node, share),
                None if packed.holders[expert as usize].is_empty() => return None,
                None => break,
            }
        }
    }
    packed.refresh();
    occupy::fill(&mut packed);
    Some(packed)
}
