//! What is answered: the same as over gRPC, whole and streamed, with everything that was asked for.

use serde_json::{Value, json};
use sirocco_proto::channel;
use sirocco_proto::inference::InferenceServiceClient;
use sirocco_proto::wire::inference as wire;

use super::client::{ask, cluster, post};
use crate::support::{generate, goldens, greedy};

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

/// A greedy completion with token ids.
fn body(prompt: &Value, max_tokens: usize) -> Value {
    json!({"model": "demo", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "return_token_ids": true})
}

fn with(mut body: Value, fields: &Value) -> Value {
    body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    body
}

/// The token ids in all pieces of choice `index`, and their text.
fn joined(pieces: &[Value], index: u64) -> (Vec<Value>, String) {
    let choices = pieces.iter().flat_map(|piece| piece["choices"].as_array().unwrap());
    let choices: Vec<_> = choices.filter(|choice| choice["index"] == index).collect();
    let ids = choices.iter().filter_map(|choice| choice["token_ids"].as_array()).flatten().cloned().collect();
    let text = |choice: &Value| -> String {
        choice["text"].as_str().or(choice["delta"]["content"].as_str()).unwrap_or_default().to_owned()
    };
    (ids, choices.into_iter().map(text).collect())
}

#[tokio::test(flavor = "multi_thread")]
async fn goldens_come_whole_streamed_and_over_grpc_alike() {
    let (_process, grpc, http) = cluster(&[]);
    for golden in &goldens()[2..5] {
        let count = golden.greedy_ids.len();
        let over_grpc = generate(&grpc, greedy(&golden.prompt, count as u32)).await.unwrap();
        assert_eq!((&over_grpc.ids, &over_grpc.text), (&golden.greedy_ids, &golden.greedy_text));
        let ids: Vec<Value> = golden.greedy_ids.iter().map(|id| json!(id)).collect();
        for prompt in [json!(golden.prompt), json!(golden.input_ids)] {
            let body = body(&prompt, count);
            let whole = ask(&http, COMPLETIONS, &body);
            assert_eq!(whole["choices"][0]["text"], golden.greedy_text.as_str());
            assert_eq!(whole["choices"][0]["token_ids"], json!(ids));
            assert_eq!(whole["choices"][0]["prompt_token_ids"], json!(golden.input_ids));
            assert_eq!(whole["choices"][0]["finish_reason"], "length");
            let (prompt_tokens, total) = (golden.input_ids.len(), golden.input_ids.len() + count);
            // All but the last token, from the request over gRPC.
            let details = json!({"cached_tokens": prompt_tokens - 1});
            let usage = json!({"prompt_tokens": prompt_tokens, "completion_tokens": count, "total_tokens": total,
                               "prompt_tokens_details": details});
            assert_eq!(whole["usage"], usage);
            let pieces = post(&http, COMPLETIONS, &with(body, &json!({"stream": true}))).pieces();
            assert_eq!(joined(&pieces, 0), (ids.clone(), golden.greedy_text.clone()));
        }
    }
    let sampling = wire::SamplingParams {
        seed: Some(7),
        presence_penalty: Some(0.5),
        frequency_penalty: Some(0.25),
        logit_bias: [(9, 1.5)].into(),
        ..Default::default()
    };
    let drawn = generate(&grpc, wire::GenerateRequest { sampling: Some(sampling), ..greedy("The", 24) }).await.unwrap();
    let fields = json!({"temperature": 1, "seed": 7, "presence_penalty": 0.5, "frequency_penalty": 0.25,
                        "logit_bias": {"9": 1.5}});
    let body = with(body(&json!("The"), 24), &fields);
    assert_eq!(ask(&http, COMPLETIONS, &body)["choices"][0]["token_ids"], json!(drawn.ids));
}

/// The bits of a log probability, which is an f32 written in decimal.
fn bits(value: &Value) -> Option<u32> {
    value.as_f64().map(|value| (value as f32).to_bits())
}

