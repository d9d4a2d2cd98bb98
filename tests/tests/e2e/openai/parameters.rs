//! Every field of OpenAI's API that is read: it changes the answer as README.md says, or is refused by name. What the code reads,
//! what README.md lists and what is checked here are the same fields.

use std::collections::BTreeSet;

use serde_json::{Value, json};
use sirocco_testkit::repository;

use super::client::{cluster, post};
use crate::support::goldens;

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";
/// Tokens of an answer, as many as goldens have.
const TOKENS: usize = 48;

/// A field, and two requests that differ by it.
struct Case {
    field: &'static str,
    path: &'static str,
    without: Value,
    with: Value,
    /// Whether the answers to both, each with its `status`, differ as they should.
    effect: fn(&Value, &Value) -> bool,
}

/// A case of completions.
fn completion(field: &'static str, without: Value, with: Value, effect: fn(&Value, &Value) -> bool) -> Case {
    Case { field, path: COMPLETIONS, without, with, effect }
}

fn chat(field: &'static str, without: Value, with: Value, effect: fn(&Value, &Value) -> bool) -> Case {
    Case { field, path: CHAT, without, with, effect }
}

/// A field that is refused when it is `value`, by both endpoints.
fn refused(field: &'static str, value: &Value) -> [Case; 2] {
    [COMPLETIONS, CHAT].map(|path| Case {
        field,
        path,
        without: json!({}),
        with: json!({field: value}),
        effect: |before, after| before["status"] == 200 && after["status"] == 400,
    })
}

fn choice(answer: &Value) -> &Value {
    &answer["choices"][0]
}

fn text(answer: &Value) -> &str {
    choice(answer)["text"].as_str().or(choice(answer)["message"]["content"].as_str()).unwrap_or_default()
}

fn golden() -> String {
    goldens().swap_remove(0).greedy_text
}

fn another_text(before: &Value, after: &Value) -> bool {
    text(before) == golden() && after["status"] == 200 && text(after) != golden()
}

fn the_most_likely_text(before: &Value, after: &Value) -> bool {
    before["status"] == 200 && text(before) != golden() && text(after) == golden()
}

fn generated(answer: &Value) -> u64 {
    answer["usage"]["completion_tokens"].as_u64().unwrap_or_default()
}

fn schema() -> Value {
    json!({"type": "object", "properties": {"where": {"enum": ["up", "down"]}}, "required": ["where"],
           "additionalProperties": false})
}

fn tools() -> Value {
    json!([{"type": "function", "function": {"name": "look", "parameters": schema()}}])
}

fn calls(answer: &Value) -> usize {
    choice(answer)["message"]["tool_calls"].as_array().map_or(0, Vec::len)
}

/// What is drawn at random, but always the same.
fn drawn(fields: &Value) -> Value {
    with(json!({"temperature": 1.5, "seed": 5}), fields)
}

fn with(mut body: Value, fields: &Value) -> Value {
    body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    body
}

/// Fields that say what is drawn.
fn drawing() -> Vec<Case> {
    let first = goldens()[0].greedy_ids[0].to_string();
    let end = json!({"logit_bias": {"2": 100}});
    vec![
        completion("temperature", json!({"seed": 5}), json!({"seed": 5, "temperature": 1.5}), another_text),
        completion("top_p", drawn(&json!({})), drawn(&json!({"top_p": 1e-6})), the_most_likely_text),
        completion("top_k", drawn(&json!({})), drawn(&json!({"top_k": 1})), the_most_likely_text),
        completion("min_p", drawn(&json!({})), drawn(&json!({"min_p": 1})), the_most_likely_text),
        completion("presence_penalty", json!({}), json!({"presence_penalty": 2}), another_text),
        completion("frequency_penalty", json!({}), json!({"frequency_penalty": 2}), another_text),
        completion("repetition_penalty", json!({}), json!({"repetition_penalty": 5}), another_text),
        completion("logit_bias", json!({}), json!({"logit_bias": {first: -100}}), another_text),
        completion("seed", drawn(&json!({"seed": 6})), drawn(&json!({"seed": 7})), |before, after| {
            after["status"] == 200 && text(before) != text(after)
        }),
        completion("random_seed", drawn(&json!({})), json!({"temperature": 1.5, "random_seed": 5}), |before, after| {
            text(before) != golden() && text(before) == text(after)
        }),
        completion("n", json!({}), json!({"n": 2}), |before, after| {
            let count = |answer: &Value| answer["choices"].as_array().map(Vec::len);
            (count(before), count(after)) == (Some(1), Some(2))
        }),
        completion("max_tokens", json!({}), json!({"max_tokens": 3}), |before, after| {
            (generated(before), generated(after)) == (TOKENS as u64, 3) && golden().starts_with(text(after))
        }),
        chat("max_completion_tokens", json!({}), json!({"max_completion_tokens": 3}), |before, after| {
            (generated(before), generated(after)) == (TOKENS as u64, 3) && golden().starts_with(text(after))
        }),
        completion("stop", json!({}), json!({"stop": golden()[8..12]}), |before, after| {
            text(before) == golden() && text(after) == &golden()[..8] && choice(after)["finish_reason"] == "stop"
        }),
        completion("ignore_eos", end.clone(), with(end, &json!({"ignore_eos": true})), |before, after| {
            choice(before)["finish_reason"] == "stop" && choice(after)["finish_reason"] == "length"
        }),
        completion(
            "timeout",
            json!({}),
            json!({"timeout": 0.01, "max_tokens": 2000, "ignore_eos": true}),
            |_, after| after["status"] == 504 && after["error"]["code"] == "timeout",
        ),
    ]
}

