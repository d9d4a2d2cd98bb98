//! Answers of a form: JSON of a schema, calls of tools, and what is refused. The bundled model knows neither JSON nor tools, so
//! what comes is what was enforced; schemas are bounded, so that it comes to an end.

use serde_json::{Value, json};
use sirocco_proto::channel;
use sirocco_proto::inference::InferenceServiceClient;
use sirocco_proto::tonic::Code;
use sirocco_proto::wire::inference as wire;
use sirocco_proto::wire::inference::generate_request::Constraint;

use super::client::{ask, cluster, post};
use crate::support::{Traced, generate, goldens, greedy};

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

/// A schema whose JSON is short.
fn person() -> Value {
    json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 10},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "colours": {"type": "array", "items": {"$ref": "#/$defs/colour"}, "minItems": 1, "maxItems": 3},
        },
        "required": ["name", "age", "colours"],
        "additionalProperties": false,
        "$defs": {"colour": {"enum": ["red", "grün", "🦀"]}},
    })
}

fn assert_person(value: &Value) {
    let keys: Vec<&String> = value.as_object().unwrap().keys().collect();
    assert_eq!(keys, ["name", "age", "colours"]);
    assert!(value["name"].as_str().unwrap().chars().count() <= 10);
    assert!(value["age"].as_u64().unwrap() <= 150);
    let colours = value["colours"].as_array().unwrap();
    assert!(
        (1..=3).contains(&colours.len())
            && colours.iter().all(|c| ["red", "grün", "🦀"].contains(&c.as_str().unwrap()))
    );
}

fn tools() -> Value {
    let tool = |name: &str, parameters: Value| json!({"type": "function", "function": {"name": name, "description": "d", "parameters": parameters}});
    json!([
        tool("save", person()),
        tool(
            "look",
            json!({"type": "object", "properties": {"where": {"enum": ["up", "down"]}}, "required": ["where"],
                            "additionalProperties": false})
        ),
    ])
}

/// A chat that is drawn at random.
fn chat(fields: &Value) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": "The kernel"}], "temperature": 1.5, "seed": 5,
                          "max_tokens": 600});
    body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    body
}

fn schema_format(schema: &Value) -> Value {
    json!({"type": "json_schema", "json_schema": {"name": "person", "strict": true, "schema": schema}})
}

#[test]
fn json_of_a_schema_comes_whole_streamed_and_from_both_endpoints() {
    let (_process, _, http) = cluster(&[]);
    let mut texts = Vec::new();
    for seed in 0..6 {
        let fields = json!({"response_format": schema_format(&person()), "seed": seed, "logit_bias": {"2": 100}});
        let whole = ask(&http, CHAT, &chat(&fields));
        let choice = &whole["choices"][0];
        let text = choice["message"]["content"].as_str().unwrap().to_owned();
        assert_eq!(choice["finish_reason"], "stop", "{text}");
        assert_person(&serde_json::from_str(&text).unwrap());
        let mut body = chat(&fields);
        body["stream"] = true.into();
        let pieces = post(&http, CHAT, &body).pieces();
        let streamed = pieces.iter().filter_map(|piece| piece["choices"][0]["delta"]["content"].as_str());
        assert_eq!(streamed.collect::<String>(), text);
        texts.push(text);
    }
    texts.dedup();
    assert!(texts.len() > 1, "the seed still decides");

    let format = schema_format(&json!({"enum": ["yes", "no"]}));
    let body = json!({"prompt": "x", "max_tokens": 40, "seed": 1, "n": 3, "response_format": format});
    let completion = ask(&http, COMPLETIONS, &body);
    for choice in completion["choices"].as_array().unwrap() {
        assert!(choice["text"] == "\"yes\"" || choice["text"] == "\"no\"", "{choice}");
        assert_eq!(choice["finish_reason"], "stop");
    }
    let cut = ask(&http, CHAT, &chat(&json!({"response_format": schema_format(&person()), "max_tokens": 4})));
    assert_eq!(cut["choices"][0]["finish_reason"], "length");
}