#[tokio::test(flavor = "multi_thread")]
async fn log_probabilities_are_those_of_grpc() {
    let (_process, grpc, http) = cluster(&[]);
    let prompt = &goldens()[0].prompt;
    let mut client = InferenceServiceClient::new(channel::connect(&grpc).await.unwrap());
    let request = wire::GenerateRequest { logprobs: Some(3), ..greedy(prompt, 8) };
    let mut events = client.generate(request).await.unwrap().into_inner();
    let mut tokens = Vec::new();
    while let Some(response) = events.message().await.unwrap() {
        if let Some(wire::generate_response::Event::Token(token)) = response.event {
            tokens.push(token);
        }
    }
    assert_eq!(tokens.len(), 8);

    let completion = ask(&http, COMPLETIONS, &with(body(&json!(prompt), 8), &json!({"logprobs": 3})));
    let logprobs = &completion["choices"][0]["logprobs"];
    let messages = json!([{"role": "user", "content": prompt}]);
    let chat = json!({"messages": messages, "max_tokens": 8, "temperature": 0, "logprobs": true, "top_logprobs": 3});
    let chat = ask(&http, CHAT, &chat);
    let content = &chat["choices"][0]["logprobs"]["content"];
    let mut offset = 0;
    for (index, token) in tokens.iter().enumerate() {
        assert_eq!(bits(&logprobs["token_logprobs"][index]), token.logprob.map(f32::to_bits));
        assert_eq!(logprobs["text_offset"][index], offset);
        assert_eq!(bits(&content[index]["logprob"]), token.logprob.map(f32::to_bits));
        assert_eq!(content[index]["top_logprobs"].as_array().unwrap().len(), 3);
        for (rank, top) in token.top_logprobs.iter().enumerate() {
            assert_eq!(bits(&logprobs["top_logprobs"][index][&top.text]), Some(top.logprob.to_bits()));
            let said = &content[index]["top_logprobs"][rank];
            assert_eq!((&said["token"], bits(&said["logprob"])), (&json!(top.text), Some(top.logprob.to_bits())));
        }
        offset += token.text.chars().count();
    }
}

#[test]
fn choices_and_prompts_come_in_order_each_as_if_alone() {
    let (_process, _, http) = cluster(&[]);
    let drawn = json!({"temperature": 1, "seed": 11, "n": 2});
    let list = ask(&http, COMPLETIONS, &with(body(&json!(["The", "Il nome"]), 12), &drawn));
    let choices = list["choices"].as_array().unwrap();
    assert_eq!(choices.iter().map(|c| c["index"].as_u64().unwrap()).collect::<Vec<_>>(), [0, 1, 2, 3]);
    assert_ne!(choices[0]["text"], choices[1]["text"]);
    for (prompt, own) in ["The", "Il nome"].into_iter().zip(choices.chunks(2)) {
        let alone = ask(&http, COMPLETIONS, &with(body(&json!(prompt), 12), &drawn));
        for (one, other) in own.iter().zip(alone["choices"].as_array().unwrap()) {
            assert_eq!((&one["text"], &one["token_ids"]), (&other["text"], &other["token_ids"]));
        }
        let first = ask(&http, COMPLETIONS, &with(body(&json!(prompt), 12), &json!({"temperature": 1, "seed": 11})));
        assert_eq!(first["choices"][0]["text"], own[0]["text"]);
    }
    assert_eq!(list["usage"]["completion_tokens"], 48);

    let streamed = json!({"stream": true, "stream_options": {"include_usage": true}});
    let mut pieces =
        post(&http, COMPLETIONS, &with(with(body(&json!(["The", "Il nome"]), 12), &drawn), &streamed)).pieces();
    let last = pieces.pop().unwrap();
    assert_eq!((&last["usage"], &last["choices"]), (&list["usage"], &json!([])));
    assert!(pieces.iter().all(|piece| piece["usage"].is_null() && piece["id"] == last["id"]));
    for (index, choice) in choices.iter().enumerate() {
        let (ids, text) = joined(&pieces, index as u64);
        assert_eq!((&json!(ids), &json!(text)), (&choice["token_ids"], &choice["text"]));
    }
}

