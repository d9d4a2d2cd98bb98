//! How a request wants its completions drawn, checked as gRPC's are.

use std::collections::BTreeMap;

use serde_json::Value;
use sirocco_proto::Invalid;
use sirocco_types::SamplingParams;

use super::body::Fields;
use super::choice::Kind;
use super::problem::Problem;
use crate::policy::Policy;

/// Tokens of a completion when the request says nothing, as OpenAI documents it. A chat may then fill the context.
const COMPLETION_TOKENS: u32 = 16;

/// How choices are drawn.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Drawing {
    /// The same for all choices but for the seed.
    pub(super) params: SamplingParams,
    /// Whether the client chose the seed.
    pub(super) seeded: bool,
    /// Choices for each prompt.
    pub(super) n: usize,
}

impl Drawing {
    /// The parameters of choice `index` of all, `of_prompt` of its prompt.
    ///
    /// A client's seed is that of each prompt's first choice, so that a prompt gives the same alone and in a list; choice `i` of a
    /// prompt adds `i` times the golden ratio's 64 bits. A seed that was drawn here differs for all choices.
    pub(super) fn choice(&self, index: usize, of_prompt: usize) -> SamplingParams {
        const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
        let step = if self.seeded { of_prompt } else { index } as u64;
        SamplingParams { seed: self.params.seed.wrapping_add(step.wrapping_mul(GOLDEN)), ..self.params.clone() }
    }
}

/// Reads and checks everything about drawing in `fields`, but for the length of what is drawn by `policy`.
pub(super) fn drawing(kind: Kind, fields: &Fields, policy: &Policy) -> Result<Drawing, Problem> {
    let (n, choices) = (fields.n.unwrap_or(1) as usize, policy.max_choices);
    if n == 0 || n > choices as usize {
        return Err(Problem::invalid("n", format!("{n}, must be from 1 to {choices}")));
    }
    if fields.best_of.is_some_and(|best_of| best_of as usize != n) {
        return Err(Problem::invalid("best_of", format!("not supported unless it equals n, {n}")));
    }
    let default = SamplingParams::default();
    let default_tokens = policy.max_completion_tokens.map_or(COMPLETION_TOKENS, |most| most.min(COMPLETION_TOKENS));
    let (max_field, max_tokens) = match (fields.max_completion_tokens, kind) {
        (Some(most), _) => ("max_completion_tokens", most),
        (None, Kind::Completion) => ("max_tokens", fields.max_tokens.unwrap_or(default_tokens)),
        (None, Kind::Chat) => ("max_tokens", fields.max_tokens.unwrap_or(u32::MAX)),
    };
    let (logprobs_field, logprobs) = logprobs(kind, fields)?;
    let params = SamplingParams {
        repetition_penalty: fields.repetition_penalty.unwrap_or(default.repetition_penalty),
        frequency_penalty: fields.frequency_penalty.unwrap_or(default.frequency_penalty),
        presence_penalty: fields.presence_penalty.unwrap_or(default.presence_penalty),
        logit_bias: logit_bias(fields)?,
        temperature: fields.temperature.unwrap_or(default.temperature),
        top_k: top_k(fields)?,
        top_p: fields.top_p.unwrap_or(default.top_p),
        min_p: fields.min_p.unwrap_or(default.min_p),
        seed: seed(fields)?.unwrap_or_else(sirocco_process::incarnation),
        max_tokens,
        stop: stop(&fields.stop)?,
        ignore_eos: fields.ignore_eos.unwrap_or(default.ignore_eos),
        logprobs,
    };
    params.validate().map_err(|error| {
        let problem = Problem::from(Invalid::from(error));
        match problem.param.as_deref() {
            Some("max_tokens") => problem.blamed_on(max_field),
            Some("logprobs") => problem.blamed_on(logprobs_field),
            _ => problem,
        }
    })?;
    Ok(Drawing { params, seeded: fields.seed.is_some(), n })
}

