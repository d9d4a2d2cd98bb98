//! Tokenizers to test with: the bundled model's, and small ones of the kind of Mixtral 8x7B's.
#![allow(dead_code, reason = "each test uses some of them")]

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use sirocco_model::{Checkpoint, Tokenizer};
use sirocco_types::ModelSpec;

pub(crate) fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/demo")
}

pub(crate) fn spec() -> ModelSpec {
    Checkpoint::open(&demo()).unwrap().spec().clone()
}

/// A tokenizer from the text of a `tokenizer.json`.
pub(crate) fn tokenizer(json: &Value) -> Tokenizer {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), json.to_string()).unwrap();
    Tokenizer::load(dir.path(), &spec()).unwrap()
}

pub(crate) fn byte_level() -> Tokenizer {
    Tokenizer::load(&demo(), &spec()).unwrap()
}

pub(crate) fn byte_fallback() -> Tokenizer {
    tokenizer(&byte_fallback_json())
}

/// As [`byte_fallback`], with a token for calls of tools, as Mistral's tokenizers have.
pub(crate) fn with_call_token() -> Tokenizer {
    let mut json = byte_fallback_json();
    json["model"]["vocab"]["[TOOL_CALLS]"] = 300.into();
    let marker = json!({"id": 300, "content": "[TOOL_CALLS]", "special": true, "single_word": false, "lstrip": false,
                        "rstrip": false, "normalized": false});
    json["added_tokens"].as_array_mut().unwrap().push(marker);
    tokenizer(&json)
}

fn byte_fallback_json() -> Value {
    let bytes = (0..=255_u8).map(|byte| format!("<0x{byte:02X}>"));
    let tokens = ["<unk>", "<s>", "</s>", "▁", "a", "b"].map(str::to_owned).into_iter().chain(bytes);
    let vocab: serde_json::Map<String, Value> = tokens.zip(0..).map(|(token, id)| (token, id.into())).collect();
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "special": true, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false})
    };
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ]},
        "pre_tokenizer": null,
        "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "vocab": vocab, "merges": []},
    })
}
