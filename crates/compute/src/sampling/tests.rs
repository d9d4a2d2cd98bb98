//! Drawing against the definition written down without any speed, on logits and parameters of all kinds.

use proptest::collection::{btree_map, vec};
use proptest::option;
use proptest::prelude::*;

use super::*;
use crate::exp_relative;

/// The definition, step by step.
fn twin(logits: &[f32], draw: &Draw) -> Option<Drawn> {
    let mut changed = logits.to_vec();
    for (id, logit) in changed.iter_mut().enumerate() {
        let id = id as u32;
        if draw.seen.as_ref().is_some_and(|seen| seen.contains(id)) {
            *logit = if *logit > 0.0 { *logit / draw.repetition_penalty } else { *logit * draw.repetition_penalty };
        }
        for (_, count) in draw.generated.iter().filter(|(own, _)| *own == id) {
            *logit -= draw.frequency_penalty * *count as f32;
            *logit -= draw.presence_penalty;
        }
        for (_, bias) in draw.bias.iter().filter(|(own, _)| *own == id) {
            *logit += bias;
        }
    }
    if !changed.iter().all(|logit| logit.is_finite()) {
        return None;
    }
    let allowed = |id: &usize| draw.allowed.as_ref().is_none_or(|allowed| allowed.contains(*id as u32));
    let best_first = |logits: &[f32]| {
        let mut ids: Vec<usize> = (0..logits.len()).collect();
        ids.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
        ids
    };
    let weights = |logits: &[f32], temperature: f32| -> Vec<f32> {
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut weights = logits.to_vec();
        exp_relative(&mut weights, largest, temperature);
        weights
    };
    let whole = |weight: f32| (f64::from(weight) * 2.0_f64.powi(40)).floor() as u128;
    let mut order = best_first(&changed);
    order.retain(allowed);
    let best = *order.first()?;
    let mut id = best;
    if draw.temperature > 0.0 {
        let possible: Vec<f32> =
            changed.iter().enumerate().map(|(id, x)| if allowed(&id) { *x } else { f32::NEG_INFINITY }).collect();
        let weights = weights(&possible, draw.temperature);
        if draw.top_k > 0 {
            order.truncate(draw.top_k as usize);
        }
        if draw.top_p < 1.0 {
            let sum: u128 = order.iter().map(|id| whole(weights[*id])).sum();
            let share = (f64::from(draw.top_p) * 2.0_f64.powi(64)) as u128;
            let goal = ((share * sum) >> 64).max(1);
            let mut reached = 0;
            let last = order.iter().position(|id| {
                reached += whole(weights[*id]);
                reached >= goal
            });
            order.truncate(last.unwrap() + 1);
        }
        order.retain(|id| draw.min_p == 0.0 || weights[*id] >= draw.min_p);
        order.sort_unstable();
        let sum: u128 = order.iter().map(|id| whole(weights[*id])).sum();
        let target = (u128::from(draw.uniform) * sum) >> 64;
        let mut reached = 0;
        let drawn = order.iter().position(|id| {
            reached += whole(weights[*id]);
            reached > target
        });
        id = order[drawn.unwrap()];
    }
    let report = draw.report.map(|count| Report {
        logit: logits[id],
        largest: logits[best_first(logits)[0]],
        sum: weights(logits, 1.0).into_iter().map(|weight| whole(weight) as u64).sum(),
        top: best_first(logits).into_iter().take(count as usize).map(|id| (id as u32, logits[id])).collect(),
    });
    Some(Drawn { id: id as u32, report })
}

/// What is compared: f32 by their bits.
pub(crate) fn bits(drawn: Option<&Drawn>) -> Option<Vec<u64>> {
    let Drawn { id, report } = drawn?;
    let mut all = vec![u64::from(*id)];
    if let Some(Report { logit, largest, sum, top }) = report {
        all.extend([u64::from(logit.to_bits()), u64::from(largest.to_bits()), *sum]);
        all.extend(top.iter().flat_map(|(id, logit)| [u64::from(*id), u64::from(logit.to_bits())]));
    }
    Some(all)
}

/// Logits of all kinds.
fn logits(width: usize) -> impl Strategy<Value = Vec<f32>> {
    let spread = vec(-8.0_f32..8.0, width);
    let peaked = vec((-1.0_f32..1.0).prop_map(|x| 40.0 * x * x * x), width);
    let ties = vec((-3_i32..4).prop_map(|x| x as f32 * 0.5), width);
    let zeros = vec(prop_oneof![Just(0.0_f32), Just(-0.0), Just(1e-45), Just(-1e-45)], width);
    let huge = vec(prop_oneof![Just(3e38_f32), Just(-3e38), -1e30_f32..1e30], width);
    let any = vec(any::<u32>().prop_map(|bits| f32::from_bits(bits & 0xbfff_ffff)), width);
    prop_oneof![4 => spread, 2 => peaked, 3 => ties, 1 => zeros, 1 => huge, 1 => any]
}

fn set(width: usize, one_in: u32) -> impl Strategy<Value = TokenSet> {
    vec(0..one_in, width).prop_map(move |all| {
        let mut set = TokenSet::none_of(width);
        (0..).zip(all).filter(|(_, x)| *x == 0).for_each(|(id, _)| set.insert(id));
        set
    })
}