/// How many alternatives to report, and the field that says so.
fn logprobs(kind: Kind, fields: &Fields) -> Result<(&'static str, Option<u32>), Problem> {
    let given = &fields.logprobs;
    match kind {
        Kind::Completion => match (given, given.as_u64()) {
            (Value::Null, _) => Ok(("logprobs", None)),
            (_, Some(_)) if fields.echo == Some(true) => {
                Err(Problem::invalid("logprobs", "not supported together with echo in this version"))
            }
            (_, Some(top)) => Ok(("logprobs", Some(u32::try_from(top).unwrap_or(u32::MAX)))),
            _ => Err(Problem::invalid("logprobs", format!("{given}, must be a number of alternatives"))),
        },
        Kind::Chat => match (given, fields.top_logprobs) {
            (Value::Bool(true), top) => Ok(("top_logprobs", Some(top.unwrap_or(0)))),
            (Value::Null | Value::Bool(false), None | Some(0)) => Ok(("top_logprobs", None)),
            (Value::Null | Value::Bool(false), Some(_)) => {
                Err(Problem::invalid("top_logprobs", "it needs logprobs to be true"))
            }
            _ => {
                Err(Problem::invalid("logprobs", format!("{given}, must be true or false; top_logprobs says how many")))
            }
        },
    }
}

/// Both 0 and -1 keep all: the latter is what some clients send.
fn top_k(fields: &Fields) -> Result<u32, Problem> {
    match fields.top_k.unwrap_or(0) {
        -1 => Ok(0),
        given => u32::try_from(given).map_err(|_| {
            Problem::invalid("top_k", format!("{given}, must be from -1 to {}; -1 and 0 keep all", u32::MAX))
        }),
    }
}

/// Any integer of 64 bits, negative ones by their bits.
fn seed(fields: &Fields) -> Result<Option<u64>, Problem> {
    let Some(given) = &fields.seed else { return Ok(None) };
    let seed = given.as_u64().or_else(|| given.as_i64().map(i64::cast_unsigned));
    seed.map(Some).ok_or_else(|| Problem::invalid("seed", format!("{given}, must be an integer of 64 bits")))
}

fn logit_bias(fields: &Fields) -> Result<BTreeMap<u32, f32>, Problem> {
    let given = fields.logit_bias.iter().flatten();
    let read = |(id, bias): (&String, &f32)| match id.parse() {
        Ok(id) => Ok((id, *bias)),
        Err(_) => Err(Problem::invalid("logit_bias", format!("{id:?} is no token id"))),
    };
    given.map(read).collect()
}

