//! Draws the next token from logits.
//!
//! Everything is computed in one fixed order with the program's own exponentials, and the random number of a token depends on
//! the seed and the token's index alone. So the same seed gives the same completion, also when it is resumed in the middle.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use sirocco_compute::{argmax, exp_relative};
use sirocco_types::SamplingParams;

use crate::{Constraint, ConstraintError, Mask};

/// Draws the tokens of one sequence.
#[derive(Clone, Debug)]
pub struct Sampler {
    params: SamplingParams,
    /// Whether a token id is in the sequence; only kept for the repetition penalty.
    seen: Vec<bool>,
    /// How often each token was generated; only kept for the presence and frequency penalties.
    generated: BTreeMap<u32, u32>,
    constraint: Option<Constraint>,
}

/// A drawn token.
#[derive(Clone, Debug, PartialEq)]
pub struct SampledToken {
    /// Its id.
    pub id: u32,
    /// The natural logarithm of its probability, when asked for, before any sampling parameter.
    pub logprob: Option<f32>,
    /// The most likely tokens and their log probabilities, best first, as many as asked for.
    pub top_logprobs: Vec<(u32, f32)>,
}

/// Why no token can be drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SampleError {
    /// Logits that are not numbers: the forward pass went wrong.
    #[error("the logits of token {0} are not all finite")]
    NotFinite(u32),
    /// The sequence cannot be kept within its grammar.
    #[error(transparent)]
    Constraint(#[from] ConstraintError),
}

impl Sampler {
    /// A sampler for a sequence that starts with `prompt`. `params` must be valid, their biased tokens within the vocabulary.
    pub fn new(params: SamplingParams, vocab_size: usize, prompt: &[u32]) -> Self {
        let penalised = (params.repetition_penalty - 1.0).abs() > 0.0;
        let mut seen = if penalised { vec![false; vocab_size] } else { Vec::new() };
        for id in prompt {
            if let Some(seen) = seen.get_mut(*id as usize) {
                *seen = true;
            }
        }
        Self { params, seen, generated: BTreeMap::new(), constraint: None }
    }

    /// Draws only what `constraint` allows, whatever the parameters say. It has taken in what was generated already.
    #[must_use]
    pub fn within(self, constraint: Option<Constraint>) -> Self {
        Self { constraint, ..self }
    }

    /// Whether the constraint allows nothing more.
    pub fn is_finished(&self) -> bool {
        self.constraint.as_ref().is_some_and(Constraint::is_finished)
    }

    /// Whether every token is the likeliest one and nothing else is asked of the logits.
    pub fn takes_likeliest(&self) -> bool {
        let params = &self.params;
        params.temperature == 0.0
            && params.repetition_penalty - 1.0 == 0.0
            && params.frequency_penalty == 0.0
            && params.presence_penalty == 0.0
            && params.logit_bias.is_empty()
            && params.logprobs.is_none()
            && self.constraint.is_none()
    }

    /// Token `index` of the completion of a sequence that takes the likeliest, as [`sirocco_compute::likeliest`] finds it.
    pub fn take(&mut self, index: u32, likeliest: Option<u32>) -> Result<SampledToken, SampleError> {
        let id = likeliest.ok_or(SampleError::NotFinite(index))?;
        self.note(id);
        Ok(SampledToken { id, logprob: None, top_logprobs: Vec::new() })
    }

