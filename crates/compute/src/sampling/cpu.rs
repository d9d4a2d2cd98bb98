//! Drawing on the CPU.

use std::cmp::Reverse;

use super::{Draw, Drawn, Report, TokenSet, ordered, part_of, weight};
use crate::exp_relative;
use crate::wide::wide;

/// Draws a token from `logits`, `[vocab_size]`, as `draw` says, and may change them. None when logits are not all finite or nothing
/// is allowed. `draw` names tokens of the vocabulary only.
pub fn sample(logits: &mut [f32], draw: &Draw) -> Option<Drawn> {
    let raw = draw.report.map(|count| (count, logits.to_vec()));
    change(logits, draw);
    let mut largest = extremes(logits).finite()?;
    if let Some(allowed) = &draw.allowed {
        keep_allowed(logits, allowed);
        largest = extremes(logits).ordered;
    }
    let best = logits.iter().position(|logit| ordered(*logit) == largest)?;
    if logits[best] == f32::NEG_INFINITY {
        return None;
    }
    let id = if draw.temperature == 0.0 { best } else { draw_from(logits, logits[best], draw)? };
    let report = raw.map(|(count, raw)| report(&raw, id, count as usize));
    Some(Drawn { id: id as u32, report })
}

/// Applies penalties and biases.
fn change(logits: &mut [f32], draw: &Draw) {
    for id in draw.seen.iter().flat_map(TokenSet::ids) {
        // The last word of a set may have bits for more tokens than there are.
        let Some(logit) = logits.get_mut(id as usize) else { continue };
        *logit = if *logit > 0.0 { *logit / draw.repetition_penalty } else { *logit * draw.repetition_penalty };
    }
    for (id, count) in &draw.generated {
        logits[*id as usize] -= draw.frequency_penalty * *count as f32;
        logits[*id as usize] -= draw.presence_penalty;
    }
    for (id, bias) in &draw.bias {
        logits[*id as usize] += bias;
    }
}

fn keep_allowed(logits: &mut [f32], allowed: &TokenSet) {
    for (id, logit) in logits.iter_mut().enumerate() {
        if !allowed.contains(id as u32) {
            *logit = f32::NEG_INFINITY;
        }
    }
}

/// What is found in one look at some logits.
#[derive(Clone, Copy)]
struct Extremes {
    /// The largest of [`ordered`].
    ordered: u32,
    /// The bits of the one furthest from zero, NaN further than all.
    furthest: u32,
}

impl Extremes {
    /// The largest of [`ordered`], when all are finite.
    fn finite(self) -> Option<u32> {
        (self.furthest < f32::INFINITY.to_bits()).then_some(self.ordered)
    }
}

wide! {
    /// Looks once.
    fn extremes(logits: &[f32]) -> Extremes = extremes_of
}

#[expect(clippy::inline_always, reason = "compiled once per instruction set, inside the caller that enables it")]
#[inline(always)]
fn extremes_of(logits: &[f32]) -> Extremes {
    logits.iter().fold(Extremes { ordered: 0, furthest: 0 }, |all, logit| Extremes {
        ordered: all.ordered.max(ordered(*logit)),
        furthest: all.furthest.max(logit.abs().to_bits()),
    })
}

/// The id that is drawn at a temperature above 0.
fn draw_from(logits: &[f32], largest: f32, draw: &Draw) -> Option<usize> {
    let mut weights = logits.to_vec(); // of those that are kept
    exp_relative(&mut weights, largest, draw.temperature);
    let top_k = draw.top_k as usize;
    if top_k > 0 && top_k < logits.len() {
        let least = Least::reaching(logits, |_| 1, |_| top_k as u64);
        least.keep(logits, &mut weights);
    }
    if draw.share() > 0 {
        let least = Least::reaching(logits, |id| weight(weights[id]), |sum| part_of(draw.share(), sum).max(1));
        least.keep(logits, &mut weights);
    }
    if draw.min_p > 0.0 {
        weights.iter_mut().filter(|weight| **weight < draw.min_p).for_each(|weight| *weight = 0.0);
    }
    let mut weights = weights.into_iter().map(weight);
    let mut rest = part_of(draw.uniform, weights.clone().sum());
    weights.position(|weight| match rest.checked_sub(weight) {
        Some(less) => {
            rest = less;
            false
        }
        None => true,
    })
}

