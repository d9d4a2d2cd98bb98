//! How a completion is drawn, within which limits, and what it reports.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The limits [`SamplingParams::validate`] enforces.
pub mod limits {
    /// Highest temperature.
    pub const TEMPERATURE: f32 = 2.0;
    /// Most stop strings.
    pub const STOP_STRINGS: usize = 16;
    /// Longest stop string, in bytes.
    pub const STOP_STRING_BYTES: usize = 256;
    /// Most alternatives reported per token.
    pub const TOP_LOGPROBS: usize = 20;
    /// Highest repetition penalty.
    pub const REPETITION_PENALTY: f32 = 10.0;
    /// Furthest presence and frequency penalties from 0.
    pub const OCCURRENCE_PENALTY: f32 = 2.0;
    /// Furthest bias of a token from 0.
    pub const LOGIT_BIAS: f32 = 100.0;
    /// Most tokens with a bias.
    pub const LOGIT_BIASES: usize = 1024;
}

/// How the next token is drawn. Applied in the order of the fields, as Hugging Face's generation does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SamplingParams {
    /// Divides the logits of tokens already in the sequence (multiplies negative ones); 1 changes nothing.
    pub repetition_penalty: f32,
    /// Subtracted from a token's logit for each time it was generated; 0 changes nothing.
    pub frequency_penalty: f32,
    /// Subtracted from the logits of tokens that were generated at least once; 0 changes nothing.
    pub presence_penalty: f32,
    /// Added to the logits of these tokens.
    pub logit_bias: BTreeMap<u32, f32>,
    /// 0 takes the most likely token; higher flattens the distribution.
    pub temperature: f32,
    /// Keep only the `top_k` most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set of most likely tokens whose probability reaches `top_p`; 1 keeps all.
    pub top_p: f32,
    /// Keep tokens at least `min_p` times as likely as the most likely one; 0 keeps all.
    pub min_p: f32,
    /// Fixes the draw: the same seed gives the same completion.
    pub seed: u64,
    /// Most tokens to generate.
    pub max_tokens: u32,
    /// The completion ends before the first of these.
    pub stop: Vec<String>,
    /// Do not end at the model's end-of-sequence token.
    pub ignore_eos: bool,
    /// Report the log probability of each token and of this many alternatives.
    pub logprobs: Option<u32>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            logit_bias: BTreeMap::new(),
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            seed: 0,
            max_tokens: 128,
            stop: Vec::new(),
            ignore_eos: false,
            logprobs: None,
        }
    }
}

/// A sampling parameter out of its range: `field`, its value and the limit.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field} is {value}, {limit}")]
pub struct SamplingParamsError {
    /// The parameter's name, as clients write it.
    pub field: &'static str,
    /// What was given.
    pub value: String,
    /// What is allowed.
    pub limit: String,
}

impl SamplingParams {
    /// Refuses values that have no meaning.
    pub fn validate(&self) -> Result<(), SamplingParamsError> {
        let within = |field, value: f32, low: f32, high: f32| {
            if (low..=high).contains(&value) {
                Ok(())
            } else {
                Err(SamplingParamsError {
                    field,
                    value: value.to_string(),
                    limit: format!("must be from {low} to {high}"),
                })
            }
        };
        let at_most = |field, value: usize, high: usize, unit: &str| {
            if value <= high {
                Ok(())
            } else {
                Err(SamplingParamsError {
                    field,
                    value: format!("{value}{unit}"),
                    limit: format!("must be at most {high}"),
                })
            }
        };
        within("temperature", self.temperature, 0.0, limits::TEMPERATURE)?;
        within("top_p", self.top_p, 0.0, 1.0)?;
        within("min_p", self.min_p, 0.0, 1.0)?;
        within("repetition_penalty", self.repetition_penalty, 0.01, limits::REPETITION_PENALTY)?;
        let furthest = limits::OCCURRENCE_PENALTY;
        within("frequency_penalty", self.frequency_penalty, -furthest, furthest)?;
        within("presence_penalty", self.presence_penalty, -furthest, furthest)?;
        at_most("logit_bias", self.logit_bias.len(), limits::LOGIT_BIASES, " tokens")?;
        for bias in self.logit_bias.values() {
            within("logit_bias", *bias, -limits::LOGIT_BIAS, limits::LOGIT_BIAS)?;
        }
        if self.top_p == 0.0 {
            return Err(SamplingParamsError { field: "top_p", value: "0".into(), limit: "must be above 0".into() });
        }
        if self.max_tokens == 0 {
            return Err(SamplingParamsError {
                field: "max_tokens",
                value: "0".into(),
                limit: "must be at least 1".into(),
            });
        }
        at_most("stop", self.stop.len(), limits::STOP_STRINGS, " strings")?;
        for stop in &self.stop {
            at_most("stop", stop.len(), limits::STOP_STRING_BYTES, " bytes long")?;
            if stop.is_empty() {
                return Err(SamplingParamsError {
                    field: "stop",
                    value: "\"\"".into(),
                    limit: "must not be empty".into(),
                });
            }
        }
        at_most("logprobs", self.logprobs.unwrap_or(0) as usize, limits::TOP_LOGPROBS, "")
    }
}

/// Why a completion ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FinishReason {
    /// An end-of-sequence token or a stop string.
    Stop,
    /// `max_tokens` or the model's context was reached.
    Length,
}

/// Tokens a request took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// In the prompt.
    pub prompt_tokens: u32,
    /// Of those, tokens that were still in the KV cache from earlier requests.
    pub cached_tokens: u32,
    /// Generated.
    pub completion_tokens: u32,
}

/// Where a request's time went, in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Timings {
    /// From arrival to the first step.
    pub queue_ms: f64,
    /// From arrival to the first token.
    pub first_token_ms: f64,
    /// From arrival to the end.
    pub total_ms: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absurd_values_are_refused_by_name() {
        type Change = fn(&mut SamplingParams);
        let cases: [(&str, Change); 16] = [
            ("temperature", |p| p.temperature = -1.0),
            ("temperature", |p| p.temperature = f32::NAN),
            ("temperature", |p| p.temperature = f32::INFINITY),
            ("top_p", |p| p.top_p = 0.0),
            ("top_p", |p| p.top_p = 1.5),
            ("min_p", |p| p.min_p = -0.1),
            ("repetition_penalty", |p| p.repetition_penalty = 0.0),
            ("frequency_penalty", |p| p.frequency_penalty = 2.1),
            ("presence_penalty", |p| p.presence_penalty = -2.1),
            ("presence_penalty", |p| p.presence_penalty = f32::NAN),
            ("logit_bias", |p| p.logit_bias = [(5, 101.0)].into()),
            ("logit_bias", |p| p.logit_bias = (0..1025).map(|id| (id, 1.0)).collect()),
            ("max_tokens", |p| p.max_tokens = 0),
            ("stop", |p| p.stop = vec![String::new()]),
            ("stop", |p| p.stop = vec!["x".into(); 17]),
            ("logprobs", |p| p.logprobs = Some(21)),
        ];
        assert_eq!(SamplingParams::default().validate(), Ok(()));
        for (field, change) in cases {
            let mut params = SamplingParams::default();
            change(&mut params);
            assert_eq!(params.validate().unwrap_err().field, field);
        }
    }
}
