//! What is refused: with which status, blaming which field, in which words.

use serde_json::{Value, json};

use super::client::{Answer, cluster, post, send};

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

/// Checks that `answer` is an error in OpenAI's shape.
fn check(answer: Answer, status: u16, param: Option<&str>, part: &str) {
    let given = answer.status;
    assert!(answer.header("x-request-id").is_some());
    let body = answer.json();
    let error = &body["error"];
    let message = error["message"].as_str().unwrap();
    assert_eq!((given, &error["param"]), (status, &json!(param)), "{message}");
    assert!(message.contains(part), "{message:?} does not say {part:?}");
    assert_eq!(error["type"], "invalid_request_error");
}

#[test]
fn every_refusal_names_the_field_and_the_limit() {
    let (_process, _, http) = cluster(&[]);
    let long = "word ".repeat(3000);
    let message = |content: &Value| json!([{"role": "user", "content": content}]);
    let cases: Vec<(&str, Value, &str, &str)> = vec![
        (COMPLETIONS, json!({}), "prompt", "absent"),
        (COMPLETIONS, json!({"prompt": ""}), "prompt", "at least 1"),
        (COMPLETIONS, json!({"prompt": []}), "prompt", "empty"),
        (COMPLETIONS, json!({"prompt": [5, 4096]}), "prompt", "4096"),
        (COMPLETIONS, json!({"prompt": ["a", [1, 9999]]}), "prompt[1]", "9999"),
        (COMPLETIONS, json!({"prompt": long}), "prompt", "2048"),
        (COMPLETIONS, json!({"prompt": vec!["x"; 17]}), "prompt", "16 choices"),
        (COMPLETIONS, json!({"prompt": ["x", "y"], "n": 9}), "prompt", "16 choices"),
        (COMPLETIONS, json!({"prompt": "x", "n": 17}), "n", "from 1 to 16"),
        (COMPLETIONS, json!({"prompt": "x", "best_of": 2}), "best_of", "equals n"),
        (COMPLETIONS, json!({"prompt": "x", "max_tokens": 0}), "max_tokens", "at least 1"),
        (COMPLETIONS, json!({"prompt": "x", "temperature": 3}), "temperature", "from 0 to 2"),
        (COMPLETIONS, json!({"prompt": "x", "temperature": "hot"}), "temperature", "invalid type"),
        (COMPLETIONS, json!({"prompt": "x", "top_p": 1.5}), "top_p", "from 0 to 1"),
        (COMPLETIONS, json!({"prompt": "x", "presence_penalty": 3}), "presence_penalty", "from -2 to 2"),
        (COMPLETIONS, json!({"prompt": "x", "frequency_penalty": -3}), "frequency_penalty", "from -2 to 2"),
        (COMPLETIONS, json!({"prompt": "x", "logit_bias": {"4096": 1}}), "logit_bias", "4096"),
        (COMPLETIONS, json!({"prompt": "x", "logit_bias": {"1": 200}}), "logit_bias", "from -100 to 100"),
        (COMPLETIONS, json!({"prompt": "x", "stop": vec!["a"; 17]}), "stop", "at most 16"),
        (COMPLETIONS, json!({"prompt": "x", "stop": "a".repeat(257)}), "stop", "at most 256"),
        (COMPLETIONS, json!({"prompt": "x", "logprobs": 21}), "logprobs", "at most 20"),
        (COMPLETIONS, json!({"prompt": "x", "logprobs": 1, "echo": true}), "logprobs", "echo"),
        (COMPLETIONS, json!({"prompt": "x", "suffix": "y"}), "suffix", "not supported"),
        (COMPLETIONS, json!({"prompt": "x", "stream_options": {}}), "stream_options", "stream"),
        (CHAT, json!({}), "messages", "absent"),
        (CHAT, json!({"messages": message(&json!(5))}), "messages[0].content", "text parts"),
        (
            CHAT,
            json!({"messages": message(&json!([{"type": "image_url"}]))}),
            "messages[0].content[0].type",
            "image_url",
        ),
        (CHAT, json!({"messages": [{"role": "function", "content": "x"}]}), "messages[0].role", "function"),
        (CHAT, json!({"messages": message(&json!(long))}), "messages", "2048"),
        (CHAT, json!({"messages": message(&json!("x")), "top_logprobs": 2}), "top_logprobs", "logprobs"),
        (
            CHAT,
            json!({"messages": message(&json!("x")), "max_completion_tokens": 0}),
            "max_completion_tokens",
            "at least 1",
        ),
        (CHAT, json!({"messages": message(&json!("x")), "functions": [{}]}), "functions", "not supported"),
        (CHAT, json!({"messages": message(&json!("x")), "audio": {}}), "audio", "not supported"),
    ];
    for (path, body, param, part) in cases {
        check(post(&http, path, &body), 400, Some(param), part);
    }
    for path in [COMPLETIONS, CHAT] {
        check(post(&http, path, &json!({"model": "gpt-9"})), 404, Some("model"), "gpt-9");
        let raw = |body: &[u8]| Answer::of(send(&http, "POST", path, "", body));
        check(raw(b"{\"prompt\": \"x\",\n oops}"), 400, None, "line 2 column");
        check(raw(&vec![b' '; (4 << 20) + 1]), 413, None, "4194304");
        check(Answer::of(send(&http, "GET", path, "", b"")), 405, None, "GET");
    }
    check(post(&http, "/v1/embeddings", &json!({})), 404, None, "/v1/embeddings");
}

#[test]
fn the_model_is_listed_and_request_ids_are_returned() {
    let (_process, _, http) = cluster(&[]);
    let get = |path: &str, headers: &str| Answer::of(send(&http, "GET", path, headers, b""));
    let list = get("/v1/models", "").json();
    let model = &list["data"][0];
    assert_eq!((&list["object"], &model["id"], &model["object"]), (&json!("list"), &json!("demo"), &json!("model")));
    assert_eq!(get("/v1/models/demo", "").json(), *model);
    check(get("/v1/models/some/other", ""), 404, Some("model"), "some/other");
    assert_eq!(get("/v1/models", "x-request-id: mine-1\r\n").header("x-request-id"), Some("mine-1"));
    let long = format!("x-request-id: {}\r\n", "x".repeat(129));
    for unusable in ["", "x-request-id: a b\r\n", long.as_str()] {
        let answer = get("/v1/models", unusable);
        assert!(answer.header("x-request-id").is_some_and(|id| !id.contains(' ') && id.len() < 60), "{unusable}");
    }
}

#[test]
fn a_model_without_a_chat_template_refuses_chats_and_says_what_to_use() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("plain");
    std::fs::create_dir(&model).unwrap();
    for entry in std::fs::read_dir(sirocco_testkit::repository("models/demo")).unwrap() {
        let path = entry.unwrap().path();
        if !path.ends_with("tokenizer_config.json") {
            std::fs::copy(&path, model.join(path.file_name().unwrap())).unwrap();
        }
    }
    let (_process, _, http) = cluster(&["--model", model.to_str().unwrap()]);
    let body = json!({"messages": [{"role": "user", "content": "x"}]});
    check(post(&http, CHAT, &body), 400, Some("messages"), "plain has no chat template; /v1/completions");
    assert_eq!(post(&http, COMPLETIONS, &json!({"prompt": "x"})).status, 200);
}