#[test]
fn any_object_begins_as_one() {
    let (_process, _, http) = cluster(&[]);
    let format = json!({"type": "json_object"});
    let answer = ask(&http, CHAT, &chat(&json!({"response_format": format, "logit_bias": {"95": 100}})));
    let choice = &answer["choices"][0];
    let text = choice["message"]["content"].as_str().unwrap();
    match serde_json::from_str::<Value>(text) {
        Ok(value) => assert!(value.is_object() && choice["finish_reason"] == "stop", "{text}"),
        Err(error) => assert!(error.is_eof() && text.starts_with('{') && choice["finish_reason"] == "length", "{text}"),
    }
}

/// The calls of a streamed answer put together, without their indices.
fn streamed_calls(pieces: &[Value]) -> Vec<Value> {
    let mut calls: Vec<Value> = Vec::new();
    for piece in
        pieces.iter().flat_map(|p| p["choices"][0]["delta"]["tool_calls"].as_array().cloned().unwrap_or_default())
    {
        let index = piece["index"].as_u64().unwrap() as usize;
        let arguments = piece["function"]["arguments"].as_str().unwrap();
        match calls.get_mut(index) {
            None => {
                assert_eq!((arguments, &piece["type"]), ("", &json!("function")));
                calls.push(json!({"id": piece["id"], "type": "function", "function": piece["function"]}));
            }
            Some(call) => {
                let so_far = call["function"]["arguments"].as_str().unwrap().to_owned();
                call["function"]["arguments"] = (so_far + arguments).into();
            }
        }
    }
    calls
}

/// Names and arguments of calls, which have ids of their own.
fn functions(calls: &[Value]) -> Vec<&Value> {
    assert!(calls.iter().all(|call| call["id"].as_str().is_some_and(|id| id.len() == 9)));
    calls.iter().map(|call| &call["function"]).collect()
}

#[test]
fn calls_of_tools_are_enforced_whole_and_streamed_alike() {
    let (_process, _, http) = cluster(&[]);
    let named = json!({"type": "function", "function": {"name": "look"}});
    let cases = [
        json!({"tools": tools(), "tool_choice": "required", "parallel_tool_calls": false}),
        json!({"tools": tools(), "tool_choice": "required", "parallel_tool_calls": false, "seed": 8, "stop": ["\""]}),
        json!({"tools": tools(), "tool_choice": named}),
    ];
    for fields in cases {
        let whole = ask(&http, CHAT, &chat(&fields));
        let choice = &whole["choices"][0];
        assert_eq!((&choice["finish_reason"], &choice["message"]["content"]), (&json!("tool_calls"), &Value::Null));
        let calls = choice["message"]["tool_calls"].as_array().unwrap();
        assert_eq!(calls.len(), 1);
        let arguments = serde_json::from_str(calls[0]["function"]["arguments"].as_str().unwrap()).unwrap();
        match calls[0]["function"]["name"].as_str().unwrap() {
            "save" => assert_person(&arguments),
            "look" => assert!(arguments == json!({"where": "up"}) || arguments == json!({"where": "down"})),
            other => panic!("{other}"),
        }
        let mut body = chat(&fields);
        body["stream"] = true.into();
        let pieces = post(&http, CHAT, &body).pieces();
        assert_eq!(functions(&streamed_calls(&pieces)), functions(calls));
        assert_eq!(pieces[0]["choices"][0]["delta"], json!({"role": "assistant", "content": null}));
        assert_eq!(pieces.last().unwrap()["choices"][0]["finish_reason"], "tool_calls");
    }
    // Many tokens for one of few letters: it is cut in the middle and says so.
    let cut = ask(&http, CHAT, &chat(&json!({"tools": tools(), "tool_choice": "required", "max_tokens": 22})));
    assert_eq!(cut["choices"][0]["finish_reason"], "length");
}