/// Fields that say what is answered.
fn reporting() -> Vec<Case> {
    let streamed = json!({"stream": true});
    vec![
        completion("echo", json!({}), json!({"echo": true}), |before, after| {
            text(after).len() > text(before).len() && text(after).ends_with(text(before))
        }),
        completion("logprobs", json!({}), json!({"logprobs": 2}), |before, after| {
            let logprobs = &choice(after)["logprobs"];
            choice(before)["logprobs"].is_null() && logprobs["tokens"].as_array().map(Vec::len) == Some(TOKENS)
        }),
        chat("logprobs", json!({}), json!({"logprobs": true}), |before, after| {
            let logprobs = &choice(after)["logprobs"];
            choice(before)["logprobs"].is_null() && logprobs["content"].as_array().map(Vec::len) == Some(TOKENS)
        }),
        chat(
            "top_logprobs",
            json!({"logprobs": true}),
            json!({"logprobs": true, "top_logprobs": 3}),
            |before, after| {
                let top =
                    |answer: &Value| choice(answer)["logprobs"]["content"][0]["top_logprobs"].as_array().map(Vec::len);
                (top(before), top(after)) == (Some(0), Some(3))
            },
        ),
        completion("return_token_ids", json!({}), json!({"return_token_ids": true}), |before, after| {
            choice(before)["token_ids"].is_null() && choice(after)["token_ids"] == json!(goldens()[0].greedy_ids)
        }),
        completion("return_experts", json!({}), json!({"return_experts": true}), |before, after| {
            let experts = choice(after)["experts"].as_array().map(Vec::len);
            choice(before)["experts"].is_null() && experts == Some(TOKENS)
        }),
        completion("stream", json!({}), streamed.clone(), |before, after| {
            text(before) == golden() && after["pieces"].as_array().is_some_and(|pieces| pieces.len() > 10)
        }),
        completion(
            "stream_options",
            streamed.clone(),
            with(streamed, &json!({"stream_options": {"include_usage": true}})),
            |before, after| {
                let usage = |answer: &Value| answer["pieces"].as_array().unwrap().last().unwrap()["usage"].clone();
                usage(before).is_null() && usage(after)["completion_tokens"] == TOKENS
            },
        ),
    ]
}

/// Fields that say what is asked, and of which form the answer is.
fn asking() -> Vec<Case> {
    let format = json!({"type": "json_schema", "json_schema": {"name": "place", "strict": true, "schema": schema()}});
    let called = json!({"tools": tools(), "tool_choice": "required", "max_tokens": 200});
    let one = json!({"parallel_tool_calls": false});
    vec![
        completion("model", json!({"model": "demo"}), json!({"model": "gpt-9"}), |before, after| {
            before["status"] == 200 && after["status"] == 404 && after["error"]["param"] == "model"
        }),
        completion("prompt", json!({}), json!({"prompt": goldens()[1].prompt}), |before, after| {
            text(before) == golden() && text(after) == goldens()[1].greedy_text
        }),
        chat(
            "messages",
            json!({}),
            json!({"messages": [{"role": "user", "content": goldens()[1].prompt}]}),
            |before, after| text(before) == golden() && text(after) == goldens()[1].greedy_text,
        ),
        completion("response_format", json!({}), drawn(&json!({"response_format": format})), |before, after| {
            text(before) == golden() && ["{\"where\": \"up\"}", "{\"where\": \"down\"}"].contains(&text(after))
        }),
        chat("tools", json!({}), json!({"tools": tools()}), |before, after| {
            let told = |answer: &Value| answer["usage"]["prompt_tokens"].as_u64().unwrap();
            told(after) > told(before) + 20
        }),
        chat("tool_choice", json!({"tools": tools()}), drawn(&called), |before, after| {
            calls(before) == 0 && calls(after) > 0
        }),
        // A comma after a call begins another one.
        chat(
            "parallel_tool_calls",
            drawn(&with(called.clone(), &json!({"logit_bias": {"14": 100}}))),
            drawn(&with(with(called, &json!({"logit_bias": {"14": 100}})), &one)),
            |before, after| calls(before) > 1 && calls(after) == 1,
        ),
        completion("priority", json!({"priority": "low"}), json!({"priority": "urgent"}), |before, after| {
            text(before) == golden() && after["status"] == 400 && after["error"]["param"] == "priority"
        }),
    ]
}