fn stop(given: &Value) -> Result<Vec<String>, Problem> {
    let text = |value: &Value, param: &str| match value {
        Value::String(text) => Ok(text.clone()),
        _ => Err(Problem::invalid(param, "must be a string or a list of strings")),
    };
    match given {
        Value::Null => Ok(Vec::new()),
        Value::Array(list) => list.iter().enumerate().map(|(i, stop)| text(stop, &format!("stop[{i}]"))).collect(),
        _ => Ok(vec![text(given, "stop")?]),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(kind: Kind, json: Value) -> Result<Drawing, Problem> {
        drawing(kind, &serde_json::from_value(json).unwrap(), &Policy::default())
    }

    #[test]
    fn every_field_reaches_the_sampler() {
        let fields = json!({
            "max_tokens": 5, "temperature": 0.5, "top_p": 0.25, "top_k": 7, "min_p": 0.125, "presence_penalty": 1.5,
            "frequency_penalty": -1.5, "repetition_penalty": 1.25, "logit_bias": {"9": -3.5}, "seed": -1, "n": 2, "best_of": 2,
            "stop": ["a", "b"], "ignore_eos": true, "logprobs": 3,
        });
        let params = SamplingParams {
            repetition_penalty: 1.25,
            frequency_penalty: -1.5,
            presence_penalty: 1.5,
            logit_bias: [(9, -3.5)].into(),
            temperature: 0.5,
            top_k: 7,
            top_p: 0.25,
            min_p: 0.125,
            seed: u64::MAX,
            max_tokens: 5,
            stop: vec!["a".into(), "b".into()],
            ignore_eos: true,
            logprobs: Some(3),
        };
        assert_eq!(read(Kind::Completion, fields), Ok(Drawing { params, seeded: true, n: 2 }));
    }

    #[test]
    fn what_is_absent_has_openais_default() {
        let (completion, chat) = (read(Kind::Completion, json!({})).unwrap(), read(Kind::Chat, json!({})).unwrap());
        assert_eq!((completion.params.max_tokens, chat.params.max_tokens), (16, u32::MAX));
        assert_eq!((completion.n, completion.seeded, completion.params.logprobs), (1, false, None));
        assert_eq!(read(Kind::Completion, json!({"top_k": -1})).unwrap().params.top_k, 0);
        let most = read(Kind::Chat, json!({"max_tokens": 3, "max_completion_tokens": 4})).unwrap().params.max_tokens;
        assert_eq!(most, 4);
        assert_eq!(read(Kind::Completion, json!({"stop": "x"})).unwrap().params.stop, ["x"]);
        assert_eq!(read(Kind::Chat, json!({"logprobs": true})).unwrap().params.logprobs, Some(0));
    }

    #[test]
    fn a_bad_field_is_named_as_the_client_wrote_it() {
        use Kind::{Chat, Completion};
        let cases = [
            (Completion, json!({"n": 0}), "n"),
            (Completion, json!({"n": 17}), "n"),
            (Completion, json!({"n": 2, "best_of": 3}), "best_of"),
            (Chat, json!({"temperature": 2.5}), "temperature"),
            (Chat, json!({"top_p": 0}), "top_p"),
            (Chat, json!({"top_k": -2}), "top_k"),
            (Chat, json!({"min_p": 2}), "min_p"),
            (Chat, json!({"presence_penalty": 3}), "presence_penalty"),
            (Chat, json!({"frequency_penalty": -3}), "frequency_penalty"),
            (Chat, json!({"repetition_penalty": 0}), "repetition_penalty"),
            (Chat, json!({"logit_bias": {"x": 1}}), "logit_bias"),
            (Chat, json!({"logit_bias": {"1": 101}}), "logit_bias"),
            (Chat, json!({"seed": 1.5}), "seed"),
            (Completion, json!({"max_tokens": 0}), "max_tokens"),
            (Chat, json!({"max_completion_tokens": 0}), "max_completion_tokens"),
            (Chat, json!({"stop": 5}), "stop"),
            (Chat, json!({"stop": ["a", 5]}), "stop[1]"),
            (Chat, json!({"stop": vec!["a"; 17]}), "stop"),
            (Completion, json!({"logprobs": 21}), "logprobs"),
            (Completion, json!({"logprobs": true}), "logprobs"),
            (Completion, json!({"logprobs": 1, "echo": true}), "logprobs"),
            (Chat, json!({"logprobs": 5}), "logprobs"),
            (Chat, json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs"),
            (Chat, json!({"top_logprobs": 2}), "top_logprobs"),
        ];
        for (kind, fields, param) in cases {
            let problem = read(kind, fields.clone()).unwrap_err();
            assert_eq!(problem.param.as_deref(), Some(param), "{fields}");
            assert!(problem.message.starts_with(&format!("{param}: ")), "{}", problem.message);
        }
    }

    #[test]
    fn choices_differ_and_a_prompt_gives_the_same_alone_and_in_a_list() {
        let seeded = read(Kind::Completion, json!({"seed": 7, "n": 2})).unwrap();
        assert_eq!(seeded.choice(0, 0).seed, 7);
        assert_eq!(seeded.choice(2, 0), seeded.choice(0, 0));
        assert_ne!(seeded.choice(1, 1).seed, 7);
        let drawn = read(Kind::Completion, json!({"n": 2})).unwrap();
        assert_ne!(drawn.choice(2, 0).seed, drawn.choice(0, 0).seed);
    }
}