#[test]
fn under_auto_the_model_chooses_between_an_answer_and_calls() {
    let (_process, _, http) = cluster(&[]);
    // What each begins with, by the ids of the bundled model.
    let (bracket, brace) = ("61", "93");
    let answered = |first: &str| {
        let fields = json!({"tools": tools(), "response_format": schema_format(&person()), "parallel_tool_calls": false,
                            "logit_bias": {first: 100}});
        ask(&http, CHAT, &chat(&fields))["choices"][0].clone()
    };
    let called = answered(bracket);
    assert_eq!((&called["finish_reason"], &called["message"]["content"]), (&json!("tool_calls"), &Value::Null));
    assert_eq!(called["message"]["tool_calls"].as_array().unwrap().len(), 1);
    let said = answered(brace);
    assert_eq!((&said["finish_reason"], &said["message"]["tool_calls"]), (&json!("stop"), &Value::Null));
    assert_person(&serde_json::from_str(said["message"]["content"].as_str().unwrap()).unwrap());
}

#[test]
fn a_conversation_with_calls_goes_on() {
    let (_process, _, http) = cluster(&[]);
    let call = json!({"id": "abcdefghi", "type": "function", "function": {"name": "look", "arguments": "{\"where\": \"up\"}"}});
    let messages = json!([
        {"role": "user", "content": "Where"},
        {"role": "assistant", "content": null, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abcdefghi", "content": "the sky"},
    ]);
    let fields = json!({"temperature": 0, "max_tokens": 8, "return_token_ids": true});
    let mut body = chat(&fields);
    body["messages"] = messages;
    let plain = "<s>Where\n[TOOL_CALLS] [{\"name\": \"look\", \"arguments\": {\"where\": \"up\"}}]\n\
                 [TOOL_RESULTS] the sky[/TOOL_RESULTS]";
    let answer = ask(&http, CHAT, &body);
    let text = plain.strip_prefix("<s>").unwrap();
    let completion =
        ask(&http, COMPLETIONS, &json!({"prompt": text, "temperature": 0, "max_tokens": 8, "return_token_ids": true}));
    for field in ["prompt_token_ids", "token_ids"] {
        assert_eq!(answer["choices"][0][field], completion["choices"][0][field], "{field}");
    }
    // The model is told of tools, unless it must not call them.
    let told = ask(&http, CHAT, &chat(&json!({"tools": tools(), "max_tokens": 1})));
    let untold = ask(&http, CHAT, &chat(&json!({"max_tokens": 1})));
    assert!(told["usage"]["prompt_tokens"].as_u64() > Some(untold["usage"]["prompt_tokens"].as_u64().unwrap() + 50));
}

#[test]
fn other_answers_are_what_they_were_beside_constrained_ones() {
    let (_process, _, http) = cluster(&[]);
    let golden = &goldens()[2];
    std::thread::scope(|scope| {
        let constrained: Vec<_> = (0..4)
            .map(|seed| {
                let fields = json!({"tools": tools(), "tool_choice": "required", "seed": seed});
                let http = &http;
                scope.spawn(move || {
                    let answer = ask(http, CHAT, &chat(&fields));
                    answer["choices"][0]["message"]["tool_calls"].as_array().unwrap().len()
                })
            })
            .collect();
        for _ in 0..3 {
            let messages = json!([{"role": "user", "content": golden.prompt}]);
            let body = json!({"messages": messages, "temperature": 0, "max_tokens": golden.greedy_ids.len()});
            let plain = ask(&http, CHAT, &body);
            assert_eq!(plain["choices"][0]["message"]["content"], golden.greedy_text.as_str());
            let mut never = body.clone();
            never
                .as_object_mut()
                .unwrap()
                .extend(json!({"tools": tools(), "tool_choice": "none"}).as_object().unwrap().clone());
            assert_eq!(ask(&http, CHAT, &never)["choices"][0]["message"], plain["choices"][0]["message"]);
            let mut maybe = body;
            maybe.as_object_mut().unwrap().extend(json!({"tools": tools()}).as_object().unwrap().clone());
            let text = &ask(&http, CHAT, &maybe)["choices"][0];
            assert!(text["message"]["content"].is_string() && text["finish_reason"] == "length", "{text}");
        }
        assert!(constrained.into_iter().all(|calls| calls.join().unwrap() >= 1));
    });
}

fn constrained(constraint: Constraint) -> wire::GenerateRequest {
    let sampling = wire::SamplingParams { temperature: Some(1.5), seed: Some(3), ..Default::default() };
    wire::GenerateRequest { sampling: Some(sampling), constraint: Some(constraint), ..greedy("The", 300) }
}

#[tokio::test(flavor = "multi_thread")]
async fn grpc_constrains_too_and_goes_on_from_any_token() {
    let (_process, grpc, http) = cluster(&[]);
    let texts = [
        (Constraint::Regex("(ab|cd){3}".into()), "abcd"),
        (Constraint::Lark("start: \"x\" y\ny: /[yz]{2}/".into()), "xyz"),
    ];
    for (constraint, letters) in texts {
        let Traced { text, .. } = generate(&grpc, constrained(constraint)).await.unwrap();
        assert!(!text.is_empty() && text.chars().all(|c| letters.contains(c)), "{text}");
    }
    let request = constrained(Constraint::JsonSchema(person().to_string()));
    let whole = generate(&grpc, request.clone()).await.unwrap();
    assert_person(&serde_json::from_str(&whole.text).unwrap());
    for at in [1, whole.ids.len() / 2, whole.ids.len() - 1, whole.ids.len()] {
        let generated_token_ids = whole.ids[..at].to_vec();
        let rest = generate(&grpc, wire::GenerateRequest { generated_token_ids, ..request.clone() }).await.unwrap();
        assert_eq!(rest.ids, whole.ids[at..], "from {at}");
    }
    let format = schema_format(&person());
    let body = json!({"prompt": "The", "max_tokens": 300, "temperature": 1.5, "seed": 3, "response_format": format});
    assert_eq!(ask(&http, COMPLETIONS, &body)["choices"][0]["text"], whole.text.as_str());

    let mut client = InferenceServiceClient::new(channel::connect(&grpc).await.unwrap());
    let refused = [
        (constrained(Constraint::JsonSchema("{\"type\": 5}".into())), "json_schema: "),
        (constrained(Constraint::Regex("(".into())), "regex: "),
        (constrained(Constraint::Lark("start: nothing".into())), "lark: "),
        (wire::GenerateRequest { ignore_eos: true, ..request.clone() }, "ignore_eos: "),
        (wire::GenerateRequest { generated_token_ids: vec![5], ..request }, "generated_token_ids: "),
    ];
    for (request, part) in refused {
        let status = client.generate(request).await.err().unwrap();
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(status.message().starts_with(part), "{}", status.message());
    }
}

#[test]
fn what_cannot_be_enforced_is_refused_by_its_field() {
    let (_process, _, http) = cluster(&[]);
    let format = |schema: Value| json!({"response_format": schema_format(&schema)});
    let tool = |parameters: Value| json!({"tools": [tools()[1], {"type": "function", "function": {"name": "f", "strict": true, "parameters": parameters}}]});
    let schema = "response_format.json_schema.schema";
    let cases = [
        (format(json!({"type": "odd"})), schema, "odd"),
        (format(json!({"if": {}, "then": {}})), schema, "if"),
        (format(json!({"$ref": "http://127.0.0.1:1/x"})), schema, "127.0.0.1"),
        (format(json!({"enum": ["x".repeat(70_000)]})), schema, "at most 65536"),
        (tool(json!({"type": "object", "properties": {"a": {"type": "odd"}}})), "tools[1].function.parameters", "odd"),
        (
            json!({"tools": tools(), "tool_choice": {"type": "function", "function": {"name": "g"}}}),
            "tool_choice.function.name",
            "\"g\"",
        ),
        (json!({"tools": [tools()[0], tools()[0]]}), "tools[1].function.name", "another tool"),
        (json!({"tools": [{"type": "function", "function": {"name": "a b"}}]}), "tools[0].function.name", "64"),
    ];
    for (fields, param, part) in cases {
        let answer = post(&http, CHAT, &chat(&fields));
        let status = answer.status;
        let error = answer.json()["error"].clone();
        let message = error["message"].as_str().unwrap();
        assert_eq!((status, &error["param"]), (400, &json!(param)), "{message}");
        assert!(message.contains(part), "{message:?} does not say {part:?}");
    }
    let body = json!({"prompt": "x", "tools": tools()});
    assert_eq!(post(&http, COMPLETIONS, &body).json()["error"]["param"], "tools");
}