/// The worst of those that are kept, best first.
#[derive(Clone, Copy, Debug)]
struct Least {
    /// Its logit, by [`ordered`].
    key: u32,
    id: u32,
}

impl Least {
    /// The first, best first, with which the sum of the amounts comes to what `goal` makes of the sum of all: at least 1, and no more
    /// than all. The amounts of equals are the same or 0.
    ///
    /// Sums over the first 11 bits of the keys say which those of the token are, then sums over the next 11 where these are the same;
    /// few are left then.
    fn reaching(logits: &[f32], amount: impl Fn(usize) -> u64, goal: impl FnOnce(u64) -> u64) -> Self {
        let mut sums = [0; BINS];
        for (id, logit) in logits.iter().enumerate() {
            sums[(ordered(*logit) >> 21) as usize] += amount(id);
        }
        let mut rest = goal(sums.iter().sum());
        let first = bin(&sums, &mut rest);
        sums.fill(0);
        for (id, key) in logits.iter().copied().map(ordered).enumerate().filter(|(_, key)| key >> 21 == first) {
            sums[key as usize >> 10 & (BINS - 1)] += amount(id);
        }
        let both = first << 11 | bin(&sums, &mut rest);
        let keys = logits.iter().copied().map(ordered).zip(0..);
        let mut last: Vec<(u32, u32)> = keys.filter(|(key, _)| key >> 10 == both).collect();
        last.sort_unstable_by_key(|(key, id)| (Reverse(*key), *id));
        let reached = last.into_iter().find(|(_, id)| match rest.checked_sub(amount(*id as usize)) {
            Some(less) if less > 0 => {
                rest = less;
                false
            }
            _ => true,
        });
        let (key, id) = reached.expect("the goal is within the sum of all");
        Self { key, id }
    }

    /// Makes the weights of all that is worse 0.
    fn keep(self, logits: &[f32], weights: &mut [f32]) {
        for ((logit, weight), id) in logits.iter().zip(weights).zip(0..) {
            let key = ordered(*logit);
            if key < self.key || key == self.key && id > self.id {
                *weight = 0.0;
            }
        }
    }
}

const BINS: usize = 1 << 11;

/// The highest bin with which the sum of the highest comes to `rest`, from which those above it are taken.
fn bin(sums: &[u64; BINS], rest: &mut u64) -> u32 {
    let reached = (0..BINS).rev().find(|bin| match rest.checked_sub(sums[*bin]) {
        Some(less) if less > 0 => {
            *rest = less;
            false
        }
        _ => true,
    });
    reached.expect("the goal is within the sum of all") as u32
}

/// Of the `raw` logits, for the token `id` that was drawn and the `count` likeliest.
fn report(raw: &[f32], id: usize, count: usize) -> Report {
    let best = |id: &u32| (Reverse(ordered(raw[*id as usize])), *id);
    let mut top: Vec<u32> = (0..raw.len() as u32).collect();
    let largest = top.iter().copied().min_by_key(best).map_or(f32::NEG_INFINITY, |id| raw[id as usize]);
    let mut weights = raw.to_vec();
    exp_relative(&mut weights, largest, 1.0);
    let sum = weights.into_iter().map(weight).sum();
    if 0 < count && count < top.len() {
        top.select_nth_unstable_by_key(count - 1, best);
    }
    top.truncate(count);
    top.sort_unstable_by_key(best);
    Report { logit: raw[id], largest, sum, top: top.into_iter().map(|id| (id, raw[id as usize])).collect() }
}
