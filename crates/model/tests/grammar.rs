//! Completions under a grammar, drawn at random with the bundled model's tokenizer and one of the kind of Mixtral 8x7B's.

#[path = "support/tokenizers.rs"]
mod tokenizers;

use std::time::{Duration, Instant};

use proptest::prelude::*;
use serde_json::{Value, json};
use sirocco_model::{Constraint, ConstraintError, Grammars, Marker, SampleError, SampledToken, Sampler, Tokenizer};
use sirocco_types::{Calls, Grammar, JsonSchema, Otherwise, SamplingParams, Tool};

use tokenizers::{byte_fallback, byte_level, spec, with_call_token};

const EOS: u32 = 2;

fn grammars(tokenizer: &Tokenizer) -> Grammars {
    Grammars::new(tokenizer, &spec()).unwrap()
}

fn schema(schema: &Value) -> Grammar {
    Grammar::Json(JsonSchema { text: schema.to_string(), strict: true })
}

fn start(grammar: &Grammar) -> (Tokenizer, Constraint) {
    let tokenizer = byte_level();
    let constraint = grammars(&tokenizer).compile(grammar).unwrap();
    (tokenizer, constraint)
}

/// The ids that may come next.
fn allowed(constraint: &mut Constraint) -> Vec<u32> {
    let mask = constraint.mask().unwrap();
    (0..spec().vocab_size as u32).filter(|id| mask.contains(*id)).collect()
}