    /// Draws token `index` of the completion from `logits`, `[vocab_size]`, and takes it into the sequence.
    pub fn sample(&mut self, index: u32, logits: &[f32]) -> Result<SampledToken, SampleError> {
        if !logits.iter().all(|logit| logit.is_finite()) {
            return Err(SampleError::NotFinite(index));
        }
        let mask = self.constraint.as_mut().map(Constraint::mask).transpose()?;
        let id = self.draw(index, logits, mask.as_ref());
        self.note(id);
        if let Some(constraint) = &mut self.constraint {
            constraint.commit(id)?;
        }
        let Some(top) = self.params.logprobs else {
            return Ok(SampledToken { id, logprob: None, top_logprobs: Vec::new() });
        };
        let normaliser = log_sum_exp(logits);
        let logprob = |id: u32| (f64::from(logits[id as usize]) - normaliser) as f32;
        let top_logprobs = best_first(logits, top as usize).into_iter().map(|id| (id, logprob(id))).collect();
        Ok(SampledToken { id, logprob: Some(logprob(id)), top_logprobs })
    }

    /// Takes `id` into the sequence as if it had been drawn.
    pub fn note(&mut self, id: u32) {
        if let Some(seen) = self.seen.get_mut(id as usize) {
            *seen = true;
        }
        if self.params.frequency_penalty != 0.0 || self.params.presence_penalty != 0.0 {
            *self.generated.entry(id).or_default() += 1;
        }
    }

    /// Applies the penalties and biases to `logits`, `[vocab_size]`.
    fn adjust(&self, logits: &mut [f32]) {
        let params = &self.params;
        for (logit, _) in logits.iter_mut().zip(&self.seen).filter(|(_, seen)| **seen) {
            *logit = if *logit > 0.0 { *logit / params.repetition_penalty } else { *logit * params.repetition_penalty };
        }
        for (id, count) in &self.generated {
            logits[*id as usize] -= params.frequency_penalty * *count as f32;
            logits[*id as usize] -= params.presence_penalty;
        }
        for (id, bias) in &params.logit_bias {
            logits[*id as usize] += bias;
        }
    }

    fn draw(&self, index: u32, logits: &[f32], mask: Option<&Mask>) -> u32 {
        let params = &self.params;
        let mut logits = logits.to_vec();
        self.adjust(&mut logits);
        if let Some(mask) = mask {
            mask.apply(&mut logits);
        }
        if params.temperature == 0.0 {
            return argmax(&logits);
        }
        // [vocab], relative to the most likely token's 1
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut weights = logits.clone();
        exp_relative(&mut weights, max, params.temperature);
        if params.top_k > 0 && (params.top_k as usize) < weights.len() {
            keep(&mut weights, &best_first(&logits, params.top_k as usize));
        }
        if params.top_p < 1.0 {
            let mut order = best_first(&logits, logits.len());
            let limit = f64::from(params.top_p) * sum(&weights);
            let mut reached = 0.0;
            let enough = order.iter().position(|id| {
                reached += f64::from(weights[*id as usize]);
                reached >= limit
            });
            order.truncate(enough.map_or(order.len(), |last| last + 1));
            keep(&mut weights, &order);
        }
        if params.min_p > 0.0 {
            weights.iter_mut().filter(|weight| **weight < params.min_p).for_each(|weight| *weight = 0.0);
        }
        let target = uniform(params.seed, index) * sum(&weights);
        let mut reached = 0.0;
        let chosen = weights.iter().position(|weight| {
            reached += f64::from(*weight);
            *weight > 0.0 && reached > target
        });
        // Rounding may leave the target just above the sum; the last possible token is then meant.
        chosen.or_else(|| weights.iter().rposition(|weight| *weight > 0.0)).unwrap_or(0) as u32
    }
}

/// In ascending order.
fn sum(weights: &[f32]) -> f64 {
    weights.iter().fold(0.0, |sum, weight| sum + f64::from(*weight))
}

/// The ids of the `count` highest logits, highest first; ties go to the lowest id.
fn best_first(logits: &[f32], count: usize) -> Vec<u32> {
    let better = |a: &u32, b: &u32| -> Ordering { logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b)) };
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    if count == 0 {
        return Vec::new();
    }
    if count < ids.len() {
        ids.select_nth_unstable_by(count - 1, better);
        ids.truncate(count);
    }
    ids.sort_unstable_by(better);
    ids
}