fn draws(width: usize) -> impl Strategy<Value = Draw> {
    let ids = 0..width as u32;
    let chances = (
        prop_oneof![1 => Just(0.0_f32), 4 => 0.05_f32..2.0, 1 => Just(1e-6)],
        prop_oneof![2 => Just(0_u32), 3 => 1..2 * width as u32, 1 => 1_u32..20],
        prop_oneof![2 => Just(1.0_f32), 3 => 0.01_f32..1.0, 1 => Just(1e-30), 1 => Just(0.999_999)],
        prop_oneof![3 => Just(0.0_f32), 1 => 0.0_f32..1.0, 1 => Just(1.0)],
        prop_oneof![6 => any::<u64>().prop_map(|x| x >> 11 << 11), 1 => Just(0), 1 => Just(!0 << 11)],
        option::weighted(0.3, 0_u32..=20),
    );
    let penalties = prop_oneof![Just((1.0_f32, 0.0_f32, 0.0_f32)), (0.5_f32..2.0, -2.0_f32..2.0, -2.0_f32..2.0)];
    let changes = (
        penalties,
        option::weighted(0.3, set(width, 3)),
        btree_map(ids.clone(), 1_u32..50, 0..20),
        btree_map(ids, -100.0_f32..100.0, 0..6),
        option::weighted(0.3, (1_u32..40).prop_flat_map(move |one_in| set(width, one_in))),
    );
    (chances, changes).prop_map(|((temperature, top_k, top_p, min_p, uniform, report), changes)| {
        let ((repetition_penalty, frequency_penalty, presence_penalty), seen, generated, bias, allowed) = changes;
        let (generated, bias) = (generated.into_iter().collect(), bias.into_iter().collect());
        let penalties = Draw { repetition_penalty, frequency_penalty, presence_penalty, ..Draw::default() };
        let draw =
            Draw { temperature, top_k, top_p, min_p, uniform, report, seen, generated, bias, allowed, ..penalties };
        // As often nothing is changed.
        if uniform >> 11 & 1 == 0 { Draw { seen: None, generated: Vec::new(), bias: Vec::new(), ..draw } } else { draw }
    })
}

/// Rows of logits of one width with how they are drawn from; a few are not finite.
pub(crate) fn rows(widest: usize, most: usize) -> impl Strategy<Value = Vec<(Vec<f32>, Draw)>> {
    let widths = prop_oneof![1_usize..=40, 1..=widest];
    let odd = prop_oneof![8 => Just(None), 1 => prop::sample::select(vec![
        Some(f32::NAN), Some(-f32::NAN), Some(f32::INFINITY), Some(f32::NEG_INFINITY)
    ])];
    widths.prop_flat_map(move |width| {
        let row = (logits(width), draws(width), odd.clone(), 0..width).prop_map(|(mut logits, draw, odd, at)| {
            logits[at] = odd.unwrap_or(logits[at]);
            (logits, draw)
        });
        vec(row, 1..=most)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn what_is_drawn_is_what_the_definition_says(rows in rows(3000, 1)) {
        for (logits, draw) in &rows {
            prop_assert_eq!(bits(sample(&mut logits.clone(), draw).as_ref()), bits(twin(logits, draw).as_ref()), "{:?}", draw);
        }
    }
}

#[test]
fn the_default_takes_the_highest_the_lowest_of_equals_and_none_beside_what_is_no_number() {
    let likeliest = |logits: &[f32]| sample(&mut logits.to_vec(), &Draw::default()).map(|drawn| drawn.id);
    assert_eq!(likeliest(&[1.0, 3.0, 2.0, 3.0, -1.0]), Some(1));
    assert_eq!(likeliest(&[-0.0, 0.0, 0.0]), Some(1));
    assert_eq!(likeliest(&[-3.0]), Some(0));
    for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        assert_eq!(likeliest(&[1.0, odd, 2.0]), None);
    }
}

#[test]
fn nothing_is_drawn_where_nothing_is_allowed_or_a_change_overflows() {
    let nothing = Draw { allowed: Some(TokenSet::none_of(3)), ..Draw::default() };
    let overflows = Draw { bias: vec![(1, 3e38)], ..Draw::default() };
    for temperature in [0.0, 1.0] {
        for draw in [&nothing, &overflows] {
            assert_eq!(sample(&mut [1.0, 3e38, 2.0], &Draw { temperature, ..draw.clone() }), None);
        }
    }
}

#[test]
fn a_vocabulary_of_a_million_equal_tokens_overflows_no_sum() {
    let width = 1 << 20;
    let draw = |uniform| Draw { temperature: 1.0, top_p: 0.5, uniform, ..Draw::default() };
    let drawn = |uniform| sample(&mut vec![7.0; width], &draw(uniform)).unwrap().id;
    assert_eq!([drawn(0), drawn(1 << 63), drawn(!0)], [0, 1 << 18, (1 << 19) - 1]);
}

#[test]
fn log_probabilities_are_within_a_hundred_thousandth_of_the_logarithm_of_the_softmax() {
    for (width, scale) in [(5, 1.0), (4000, 8.0), (4000, 0.0), (100_000, 3.0)] {
        let logits: Vec<f32> = (0..width).map(|i| (i as f32 * 12.9898).sin() * scale).collect();
        let draw = Draw { report: Some(20), ..Draw::default() };
        let report = sample(&mut logits.clone(), &draw).unwrap().report.unwrap();
        let normaliser = logits.iter().map(|x| f64::from(*x).exp()).sum::<f64>().ln();
        for logit in report.top.iter().map(|(_, logit)| *logit).chain([report.logit, -scale]) {
            let expected = f64::from(logit) - normaliser;
            assert!((f64::from(report.logprob(logit)) - expected).abs() < 1e-5, "{logit} of {width}");
        }
        assert_eq!(report.top.len(), 20.min(width));
        assert_eq!(report.logit.to_bits(), report.top[0].1.to_bits());
    }
}