/// Logits that look random, and differ from place to place.
fn noise(seed: u64, index: u32) -> Vec<f32> {
    let mix = |id: u64| {
        let z = (seed ^ (id << 20) ^ u64::from(index)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let z = (z ^ (z >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        ((z >> 40) as f32 / (1_u64 << 24) as f32) * 8.0 - 4.0
    };
    (0..spec().vocab_size as u64).map(mix).collect()
}

fn sample(sampler: &mut Sampler, index: u32, logits: &[f32]) -> Result<SampledToken, SampleError> {
    let draw = sampler.prepare(index)?;
    sampler.take(index, sirocco_compute::sample(&mut logits.to_vec(), &draw))
}

/// A random completion under `grammar`: its text, and whether it came to its end.
fn drawn(tokenizer: &Tokenizer, constraint: Constraint, seed: u64, most: u32) -> (String, bool) {
    let params = SamplingParams { temperature: 2.0, seed, ..SamplingParams::default() };
    let mut sampler = Sampler::new(params, spec().vocab_size, &[1]).within(Some(constraint));
    let mut ids = Vec::new();
    for index in 0..most {
        let token = sample(&mut sampler, index, &noise(seed, index)).unwrap();
        if token.id != EOS {
            ids.push(token.id);
        }
        if sampler.is_finished() {
            return (tokenizer.decode(&ids), true);
        }
        assert_ne!(token.id, EOS, "the end of the sequence is the end of the grammar");
    }
    (tokenizer.decode(&ids), false)
}

/// Schemas whose JSON is bounded.
fn schemas() -> Vec<Value> {
    let name = json!({"type": "string", "maxLength": 12});
    vec![
        json!({"type": "object", "properties": {
                   "name": name, "age": {"type": "integer", "minimum": 0, "maximum": 150},
                   "address": {"type": "object", "properties": {"city": name, "lines": {"type": "array", "items": name, "maxItems": 2}},
                               "required": ["city", "lines"], "additionalProperties": false}},
               "required": ["name", "age", "address"], "additionalProperties": false}),
        json!({"enum": ["red", "grün", "🦀", 7, null, {"a": [1, 2]}]}),
        json!({"type": "array", "items": {"type": "number", "minimum": -1, "maximum": 1, "multipleOf": 0.25}, "minItems": 2, "maxItems": 5}),
        json!({"type": "string", "pattern": "^[a-zé]{2,4}-[0-9]{3}$"}),
        json!({"anyOf": [{"type": "boolean"}, {"type": "string", "format": "date"},
                         {"type": "object", "properties": {"k": {"const": "é"}}, "required": ["k"], "additionalProperties": false}]}),
        json!({"$defs": {"node": {"type": "object", "properties": {"v": {"type": "integer", "minimum": -9, "maximum": 9},
                                  "next": {"anyOf": [{"$ref": "#/$defs/leaf"}, {"type": "null"}]}},
                                  "required": ["v", "next"], "additionalProperties": false},
                         "leaf": {"type": "object", "properties": {"漢字": name}, "required": ["漢字"], "additionalProperties": false}},
               "$ref": "#/$defs/node"}),
        json!({"type": "object", "properties": {"a": {"type": "boolean"}, "b": {"type": "null"}}, "additionalProperties": false}),
    ]
}

#[test]
fn a_mask_allows_exactly_what_the_grammar_allows() {
    let (tokenizer, mut constraint) = start(&Grammar::Regex("a(bc|b)?".into()));
    let texts = |ids: Vec<u32>| ids.into_iter().map(|id| tokenizer.token_text(id)).collect::<Vec<_>>();
    let first = allowed(&mut constraint);
    let every: Vec<u32> =
        (3..4096).filter(|id| ["a", "ab", "abc"].contains(&tokenizer.token_text(*id).as_str())).collect();
    assert_eq!(first, every);
    let id = |text: &str| tokenizer.encode(text, false).unwrap()[0];
    constraint.commit(id("a")).unwrap();
    assert!(!constraint.is_finished(), "it may end here or go on");
    let next = texts(allowed(&mut constraint));
    assert!(next.contains(&"</s>".to_owned()) && next.contains(&"b".to_owned()), "{next:?}");
    assert!(next.iter().all(|text| ["</s>", "b", "bc"].contains(&text.as_str())), "{next:?}");
    let mut ended = constraint.clone();
    ended.commit(EOS).unwrap();
    assert!(ended.is_finished());
    constraint.take_in(&[id("b"), id("c")]).unwrap();
    assert!(constraint.is_finished(), "nothing more is allowed");
    assert_eq!(allowed(&mut constraint), [EOS]);
}

#[test]
fn the_end_of_the_sequence_and_special_tokens_stay_out_until_the_grammar_may_end() {
    for grammar in
        [schema(&json!({"type": "integer"})), Grammar::Json(JsonSchema::object()), Grammar::Regex(".+".into())]
    {
        let (_, mut constraint) = start(&grammar);
        let first = allowed(&mut constraint);
        assert!(first.iter().all(|id| *id > EOS), "{grammar:?}");
    }
}

#[test]
fn a_bias_cannot_undo_a_mask() {
    for temperature in [0.0, 1.0] {
        let (tokenizer, constraint) = start(&schema(&json!({"enum": ["yes", "no"]})));
        let logit_bias = (0..1000).map(|id| (id + 1000, 100.0)).chain([(EOS, 100.0)]).collect();
        let params = SamplingParams { temperature, logit_bias, top_k: 3, top_p: 0.5, min_p: 0.9, ..Default::default() };
        let mut sampler = Sampler::new(params, 4096, &[]).within(Some(constraint));
        let (mut ids, mut index) = (Vec::new(), 0);
        loop {
            let token = sample(&mut sampler, index, &noise(3, index)).unwrap();
            ids.push(token.id);
            index += 1;
            if sampler.is_finished() {
                break;
            }
        }
        let text = tokenizer.decode(&ids);
        assert!(["\"yes\"", "\"no\""].contains(&text.as_str()), "{text}");
    }
}

#[test]
fn log_probabilities_are_those_without_the_constraint() {
    let (_, constraint) = start(&schema(&json!({"enum": ["yes"]})));
    let params = SamplingParams { logprobs: Some(5), seed: 3, ..SamplingParams::default() };
    let logits = noise(9, 0);
    let free = sample(&mut Sampler::new(params.clone(), 4096, &[]), 0, &logits).unwrap();
    let bound = sample(&mut Sampler::new(params, 4096, &[]).within(Some(constraint)), 0, &logits).unwrap();
    assert_eq!(free.top_logprobs, bound.top_logprobs);
}

#[test]
fn a_sequence_goes_on_from_the_tokens_it_has() {
    let schema = schema(&schemas()[0]);
    let (tokenizer, whole) = start(&schema);
    let ids = tokenizer.encode(r#"{"name": "é", "age": 7"#, false).unwrap();
    let (mut step, mut at_once) = (whole.clone(), whole);
    for id in &ids {
        step.mask().unwrap();
        step.commit(*id).unwrap();
    }
    at_once.take_in(&ids).unwrap();
    assert_eq!(allowed(&mut step), allowed(&mut at_once));
    let wrong = tokenizer.encode("{\"age", false).unwrap();
    let (_, mut constraint) = start(&schema);
    let error = constraint.take_in(&wrong).unwrap_err();
    assert!(matches!(error, ConstraintError::NotAllowed { .. }), "{error}");
}

#[test]
fn clones_go_their_own_ways_and_do_not_feel_each_other() {
    let grammar = schema(&schemas()[0]);
    let (tokenizer, constraint) = start(&grammar);
    let alone: Vec<_> = (0..4).map(|seed| drawn(&tokenizer, start(&grammar).1, seed, 200)).collect();
    let mut samplers: Vec<_> = (0..4)
        .map(|seed| {
            let params = SamplingParams { temperature: 2.0, seed, ..SamplingParams::default() };
            (Sampler::new(params, 4096, &[1]).within(Some(constraint.clone())), Vec::new(), false)
        })
        .collect();
    for index in 0..200 {
        for (seed, (sampler, ids, ended)) in samplers.iter_mut().enumerate().filter(|(_, (_, _, ended))| !ended) {
            let token = sample(sampler, index, &noise(seed as u64, index)).unwrap();
            ids.push(token.id);
            *ended = sampler.is_finished();
        }
    }
    for ((_, ids, ended), alone) in samplers.iter().zip(&alone) {
        assert_eq!((tokenizer.decode(ids), *ended), *alone);
    }
}

#[test]
fn calls_are_the_documented_form_and_nothing_else() {
    let tool = |name: &str, arguments: Value| Tool {
        name: name.into(),
        arguments: JsonSchema { text: arguments.to_string(), strict: true },
    };
    let tools = vec![
        tool(
            "get_weather",
            json!({"$defs": {"c": {"enum": ["Rome", "Åre"]}}, "type": "object", "required": ["city"],
                                   "properties": {"city": {"$ref": "#/$defs/c"}}, "additionalProperties": false}),
        ),
        tool("stop-it", json!({"type": "object", "properties": {}, "additionalProperties": false})),
    ];
    let tokenizer = byte_level();
    let grammars = grammars(&tokenizer);
    let fits = |calls: &Calls, text: &str| {
        let mut constraint = grammars.compile(&Grammar::Calls(calls.clone())).unwrap();
        let ids = tokenizer.encode(text, false).unwrap();
        constraint.take_in(&ids).is_ok() && constraint.mask().unwrap().contains(EOS)
    };
    let one = r#"[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Åre"}}]"#;
    let two = r#"[TOOL_CALLS] [{"name": "stop-it", "arguments": {}}, {"name": "get_weather", "arguments": {"city": "Rome"}}]"#;
    let texts = ["hello", "[TOOL_CALLS] what", "[TOOL", "a [TOOL_CALLS] [", " [TOOL_CALLS] x", "{\"a\": 1}"];
    let forced = Calls { tools, several: true, otherwise: Otherwise::Nothing };
    assert!(fits(&forced, one) && fits(&forced, two));
    assert!(texts.iter().all(|text| !fits(&forced, text)));
    let single = Calls { several: false, ..forced.clone() };
    assert!(fits(&single, one) && !fits(&single, two));
    let auto = Calls { otherwise: Otherwise::Text, ..forced.clone() };
    assert!(fits(&auto, one) && fits(&auto, two) && fits(&auto, &format!("\n {one}")));
    assert_eq!(texts.map(|text| fits(&auto, text)), [true, false, true, true, false, true]);
    let json = JsonSchema { text: r#"{"type": "object"}"#.into(), strict: true };
    let or_json = Calls { otherwise: Otherwise::Json(json), ..forced.clone() };
    assert!(fits(&or_json, one));
    assert_eq!(texts.map(|text| fits(&or_json, text)), [false, false, false, false, false, true]);
    let wrong = r#"[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Oslo"}}]"#;
    assert!(![&forced, &auto, &or_json].into_iter().any(|calls| fits(calls, wrong)));
}

#[test]
fn a_checkpoint_with_a_token_for_calls_begins_them_with_it() {
    let tokenizer = with_call_token();
    let grammars = grammars(&tokenizer);
    let Marker::Token(marker) = Marker::of(&tokenizer) else { panic!("it has the token") };
    let arguments = JsonSchema { text: r#"{"type": "object"}"#.into(), strict: true };
    let tools = vec![Tool { name: "f".into(), arguments }];
    let forced = Calls { tools, several: false, otherwise: Otherwise::Nothing };
    let compile = |calls: &Calls| grammars.compile(&Grammar::Calls(calls.clone())).unwrap();
    let mut constraint = compile(&forced);
    assert_eq!(allowed(&mut constraint), [marker]);
    constraint.commit(marker).unwrap();
    let (text, ended) = drawn(&tokenizer, constraint, 1, 400);
    let calls: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
    assert!(ended && calls[0]["name"] == "f" && calls[0]["arguments"].is_object());
    let mut auto = compile(&Calls { otherwise: Otherwise::Text, ..forced });
    let first = allowed(&mut auto);
    assert!(first.contains(&marker) && first.contains(&EOS) && first.len() > 170);
}

#[test]
fn what_is_no_grammar_is_refused_with_the_reason() {
    let text = |text: &str| Grammar::Json(JsonSchema { text: text.into(), strict: true });
    let deep = (0..70).fold(json!({"type": "null"}), |inner, _| json!({"type": "array", "items": inner}));
    let cases: Vec<(Grammar, &str)> = vec![
        (text("{"), "not JSON"),
        (text("[]"), "must be an object"),
        (schema(&json!({"type": "strin"})), "strin"),
        (schema(&json!({"type": "object", "uniqueItems": true, "if": {}})), "if"),
        (schema(&json!({"$ref": "#/$defs/none"})), "none"),
        (schema(&json!({"$ref": "http://127.0.0.1:9/schema"})), "127.0.0.1"),
        (schema(&json!({"type": "integer", "minimum": 3, "maximum": 2})), "minimum"),
        (schema(&deep), "nested more than 64"),
        (schema(&json!({"type": "string", "pattern": "("})), "("),
        (Grammar::Regex("[".into()), "["),
        (Grammar::Lark("start: nothing".into()), "nothing"),
        (Grammar::Regex("a".repeat((16 << 10) + 1)), "16384"),
    ];
    let grammars = grammars(&byte_level());
    for (grammar, part) in cases {
        let error = grammars.compile(&grammar).unwrap_err();
        assert!(error.reason.contains(part) && error.reason.len() < 1000, "{grammar:?}: {error}");
        assert!(!error.reason.contains("backtrace") && !error.reason.contains("x-guidance"), "{error}");
    }
    let bad = JsonSchema { text: r#"{"type": "object", "properties": {"a": {"type": "odd"}}}"#.into(), strict: true };
    let good = JsonSchema::object();
    let tools = [good, bad].map(|arguments| Tool { name: "f".into(), arguments }).to_vec();
    let error =
        grammars.compile(&Grammar::Calls(Calls { tools, several: true, otherwise: Otherwise::Text })).unwrap_err();
    assert_eq!(error.tool, Some(1));
}

#[test]
fn a_schema_that_is_not_strict_may_say_more_than_can_be_kept() {
    let (tokenizer, constraint) = start(&Grammar::Json(JsonSchema {
        text: json!({"type": "array", "items": {"enum": [1]}, "uniqueItems": true, "maxItems": 2}).to_string(),
        strict: false,
    }));
    let (text, ended) = drawn(&tokenizer, constraint, 1, 100);
    assert!(ended && serde_json::from_str::<Vec<u8>>(&text).is_ok(), "{text}");
}

/// Definitions that each consist of the next one.
fn definitions(count: usize) -> Value {
    let link = |i: usize| (format!("d{i}"), json!({"allOf": [{"$ref": format!("#/$defs/d{}", i + 1)}]}));
    let last = (format!("d{count}"), json!({"type": "null"}));
    (0..count).map(link).chain([last]).collect::<serde_json::Map<_, _>>().into()
}

/// Rules that each consist of `head` and the next one.
fn rules(count: usize, name: &str, head: &str) -> String {
    let links = (0..count).map(|i| format!("{name}{i}: {head}{name}{}\n", i + 1));
    format!("start: {name}0\n{}{name}{count}: \"a\"", links.collect::<String>())
}

#[test]
fn hostile_grammars_are_refused_or_followed_in_bounded_time() {
    let branches: Vec<Value> = (0..12).map(|i| json!({"properties": {"a": {"minLength": i}}})).collect();
    let crossed: Vec<Value> = (0..12).map(|_| json!({"anyOf": branches})).collect();
    let cases = [
        schema(&json!({"type": "array", "items": {"type": "string"}, "minItems": 1_000_000_000})),
        schema(&json!({"type": "array", "items": {"type": "integer"}, "minItems": 100_000})),
        schema(&json!({"type": "string", "maxLength": 1_000_000_000, "minLength": 1_000_000})),
        schema(&json!({"type": "string", "pattern": "^((a{1,500}){1,500}){1,500}$"})),
        schema(&json!({"allOf": crossed})),
        schema(&json!({"type": "object", "minProperties": 1_000_000})),
        Grammar::Regex("(a|b)*a(a|b){500}".into()),
        Grammar::Regex("(a{1,999}){1,999}".into()),
        Grammar::Regex(".*a.{40}b.{40}c.*".into()),
        Grammar::Lark("start: start start | \"a\" | \"\"".into()),
        Grammar::Lark(format!("start: {}", "(".repeat(16_000))),
        Grammar::Lark(rules(1200, "T", "")),
        Grammar::Lark(rules(1200, "t", "")),
        Grammar::Lark(rules(900, "t", "\"a\" ")),
        Grammar::Regex("(".repeat(8000) + &")".repeat(8000)),
        Grammar::Regex("(a?b)*".repeat(2600)),
        schema(&json!({"$ref": "#/$defs/d0", "$defs": definitions(1400)})),
        schema(&json!({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}})),
        schema(&json!({"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}, {"type": "object"}]}}})),
    ];
    let tokenizer = byte_level();
    let grammars = grammars(&tokenizer);
    for grammar in cases {
        let begun = Instant::now();
        if let Ok(mut constraint) = grammars.compile(&grammar) {
            for index in 0..64 {
                let Ok(mask) = constraint.mask() else { break };
                let best =
                    (0..4096).filter(|id| mask.contains(*id)).max_by_key(|id| (id * 7919 + index) % 4096).unwrap();
                if constraint.commit(best).is_err() || constraint.is_finished() {
                    break;
                }
            }
        }
        assert!(begun.elapsed() < Duration::from_secs(20), "{grammar:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn random_completions_are_valid_json_of_their_schema(seed: u64, which in 0_usize..7, fallback: bool) {
        let schema_json = &schemas()[which];
        let tokenizer = if fallback { byte_fallback() } else { byte_level() };
        let constraint = grammars(&tokenizer).compile(&schema(schema_json)).unwrap();
        let (text, ended) = drawn(&tokenizer, constraint, seed, 2000);
        prop_assert!(ended, "{}", text);
        let value: Value = serde_json::from_str(&text).map_err(|error| TestCaseError::fail(format!("{error}: {text}")))?;
        prop_assert!(jsonschema::is_valid(schema_json, &value), "{}", text);
        if which == 2 {
            // Both sides of the multiples are exact in binary.
            prop_assert!(value.as_array().unwrap().iter().all(|x| (x.as_f64().unwrap() * 4.0).fract() == 0.0));
        }
    }
}
