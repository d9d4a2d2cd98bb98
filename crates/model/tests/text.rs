//! Text to tokens and back: the bundled model's tokenizer, whose tokens are bytes, and one of the kind of Mixtral 8x7B's, whose
//! words start with a space and whose rare characters fall back to a token a byte.

use std::path::{Path, PathBuf};

use proptest::prelude::*;
use serde_json::{Value, json};
use sirocco_model::{Checkpoint, Detokenizer, Tokenizer};
use sirocco_types::ModelSpec;

fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/demo")
}

fn spec() -> ModelSpec {
    Checkpoint::open(&demo()).unwrap().spec().clone()
}

/// A tokenizer from the text of a `tokenizer.json`.
fn tokenizer(json: &Value) -> Tokenizer {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), json.to_string()).unwrap();
    Tokenizer::load(dir.path(), &spec()).unwrap()
}

fn byte_level() -> Tokenizer {
    Tokenizer::load(&demo(), &spec()).unwrap()
}

fn byte_fallback() -> Tokenizer {
    let bytes = (0..=255_u8).map(|byte| format!("<0x{byte:02X}>"));
    let tokens = ["<unk>", "<s>", "</s>", "▁", "a", "b"].map(str::to_owned).into_iter().chain(bytes);
    let vocab: serde_json::Map<String, Value> = tokens.zip(0..).map(|(token, id)| (token, id.into())).collect();
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "special": true, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false})
    };
    tokenizer(&json!({
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
    }))
}

/// What each id gives, and what is left at the end.
fn streamed(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<String> {
    let mut detokenizer = Detokenizer::default();
    let mut pieces: Vec<String> = ids.iter().map(|id| detokenizer.push(*id, tokenizer)).collect();
    pieces.push(detokenizer.finish(tokenizer));
    pieces
}

#[test]
fn long_runs_of_characters_that_take_several_tokens_come_out_whole() {
    for tokenizer in [byte_level(), byte_fallback()] {
        for text in ["漢字假名交じり文の長い例です、いろはにほへと", "🦀🦀🦀🦀🦀🦀🦀🦀🦀🦀", "aé中🦀b é a  b"]
        {
            let ids = tokenizer.encode(text, false).unwrap();
            let pieces = streamed(&tokenizer, &ids);
            assert_eq!(pieces.concat(), text);
            assert!(!pieces.concat().contains(char::REPLACEMENT_CHARACTER));
        }
    }
}

#[test]
fn bytes_that_become_no_character_lose_nothing_around_them() {
    let tokenizer = byte_fallback();
    let byte = |value: u32| 6 + value;
    // The last character stays unfinished: first in the middle, then at the end.
    let ids = [[0xe4, 0xb8, 0xad, 0xe4].map(byte).as_slice(), &[4], &[byte(0xe4)]].concat();
    assert_eq!(streamed(&tokenizer, &ids), ["", "", "中", "", "\u{fffd}a", "", "\u{fffd}"]);
}

#[test]
fn special_tokens_show_nothing_however_many_there_are() {
    let tokenizer = byte_fallback();
    let ids = [[4].as_slice(), &[2; 500], &[3, 5]].concat();
    assert_eq!(streamed(&tokenizer, &ids).concat(), "a b");
}

#[test]
fn a_length_set_for_training_cuts_no_prompt() {
    let mut json: Value = serde_json::from_slice(&std::fs::read(demo().join("tokenizer.json")).unwrap()).unwrap();
    let text = "In the beginning God created the heaven and the earth";
    let whole = byte_level().encode(text, true).unwrap();
    json["truncation"] = json!({"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0});
    json["padding"] = json!({"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
                             "pad_type_id": 0, "pad_token": "<unk>"});
    assert_eq!(tokenizer(&json).encode(text, true).unwrap(), whole);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn streamed_text_is_the_decoding_of_all_ids(text in "[ab é中🦀\u{301}\n]{0,60}") {
        for tokenizer in [byte_level(), byte_fallback()] {
            let ids = tokenizer.encode(&text, true).unwrap();
            let pieces = streamed(&tokenizer, &ids);
            prop_assert_eq!(pieces.concat(), tokenizer.decode(&ids));
            prop_assert!(pieces.iter().all(|piece| !piece.contains(char::REPLACEMENT_CHARACTER)));
        }
    }

    #[test]
    fn any_ids_of_a_byte_level_tokenizer_stream_to_their_decoding(
        ids in proptest::collection::vec(0_u32..4096, 0..60),
    ) {
        let tokenizer = byte_level();
        prop_assert_eq!(streamed(&tokenizer, &ids).concat(), tokenizer.decode(&ids));
    }
}
