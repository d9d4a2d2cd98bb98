//! `return_experts`: which experts each token went through, as gRPC traces it.

use serde_json::{Value, json};
use sirocco_proto::wire::inference as wire;

use super::client::{Answer, ask, cluster, post, send};
use crate::support::{generate, goldens, greedy};

const TOKENS: u32 = 12;

/// Of all choices in `answers`, the experts of every token.
fn experts(answers: &[Value]) -> Vec<Value> {
    let choices = answers.iter().flat_map(|answer| answer["choices"].as_array().unwrap());
    choices.filter_map(|choice| choice["experts"].as_array()).flatten().cloned().collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_tokens_experts_are_those_that_grpc_traces() {
    let (_process, grpc, http) = cluster(&[]);
    let golden = &goldens()[2];
    let trace = wire::Trace { routing: true, ..Default::default() };
    let request = wire::GenerateRequest { trace: Some(trace), ..greedy(&golden.prompt, TOKENS) };
    let traced = generate(&grpc, request).await.unwrap();
    let models = Answer::of(send(&http, "GET", "/v1/models", "", b"")).json()["data"][0]["experts"].clone();
    let (layers, top_k) = (models["layers"].as_u64().unwrap() as usize, models["per_token"].as_u64().unwrap() as usize);

    let body = json!({"prompt": golden.prompt, "max_tokens": TOKENS, "temperature": 0, "return_experts": true});
    let whole = experts(&[ask(&http, "/v1/completions", &body)]);
    let mut streamed = body.clone();
    streamed["stream"] = true.into();
    assert_eq!(experts(&post(&http, "/v1/completions", &streamed).pieces()), whole);
    let chat = json!({"messages": [{"role": "user", "content": golden.prompt}], "max_tokens": TOKENS, "temperature": 0,
                      "return_experts": true, "stream": true});
    assert_eq!(experts(&post(&http, "/v1/chat/completions", &chat).pieces()), whole, "the template adds nothing here");

    assert_eq!(whole.len(), TOKENS as usize);
    for (index, token) in whole.iter().enumerate() {
        assert_eq!(token["token_id"], traced.ids[index]);
        assert_eq!(token["layers"].as_array().unwrap().len(), layers);
        for (layer, said) in token["layers"].as_array().unwrap().iter().enumerate() {
            let (ids, weights) = (&traced.experts[index][layer], &traced.weights[index][layer]);
            let last = ids.len() - top_k;
            assert_eq!(said["ids"], json!(ids[last..]));
            let weights: Vec<f32> = weights[last..].iter().map(|bits| f32::from_bits(*bits)).collect();
            // What JSON says of a number of 32 bits is read back as the same one.
            assert_eq!(serde_json::from_value::<Vec<f32>>(said["weights"].clone()).unwrap(), weights);
        }
    }
    let text: String = whole.iter().map(|token| token["text"].as_str().unwrap()).collect();
    assert!(golden.greedy_text.starts_with(&text), "{text:?}");
    assert_eq!(
        experts(&[ask(&http, "/v1/completions", &json!({"prompt": "x", "max_tokens": 2}))]),
        Vec::<Value>::new()
    );
}
