//! Draws the next token where the logits are. One definition, to the last bit, that the CPU (`cpu.rs`) and a GPU
//! (`cuda/kernels/sampling.cu`) follow.
//!
//! A [`Draw`] does with a row of logits, `[vocab_size]`, one after the other:
//!
//! 1. It changes them, in f32: those of `seen` tokens are divided by the repetition penalty, or multiplied when not positive; from
//!    those of `generated` ones the frequency penalty times their count is subtracted, then the presence penalty; `bias` is added.
//!    If one of all is not finite then, nothing is drawn.
//! 2. What is not `allowed` becomes minus infinity. At temperature 0 the best is taken. Better is the larger in the order of
//!    [`f32::total_cmp`], of equals the lower id.
//! 3. A token's weight is e^((logit - largest) / temperature) in f32, times 2^40 and rounded down. All that is summed up from here on
//!    are such integers, which come to the same in whatever order; no sum overflows up to 2^23 tokens.
//! 4. `top_k` keeps as many of the best. Of these `top_p` keeps the fewest best whose weights reach its share of their sum, rounded
//!    down. `min_p` drops what has less than that in f32, where the best has 1.
//! 5. By ascending id, the first token is drawn at which the sum of the weights that are left exceeds `uniform` of all of them,
//!    rounded down. What is less than 2^-40 as likely as the best is never drawn.
//!
//! What is reported ([`Report`]) is of the logits before any of it.

mod cpu;
#[cfg(test)]
pub(crate) mod tests;

pub use cpu::sample;

/// How a token is drawn. The default takes the likeliest and reports nothing.
#[derive(Clone, Debug, PartialEq)]
pub struct Draw {
    /// 0 takes the best.
    pub temperature: f32,
    /// How many of the best are kept; 0 keeps all.
    pub top_k: u32,
    /// Share of the weight whose best tokens are kept, above 0; 1 keeps all.
    pub top_p: f32,
    /// Least part of the best token's weight; 0 keeps all.
    pub min_p: f32,
    /// A random number of [0, 1), times 2^64.
    pub uniform: u64,
    /// How many of the likeliest tokens are reported with the one that is drawn, at most [`Draw::MOST_REPORTED`]; none: nothing is
    /// reported.
    pub report: Option<u32>,
    /// Of `seen`, above 0.
    pub repetition_penalty: f32,
    /// Of `generated`, for each time.
    pub frequency_penalty: f32,
    /// Of `generated`, once.
    pub presence_penalty: f32,
    /// Tokens of the sequence; none when the repetition penalty is 1.
    pub seen: Option<TokenSet>,
    /// Different tokens, and how often each was generated.
    pub generated: Vec<(u32, u32)>,
    /// Different tokens, and what is added to their logits.
    pub bias: Vec<(u32, f32)>,
    /// What a grammar allows; none when there is no grammar.
    pub allowed: Option<TokenSet>,
}

impl Draw {
    /// Most tokens that are reported besides the drawn one.
    pub const MOST_REPORTED: usize = sirocco_types::limits::TOP_LOGPROBS;

    /// `top_p` times 2^64, at least 1; 0 when it keeps all.
    pub(crate) fn share(&self) -> u64 {
        if self.top_p < 1.0 { ((f64::from(self.top_p) * 2.0_f64.powi(64)) as u64).max(1) } else { 0 }
    }
}

impl Default for Draw {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            uniform: 0,
            report: None,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            seen: None,
            generated: Vec::new(),
            bias: Vec::new(),
            allowed: None,
        }
    }
}

/// A drawn token.
#[derive(Clone, Debug, PartialEq)]
pub struct Drawn {
    /// Its id.
    pub id: u32,
    /// When asked for.
    pub report: Option<Report>,
}

/// What log probabilities follow from.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// The drawn token's logit.
    pub logit: f32,
    /// The largest logit.
    pub largest: f32,
    /// All tokens' weights at temperature 1.
    pub sum: u64,
    /// Ids and logits of the likeliest tokens, best first, as many as asked for and there are.
    pub top: Vec<(u32, f32)>,
}

impl Report {
    /// The natural logarithm of the probability of a token with this logit, within 1e-5.
    pub fn logprob(&self, logit: f32) -> f32 {
        let sum = self.sum as f64 / f64::from(WEIGHT_OF_ONE);
        (f64::from(logit) - (f64::from(self.largest) + libm::log(sum))) as f32
    }
}

/// Some of the tokens of a vocabulary, a bit for each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenSet(Vec<u32>);

impl TokenSet {
    /// None of `vocab_size` tokens.
    pub fn none_of(vocab_size: usize) -> Self {
        Self(vec![0; vocab_size.div_ceil(32)])
    }

    /// Adds a token of the vocabulary; others are not heeded.
    pub fn insert(&mut self, id: u32) {
        if let Some(word) = self.0.get_mut(id as usize / 32) {
            *word |= 1 << (id % 32);
        }
    }

    /// Whether it has a token.
    pub fn contains(&self, id: u32) -> bool {
        self.0.get(id as usize / 32).is_some_and(|word| word >> (id % 32) & 1 == 1)
    }

    /// All it has, in ascending order.
    fn ids(&self) -> impl Iterator<Item = u32> {
        let of_word = |(index, word): (u32, &u32)| {
            let word = *word;
            (0..32).filter(move |bit| word >> bit & 1 == 1).map(move |bit| index * 32 + bit)
        };
        (0..).zip(&self.0).flat_map(of_word)
    }

    /// Token `id` is bit `id % 32` of word `id / 32`.
    pub(crate) fn words(&self) -> &[u32] {
        &self.0
    }
}

impl From<Vec<u32>> for TokenSet {
    /// Token `id` is bit `id % 32` of word `id / 32`.
    fn from(words: Vec<u32>) -> Self {
        Self(words)
    }
}

/// The weight of the likeliest token.
const WEIGHT_OF_ONE: f32 = (1_u64 << 40) as f32;

/// A weight, from 0 to 1, times 2^40 and rounded down. By its bits, which takes less than a conversion that heeds all other numbers.
#[expect(clippy::inline_always, reason = "it is compiled for the registers of the loop it stands in")]
#[inline(always)]
fn weight(of_one: f32) -> u64 {
    let bits = of_one.to_bits();
    let mantissa = u64::from(bits & 0x7f_ffff | 0x80_0000) << 40;
    mantissa.checked_shr(150_u32.wrapping_sub(bits >> 23)).unwrap_or(0)
}

/// `fraction` of `whole`, rounded down; `fraction` is times 2^64.
fn part_of(fraction: u64, whole: u64) -> u64 {
    ((u128::from(fraction) * u128::from(whole)) >> 64) as u64
}

/// A number that is larger for what is larger in the order of [`f32::total_cmp`].
#[expect(clippy::inline_always, reason = "it is compiled for the registers of the loop it stands in")]
#[inline(always)]
fn ordered(x: f32) -> u32 {
    let bits = x.to_bits();
    bits ^ ((bits.cast_signed() >> 31).cast_unsigned() | 1 << 31)
}