fn cases() -> Vec<Case> {
    let refusals = [
        refused("functions", &json!([{"name": "f"}])),
        refused("function_call", &json!({"name": "f"})),
        refused("audio", &json!({"voice": "x"})),
        refused("suffix", &json!("x")),
        refused("safe_prompt", &json!(true)),
        refused("prompt_mode", &json!("reasoning")),
        refused("best_of", &json!(2)),
    ];
    drawing().into_iter().chain(reporting()).chain(asking()).chain(refusals.into_iter().flatten()).collect()
}

/// The answer, whatever it is, with its `status`; that of a stream as its `pieces`.
fn answer(http: &str, path: &str, fields: &Value) -> Value {
    let prompt = &goldens()[0].prompt;
    let base = match path {
        COMPLETIONS => json!({"prompt": prompt, "temperature": 0, "max_tokens": TOKENS}),
        _ => json!({"messages": [{"role": "user", "content": prompt}], "temperature": 0, "max_tokens": TOKENS}),
    };
    let mut body = with(base, fields);
    if fields.get("max_completion_tokens").is_some() {
        body.as_object_mut().unwrap().remove("max_tokens");
    }
    let answer = post(http, path, &body);
    let status = answer.status;
    let mut said =
        if status == 200 && body["stream"] == true { json!({"pieces": answer.pieces()}) } else { answer.json() };
    said["status"] = status.into();
    said
}

#[test]
fn every_field_changes_the_answer_or_is_refused_by_name() {
    let (_process, _, http) = cluster(&[]);
    for Case { field, path, without, with, effect } in cases() {
        let (before, after) = (answer(&http, path, &without), answer(&http, path, &with));
        assert!(effect(&before, &after), "{field}: {with} gives\n{after}\nand {without}\n{before}");
        if after["status"] == 400 {
            assert_eq!(after["error"]["param"], field, "{after}");
        }
    }
}

/// The names in backquotes in README.md's table, in the rows that list fields; what they may be stands in brackets.
fn documented() -> BTreeSet<String> {
    let readme = std::fs::read_to_string(repository("README.md")).unwrap();
    let mut fields = BTreeSet::new();
    for row in ["both take", "completions take", "chats take", "Mistral's clients also send", "refused by name"] {
        let start = format!("| {row} | ");
        let line = readme.lines().find_map(|line| line.strip_prefix(&start)).unwrap();
        let mut depth = 0;
        let outside: String = line
            .chars()
            .filter(|sign| {
                depth += i32::from(*sign == '(');
                let outside = depth == 0;
                depth -= i32::from(*sign == ')');
                outside
            })
            .collect();
        let names = outside.split('`').skip(1).step_by(2).filter_map(|name| name.split('.').next());
        fields.extend(names.map(str::to_owned));
    }
    fields
}

/// The fields that the code reads.
fn read() -> BTreeSet<String> {
    let source = std::fs::read_to_string(repository("router-node/src/openai/body.rs")).unwrap();
    let fields = source.split_once("struct Fields {").unwrap().1.split_once("\n}").unwrap().0;
    let names = fields.lines().filter(|line| !line.trim().starts_with("//")).filter_map(|line| line.split_once(": "));
    names.map(|(name, _)| name.trim().trim_start_matches("pub(super) ").to_owned()).collect()
}

#[test]
fn the_fields_that_are_read_documented_and_checked_are_the_same() {
    let checked: BTreeSet<String> = cases().into_iter().map(|case| case.field.to_owned()).collect();
    assert_eq!(checked, read());
    assert_eq!(checked, documented());
}
