//! What a sequence's next token is drawn with, and what becomes of the drawn one.
//!
//! The drawing itself is [`sirocco_compute::sample`], where the logits are. Its random number depends on the seed and the token's
//! index alone, so the same seed gives the same completion, also when it is resumed in the middle.

use std::collections::BTreeMap;

use sirocco_compute::{Draw, Drawn, TokenSet};
use sirocco_types::SamplingParams;

use crate::{Constraint, ConstraintError};

/// Has the tokens of one sequence drawn.
#[derive(Clone, Debug)]
pub struct Sampler {
    params: SamplingParams,
    /// The tokens of the sequence; only kept for the repetition penalty.
    seen: Option<TokenSet>,
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
    /// Logits that are not numbers: the forward pass went wrong. Or penalties make them so.
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
        let mut seen = penalised.then(|| TokenSet::none_of(vocab_size));
        if let Some(seen) = &mut seen {
            for id in prompt {
                seen.insert(*id);
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

    /// How token `index` of the completion is drawn, after all tokens before it were taken.
    pub fn prepare(&mut self, index: u32) -> Result<Draw, SampleError> {
        let params = &self.params;
        Ok(Draw {
            temperature: params.temperature,
            top_k: params.top_k,
            top_p: params.top_p,
            min_p: params.min_p,
            uniform: uniform(params.seed, index),
            report: params.logprobs,
            repetition_penalty: params.repetition_penalty,
            frequency_penalty: params.frequency_penalty,
            presence_penalty: params.presence_penalty,
            seen: self.seen.clone(),
            generated: self.generated.iter().map(|(id, count)| (*id, *count)).collect(),
            bias: params.logit_bias.iter().map(|(id, bias)| (*id, *bias)).collect(),
            allowed: self.constraint.as_mut().map(Constraint::mask).transpose()?,
        })
    }

    /// Takes token `index` of the completion into the sequence, which was drawn as [`Sampler::prepare`] said.
    pub fn take(&mut self, index: u32, drawn: Option<Drawn>) -> Result<SampledToken, SampleError> {
        let Drawn { id, report } = drawn.ok_or(SampleError::NotFinite(index))?;
        self.note(id);
        if let Some(constraint) = &mut self.constraint {
            constraint.commit(id)?;
        }
        let Some(report) = report else {
            return Ok(SampledToken { id, logprob: None, top_logprobs: Vec::new() });
        };
        let top_logprobs = report.top.iter().map(|(id, logit)| (*id, report.logprob(*logit))).collect();
        Ok(SampledToken { id, logprob: Some(report.logprob(report.logit)), top_logprobs })
    }

    /// Takes `id` into the sequence as if it had been drawn.
    pub fn note(&mut self, id: u32) {
        if let Some(seen) = &mut self.seen {
            seen.insert(id);
        }
        if self.params.frequency_penalty != 0.0 || self.params.presence_penalty != 0.0 {
            *self.generated.entry(id).or_default() += 1;
        }
    }
}

/// A number in [0, 1) for token `index` under `seed`, times 2^64. Source: SplitMix64, Steele, Lea and Flood, OOPSLA 2014.
fn uniform(seed: u64, index: u32) -> u64 {
    let mix = |mut z: u64| {
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let state = mix(seed.wrapping_add(0x9e37_79b9_7f4a_7c15)).wrapping_add(u64::from(index) << 1 | 1);
    // Of 53 bits, as many as an f64 has.
    mix(state.wrapping_mul(0x9e37_79b9_7f4a_7c15)) >> 11 << 11
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 5] = [1.0, 3.0, 2.0, 3.0, -1.0];

    fn sample(sampler: &mut Sampler, index: u32, logits: &[f32]) -> Result<SampledToken, SampleError> {
        let draw = sampler.prepare(index)?;
        sampler.take(index, sirocco_compute::sample(&mut logits.to_vec(), &draw))
    }

    fn drawn(change: impl Fn(&mut SamplingParams), prompt: &[u32]) -> Vec<u32> {
        let mut params = SamplingParams::default();
        change(&mut params);
        let draw = |index| sample(&mut Sampler::new(params.clone(), 5, prompt), index, &LOGITS).unwrap().id;
        let mut ids: Vec<u32> = (0..400).map(draw).collect();
        ids.sort_unstable();
        ids.dedup();
        ids
    }

    #[test]
    fn greedy_takes_the_best_and_the_lowest_of_equals() {
        assert_eq!(drawn(|p| p.temperature = 0.0, &[]), [1]);
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
        (0..10).map(|index| sample(&mut sampler, index, &LOGITS).unwrap().id).collect()
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
            (from..40).map(|index| sample(&mut sampler, index, &LOGITS).unwrap().id).collect()
        };
        assert_eq!(draw(5, 0)[20..], draw(5, 20));
        assert_ne!(draw(5, 0), draw(6, 0));
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let count = 20_000;
        let mean = (0..count).map(|index| uniform(11, index) as f64).sum::<f64>() / 2.0_f64.powi(64) / f64::from(count);
        assert!((mean - 0.5).abs() < 0.01);
        let params = SamplingParams { seed: 3, ..SamplingParams::default() };
        let mut sampler = Sampler::new(params, 5, &[]);
        let ones = (0..count).filter(|index| sample(&mut sampler, *index, &LOGITS).unwrap().id == 1).count();
        let expected = 3.0_f64.exp() / LOGITS.iter().map(|l| f64::from(*l).exp()).sum::<f64>();
        assert!((ones as f64 / f64::from(count) - expected).abs() < 0.02);
    }

    #[test]
    fn log_probabilities_are_those_of_the_model() {
        let params = SamplingParams { logprobs: Some(2), temperature: 0.0, ..SamplingParams::default() };
        let token = sample(&mut Sampler::new(params, 5, &[]), 0, &LOGITS).unwrap();
        let normaliser = LOGITS.iter().map(|logit| f64::from(*logit).exp()).sum::<f64>().ln();
        assert!((f64::from(token.logprob.unwrap()) - (3.0 - normaliser)).abs() < 1e-6);
        assert_eq!(token.top_logprobs.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [1, 3]);
        assert_eq!(token.logprob, Some(token.top_logprobs[0].1));
    }

    #[test]
    fn logits_that_are_not_numbers_are_an_error() {
        let mut sampler = Sampler::new(SamplingParams::default(), 2, &[]);
        assert_eq!(sample(&mut sampler, 4, &[0.0, f32::NAN]), Err(SampleError::NotFinite(4)));
    }
}
