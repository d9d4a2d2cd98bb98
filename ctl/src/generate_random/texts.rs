//! The files of a checkpoint that people can read: its configuration and a tokenizer of bytes.

use serde_json::{Map, Value, json};

use super::Args;

/// Special tokens, which come first.
const SPECIAL: [&str; 3] = ["<unk>", "<s>", "</s>"];

/// Tokens of the tokenizer: the special ones and a token for each byte.
pub(super) const TOKENS: u32 = SPECIAL.len() as u32 + 256;

/// Names and contents.
pub(super) fn files(args: &Args) -> [(&'static str, Value); 4] {
    [
        ("config.json", config(args)),
        ("generation_config.json", json!({"bos_token_id": 1, "eos_token_id": 2})),
        ("tokenizer.json", tokenizer()),
        (
            "tokenizer_config.json",
            json!({
                "tokenizer_class": "PreTrainedTokenizerFast",
                "unk_token": SPECIAL[0],
                "bos_token": SPECIAL[1],
                "eos_token": SPECIAL[2],
                "clean_up_tokenization_spaces": false,
                "chat_template": "{{ bos_token }}{% for message in messages %}{{ message['content'] }}\n{% endfor %}",
            }),
        ),
    ]
}

fn config(args: &Args) -> Value {
    let mut config = json!({
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_act": "silu",
        "hidden_size": args.hidden_size,
        "intermediate_size": args.intermediate_size,
        "num_hidden_layers": args.layers,
        "num_local_experts": args.experts,
        "num_experts_per_tok": args.top_k,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.kv_heads,
        "vocab_size": args.vocab_size,
        "max_position_embeddings": 32768,
        "sliding_window": null,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "initializer_range": 0.02,
        "attention_dropout": 0.0,
        "tie_word_embeddings": false,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
        "use_cache": true,
    });
    if let Some(head_dim) = args.head_dim {
        config["head_dim"] = head_dim.into();
    }
    config
}

/// A tokenizer without merges: each byte is a token, written as GPT-2's `bytes_to_unicode` does: visible ones stand for
/// themselves, the others are numbered from U+0100 on.
fn tokenizer() -> Value {
    let visible = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let mut others = '\u{100}'..;
    let bytes = (0..=255_u8).filter_map(|byte| if visible(&byte) { Some(byte.into()) } else { others.next() });
    let tokens = SPECIAL.map(str::to_owned).into_iter().chain(bytes.map(String::from));
    let vocab: Map<String, Value> = tokens.zip(0..).map(|(token, id): (_, u32)| (token, id.into())).collect();
    let added = SPECIAL.iter().zip(0..).map(|(content, id)| {
        json!({
            "id": id, "content": content, "special": true,
            "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
        })
    });
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let beginning = json!({"SpecialToken": {"id": SPECIAL[1], "type_id": 0}});
    let sequence = |id: &str| json!({"Sequence": {"id": id, "type_id": 0}});
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added.collect::<Vec<_>>(),
        "normalizer": null,
        "pre_tokenizer": byte_level,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [beginning, sequence("A")],
            "pair": [beginning, sequence("A"), sequence("B")],
            "special_tokens": {SPECIAL[1]: {"id": SPECIAL[1], "ids": [1], "tokens": [SPECIAL[1]]}},
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": SPECIAL[0], "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": [],
        },
    })
}