#[test]
fn a_chat_is_the_completion_of_its_template() {
    let (_process, _, http) = cluster(&[]);
    let golden = &goldens()[4];
    let parts = json!([{"type": "text", "text": golden.prompt}]);
    let tokens = golden.greedy_ids.len();
    let body = json!({"model": "demo", "messages": [{"role": "user", "content": parts}], "max_completion_tokens": tokens,
                      "temperature": 0, "return_token_ids": true, "unknown": {"field": 1}, "user": "u"});
    let whole = ask(&http, CHAT, &body);
    let message = json!({"role": "assistant", "content": golden.greedy_text, "refusal": null});
    assert_eq!((&whole["choices"][0]["message"], &whole["object"]), (&message, &json!("chat.completion")));
    assert_eq!(whole["choices"][0]["prompt_token_ids"], json!(golden.input_ids));
    assert!(whole["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert!(whole["system_fingerprint"].as_str().unwrap().starts_with("fp_"));
    let pieces = post(&http, CHAT, &with(body, &json!({"stream": true}))).pieces();
    assert_eq!(pieces[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    assert_eq!(pieces.last().unwrap()["choices"][0]["finish_reason"], "length");
    assert_eq!(joined(&pieces, 0).1, golden.greedy_text);
}

#[test]
fn what_is_asked_for_changes_the_answer() {
    let (_process, _, http) = cluster(&[]);
    let golden = &goldens()[1];
    let completed = |fields: Value| ask(&http, COMPLETIONS, &with(body(&json!(golden.prompt), 24), &fields));
    let plain = completed(json!({}));
    let text = plain["choices"][0]["text"].as_str().unwrap();
    assert!(golden.greedy_text.starts_with(text));

    let stop = &text[text.len() / 2..text.len() / 2 + 3];
    let before = &text[..text.find(stop).unwrap()];
    for stop in [json!(stop), json!(["never said", stop])] {
        let stopped = completed(json!({"stop": stop}));
        let choice = &stopped["choices"][0];
        assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!(before), &json!("stop")));
    }
    let echoed = completed(json!({"echo": true}));
    assert_eq!(echoed["choices"][0]["text"], format!("{}{text}", golden.prompt));
    let echoed = json!({"prompt": golden.input_ids, "echo": true, "stream": true});
    let pieces = post(&http, COMPLETIONS, &with(body(&Value::Null, 24), &echoed)).pieces();
    assert_eq!(joined(&pieces, 0).1, format!("{}{text}", golden.prompt));

    let first = plain["choices"][0]["token_ids"][0].to_string();
    for fields in [
        json!({"logit_bias": {first: -100}}),
        json!({"presence_penalty": 2}),
        json!({"frequency_penalty": 2}),
        json!({"repetition_penalty": 2}),
        json!({"temperature": 2, "seed": 3}),
    ] {
        assert_ne!(completed(fields.clone())["choices"][0]["token_ids"], plain["choices"][0]["token_ids"], "{fields}");
    }
    for fields in [json!({"top_k": 1}), json!({"top_p": 0.000_001}), json!({"min_p": 1})] {
        let narrowed = completed(with(fields, &json!({"temperature": 1})));
        assert_eq!(narrowed["choices"][0]["text"], text);
    }
    let end = json!({"logit_bias": {"2": 100}});
    assert_eq!(completed(end.clone())["choices"][0]["finish_reason"], "stop");
    let goes_on = completed(with(end, &json!({"ignore_eos": true})));
    assert_eq!(
        (&goes_on["choices"][0]["finish_reason"], &goes_on["usage"]["completion_tokens"]),
        (&json!("length"), &json!(24))
    );
    let short = json!({"prompt": "x", "temperature": 0});
    assert_eq!(ask(&http, COMPLETIONS, &short)["usage"]["completion_tokens"], 16);
}