/// Makes all but `kept` impossible.
fn keep(weights: &mut [f32], kept: &[u32]) {
    let mut others = vec![true; weights.len()];
    for id in kept {
        others[*id as usize] = false;
    }
    weights.iter_mut().zip(others).filter(|(_, other)| *other).for_each(|(weight, _)| *weight = 0.0);
}

fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    max + libm::log(logits.iter().map(|logit| libm::exp(f64::from(*logit) - max)).sum())
}

/// A number in [0, 1) for token `index` under `seed`. Source: SplitMix64, Steele, Lea and Flood, OOPSLA 2014.
fn uniform(seed: u64, index: u32) -> f64 {
    let mix = |mut z: u64| {
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let state = mix(seed.wrapping_add(0x9e37_79b9_7f4a_7c15)).wrapping_add(u64::from(index) << 1 | 1);
    (mix(state.wrapping_mul(0x9e37_79b9_7f4a_7c15)) >> 11) as f64 / (1_u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use sirocco_compute::likeliest;

    use super::*;

    const LOGITS: [f32; 5] = [1.0, 3.0, 2.0, 3.0, -1.0];

    fn drawn(change: impl Fn(&mut SamplingParams), prompt: &[u32]) -> Vec<u32> {
        let mut params = SamplingParams::default();
        change(&mut params);
        let sample = |index| Sampler::new(params.clone(), 5, prompt).sample(index, &LOGITS).unwrap().id;
        let mut ids: Vec<u32> = (0..400).map(sample).collect();
        ids.sort_unstable();
        ids.dedup();
        ids
    }

    #[test]
    fn greedy_takes_the_best_and_the_lowest_of_equals() {
        assert_eq!(drawn(|p| p.temperature = 0.0, &[]), [1]);
    }

    #[test]
    fn the_likeliest_is_enough_for_greedy_sequences_that_ask_for_nothing_else() {
        let takes = |change: fn(&mut SamplingParams)| {
            let mut params = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
            change(&mut params);
            Sampler::new(params, 5, &[]).takes_likeliest()
        };
        assert!(takes(|_| ()) && takes(|p| (p.top_k, p.top_p, p.min_p, p.seed) = (2, 0.5, 0.5, 7)));
        let more: [fn(&mut SamplingParams); 6] = [
            |p| p.temperature = 0.1,
            |p| p.repetition_penalty = 1.1,
            |p| p.frequency_penalty = -0.5,
            |p| p.presence_penalty = 0.5,
            |p| p.logit_bias = [(4, 1.0)].into(),
            |p| p.logprobs = Some(0),
        ];
        assert!(more.into_iter().all(|change| !takes(change)));
        let params = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
        let (mut sampled, mut taken) = (Sampler::new(params.clone(), 5, &[]), Sampler::new(params, 5, &[]));
        for logits in [LOGITS, [f32::NAN, 1.0, 0.0, 0.0, 0.0]] {
            assert_eq!(taken.take(3, likeliest(&logits)), sampled.sample(3, &logits));
        }
    }

    #[test]
    fn each_filter_keeps_what_it_should() {
        assert_eq!(drawn(|_| (), &[]), [0, 1, 2, 3, 4]);
        assert_eq!(drawn(|p| p.top_k = 2, &[]), [1, 3]);
        assert_eq!(drawn(|p| p.top_k = 3, &[]), [1, 2, 3]);
        assert_eq!(drawn(|p| p.top_p = 0.3, &[]), [1]);
        assert_eq!(drawn(|p| p.top_p = 0.75, &[]), [1, 3]);
        assert_eq!(drawn(|p| p.min_p = 0.3, &[]), [1, 2, 3]);
        assert_eq!(drawn(|p| p.temperature = 0.01, &[]), [1, 3]);
    }

    #[test]
    fn a_penalty_turns_away_from_what_was_said() {
        let penalised = |p: &mut SamplingParams| (p.temperature, p.repetition_penalty) = (0.0, 2.0);
        assert_eq!(drawn(penalised, &[1]), [3]);
        assert_eq!(drawn(penalised, &[1, 3]), [2]);
    }

    /// Ten greedy tokens.
    fn greedy(change: impl Fn(&mut SamplingParams), prompt: &[u32]) -> Vec<u32> {
        let mut params = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
        change(&mut params);
        let mut sampler = Sampler::new(params, 5, prompt);
        (0..10).map(|index| sampler.sample(index, &LOGITS).unwrap().id).collect()
    }

    #[test]
    fn presence_counts_once_and_frequency_each_time_and_neither_counts_the_prompt() {
        assert_eq!(greedy(|p| p.presence_penalty = 1.5, &[1, 1, 3]), [1, 3, 2, 1, 1, 1, 1, 1, 1, 1]);
        assert_eq!(greedy(|p| p.frequency_penalty = 0.75, &[1, 1, 3]), [1, 3, 1, 3, 2, 1, 3, 2, 0, 1]);
        assert_eq!(greedy(|p| p.frequency_penalty = -1.0, &[]), [1; 10]);
    }

    #[test]
    fn a_bias_comes_after_the_penalties_and_decides() {
        assert_eq!(greedy(|p| p.logit_bias = [(4, 100.0)].into(), &[]), [4; 10]);
        assert_eq!(drawn(|p| p.logit_bias = [(1, -100.0), (3, -100.0)].into(), &[]), [0, 2, 4]);
        let pushed = |p: &mut SamplingParams| {
            p.logit_bias = [(0, 2.5)].into();
            p.presence_penalty = 2.0;
        };
        assert_eq!(greedy(pushed, &[])[..4], [0, 1, 3, 2]);
    }

    #[test]
    fn the_draw_depends_on_seed_and_index_alone() {
        let draw = |seed, from: u32| -> Vec<u32> {
            let params = SamplingParams { seed, ..SamplingParams::default() };
            let mut sampler = Sampler::new(params, 5, &[]);
            (from..40).map(|index| sampler.sample(index, &LOGITS).unwrap().id).collect()
        };
        assert_eq!(draw(5, 0)[20..], draw(5, 20));
        assert_ne!(draw(5, 0), draw(6, 0));
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let count = 20_000;
        let mean = (0..count).map(|index| uniform(11, index)).sum::<f64>() / f64::from(count);
        assert!((mean - 0.5).abs() < 0.01);
        let params = SamplingParams { seed: 3, ..SamplingParams::default() };
        let mut sampler = Sampler::new(params, 5, &[]);
        let ones = (0..count).filter(|index| sampler.sample(*index, &LOGITS).unwrap().id == 1).count();
        let expected = 3.0_f64.exp() / LOGITS.iter().map(|l| f64::from(*l).exp()).sum::<f64>();
        assert!((ones as f64 / f64::from(count) - expected).abs() < 0.02);
    }

    #[test]
    fn log_probabilities_are_those_of_the_model() {
        let params = SamplingParams { logprobs: Some(2), temperature: 0.0, ..SamplingParams::default() };
        let token = Sampler::new(params, 5, &[]).sample(0, &LOGITS).unwrap();
        let all: f64 = (0..5).map(|id| (f64::from(LOGITS[id]) - log_sum_exp(&LOGITS)).exp()).sum();
        assert!((all - 1.0).abs() < 1e-9);
        assert_eq!(token.top_logprobs.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [1, 3]);
        assert_eq!(token.logprob, Some(token.top_logprobs[0].1));
    }

    #[test]
    fn logits_that_are_not_numbers_are_an_error() {
        let mut sampler = Sampler::new(SamplingParams::default(), 2, &[]);
        assert_eq!(sampler.sample(4, &[0.0, f32::NAN]), Err(SampleError::NotFinite(4)));
    }
}
