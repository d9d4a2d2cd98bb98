//! Text to tokens and back: the bundled model's tokenizer, whose tokens are bytes, and one of the kind of Mixtral 8x7B's, whose
//! words start with a space and whose rare characters fall back to a token a byte.

#[path = "support/tokenizers.rs"]
mod tokenizers;

use proptest::prelude::*;
use serde_json::{Value, json};
use sirocco_model::{Detokenizer, Tokenizer};

use tokenizers::{byte_fallback, byte_level, demo, tokenizer};

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

#[test]
fn a_tokenizer_without_end_is_not_read() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::File::create(folder.path().join("tokenizer.json")).unwrap().set_len(1 << 40).unwrap();
    let checkpoint = sirocco_model::Checkpoint::open(&demo()).unwrap();
    let error = Tokenizer::load(folder.path(), checkpoint.spec()).unwrap_err();
    assert_eq!(error.to_string(), "tokenizer.json: it is 1099511627776 bytes long, the limit is 268435456");
}
