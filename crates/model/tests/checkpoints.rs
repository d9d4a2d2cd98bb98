//! Checkpoints that cannot be served are refused with the file or tensor and what is wrong with it; those that can are read
//! by byte range.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, TensorView};
use safetensors::{SafeTensors, serialize_to_file};
use serde_json::Value;
use sirocco_compute::{ExpertWeights, Pool};
use sirocco_model::{Checkpoint, Tokenizer};
use sirocco_types::{ExpertDtype, ExpertId, ExpertKey, LayerId};
use tempfile::TempDir;

const WEIGHTS: &str = "model.safetensors";

fn tiny() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/families/mixtral")
}

/// A copy of a small checkpoint that a test may break.
fn copy() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for file in ["config.json", WEIGHTS] {
        std::fs::write(dir.path().join(file), std::fs::read(tiny().join(file)).unwrap()).unwrap();
    }
    dir
}

fn refusal(folder: &Path) -> String {
    Checkpoint::open(folder).map(|_| ()).unwrap_err().to_string()
}

fn with_config(change: impl FnOnce(&mut Value)) -> String {
    let dir = copy();
    let path = dir.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    change(&mut config);
    std::fs::write(&path, config.to_string()).unwrap();
    refusal(dir.path())
}

type Tensors<'a> = HashMap<String, TensorView<'a>>;

/// Rewrites the weights after `change`, split into two files when `sharded`.
fn with_tensors(dir: &Path, sharded: bool, change: impl FnOnce(&mut Tensors)) {
    let bytes = std::fs::read(dir.join(WEIGHTS)).unwrap();
    let mut tensors: Tensors = SafeTensors::deserialize(&bytes).unwrap().tensors().into_iter().collect();
    change(&mut tensors);
    if !sharded {
        return serialize_to_file(tensors, None, &dir.join(WEIGHTS)).unwrap();
    }
    std::fs::remove_file(dir.join(WEIGHTS)).unwrap();
    let (first, second): (Tensors, Tensors) = tensors.into_iter().partition(|(name, _)| name.contains("layers.0"));
    let mut map = serde_json::Map::new();
    for (file, tensors) in [("model-00001-of-00002.safetensors", first), ("model-00002-of-00002.safetensors", second)] {
        map.extend(tensors.keys().map(|name| (name.clone(), file.into())));
        serialize_to_file(tensors, None, &dir.join(file)).unwrap();
    }
    let index = serde_json::json!({ "weight_map": map });
    std::fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

fn assert_names(refusal: &str, parts: &[&str]) {
    for part in parts {
        assert!(refusal.contains(part), "{refusal:?} does not say {part:?}");
    }
}

#[test]
fn a_folder_that_is_none_is_refused() {
    assert_names(&refusal(Path::new("/nonexistent/model")), &["/nonexistent/model", "no such folder"]);
    assert_names(&refusal(&tiny().join(WEIGHTS)), &[WEIGHTS, "not a folder"]);
    let empty = tempfile::tempdir().unwrap();
    assert_names(&refusal(empty.path()), &["config.json"]);
}

#[test]
fn a_bad_configuration_names_the_key() {
    let cases: [(&str, Value, &str); 10] = [
        ("model_type", "llama".into(), "mixtral"),
        ("model_type", Value::Null, "absent"),
        ("hidden_size", 0.into(), "from 1"),
        ("num_attention_heads", 6.into(), "hidden_size, 64"),
        ("hidden_size", (-4).into(), "-4"),
        ("num_experts_per_tok", 9.into(), "from 1 to 8"),
        ("num_key_value_heads", 3.into(), "num_attention_heads"),
        ("vocab_size", Value::Null, "absent"),
        ("rms_norm_eps", "small".into(), "number"),
        ("rope_scaling", serde_json::json!({"type": "yarn"}), "yarn"),
    ];
    for (key, value, problem) in cases {
        assert_names(&with_config(|config| config[key] = value), &["config.json", key, problem]);
    }
    let dir = copy();
    std::fs::write(dir.path().join("config.json"), "{").unwrap();
    assert_names(&refusal(dir.path()), &["config.json"]);
}

#[test]
fn a_size_far_beyond_the_weights_names_the_first_tensor_it_asks_too_much_of() {
    let cases = [
        ("num_hidden_layers", 1024, "model.layers.2."),
        ("num_local_experts", 4096, "model.layers.0.block_sparse_moe.gate.weight"),
        ("vocab_size", 1 << 24, "model.embed_tokens.weight"),
        ("head_dim", 4096, "model.layers.0.self_attn.q_proj.weight"),
    ];
    for (key, limit, tensor) in cases {
        assert_names(&with_config(|config| config[key] = limit.into()), &[tensor]);
        let beyond = with_config(|config| config[key] = (limit + 2).into());
        assert_names(&beyond, &["config.json", key, &format!("from 1 to {limit}")]);
    }
}

#[test]
fn a_file_of_settings_without_end_is_not_read_to_its_end() {
    for file in ["config.json", "model.safetensors.index.json"] {
        let dir = copy();
        if file != "config.json" {
            std::fs::remove_file(dir.path().join(WEIGHTS)).unwrap();
        }
        std::fs::File::create(dir.path().join(file)).unwrap().set_len(1 << 40).unwrap();
        assert_names(&refusal(dir.path()), &[file, "longer than 67108864 bytes"]);
    }
}

#[test]
fn configurations_of_older_and_newer_transformers_mean_the_same() {
    let spec = |change: &dyn Fn(&mut Value), generation: Option<Value>| {
        let dir = copy();
        let path = dir.path().join("config.json");
        let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        change(&mut config);
        std::fs::write(&path, config.to_string()).unwrap();
        if let Some(generation) = generation {
            std::fs::write(dir.path().join("generation_config.json"), generation.to_string()).unwrap();
        }
        Checkpoint::open(dir.path()).unwrap().spec().clone()
    };
    let plain = spec(&|_| (), None);
    assert_eq!((plain.rope_theta, plain.eos_token_ids.as_slice()), (1e6, [2].as_slice()));
    let newer = |config: &mut Value| {
        config.as_object_mut().unwrap().remove("rope_theta");
        config["rope_parameters"] = serde_json::json!({"rope_type": "default", "rope_theta": 5e5});
        config["eos_token_id"] = serde_json::json!([2, 7]);
    };
    let newer = spec(&newer, None);
    assert_eq!((newer.rope_theta, newer.eos_token_ids.as_slice()), (5e5, [2, 7].as_slice()));
    let unsaid = spec(&|config| drop(config.as_object_mut().unwrap().remove("rope_theta")), None);
    assert_eq!(unsaid, plain, "transformers' own default for Mixtral");
    let generation = serde_json::json!({"eos_token_id": [9, 2]});
    assert_eq!(spec(&|_| (), Some(generation)).eos_token_ids, [9, 2]);
}

#[test]
fn broken_weights_name_the_file() {
    let dir = copy();
    std::fs::remove_file(dir.path().join(WEIGHTS)).unwrap();
    assert_names(&refusal(dir.path()), &[WEIGHTS, "No such file"]);
    let whole = std::fs::read(tiny().join(WEIGHTS)).unwrap();
    let cases: [(&[u8], &str); 4] = [
        (&whole[..whole.len() - 1], "truncated"),
        (&whole[..5], "too short"),
        (&whole[..400], "header claims"),
        (&[&[16, 0, 0, 0, 0, 0, 0, 0][..], &[b'x'; 32]].concat(), "does not parse"),
    ];
    for (bytes, problem) in cases {
        std::fs::write(dir.path().join(WEIGHTS), bytes).unwrap();
        assert_names(&refusal(dir.path()), &[WEIGHTS, problem]);
    }
}

#[test]
fn a_header_that_contradicts_itself_is_refused() {
    let tensor = |shape: u64, start: u64, end: u64| serde_json::json!({"dtype": "U8", "shape": [shape], "data_offsets": [start, end]});
    // Sixteen tensors that end at the last address there is.
    let vast = (0..16_u64).map(|i| {
        let (start, size) = (i << 60, (1 << 60) - u64::from(i == 15));
        (format!("t{i}"), tensor(size, start, start + size))
    });
    let cases = [
        (serde_json::json!({"a": tensor(4, 0, 4), "b": tensor(4, 2, 6)}), "does not parse"),
        (serde_json::json!({"a": tensor(4, 4, 0)}), "does not parse"),
        (serde_json::json!({"a": tensor(5, 0, 4)}), "does not parse"),
        (vast.collect::<serde_json::Map<_, _>>().into(), "truncated"),
    ];
    let dir = copy();
    for (header, problem) in cases {
        let header = header.to_string();
        let bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &[0; 64]].concat();
        std::fs::write(dir.path().join(WEIGHTS), bytes).unwrap();
        assert_names(&refusal(dir.path()), &[WEIGHTS, problem]);
    }
}

#[test]
fn a_tensor_that_is_absent_or_of_another_kind_is_named() {
    static ZEROS: [u8; 64 * 96 * 4] = [0; 64 * 96 * 4];
    let name = "model.layers.1.block_sparse_moe.experts.3.w2.weight";
    let dir = copy();
    with_tensors(dir.path(), false, |tensors| drop(tensors.remove(name)));
    assert_names(&refusal(dir.path()), &[name, "no such tensor"]);

    let cases = [(Dtype::F32, vec![64, 96], "F32, must be BF16"), (Dtype::BF16, vec![96, 64], "[64, 96]")];
    for (dtype, shape, problem) in cases {
        let dir = copy();
        let data = &ZEROS[..64 * 96 * dtype.bitsize() / 8];
        with_tensors(dir.path(), false, |tensors| {
            tensors.insert(name.into(), TensorView::new(dtype, shape, data).unwrap());
        });
        assert_names(&refusal(dir.path()), &[name, problem]);
    }
}

#[test]
fn a_file_cut_after_opening_is_an_error_that_names_tensor_and_file() {
    let dir = copy();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    std::fs::OpenOptions::new().write(true).open(dir.path().join(WEIGHTS)).unwrap().set_len(60_000).unwrap();
    let errors: Vec<String> = checkpoint
        .spec()
        .experts()
        .filter_map(|key| checkpoint.load_expert(key, ExpertDtype::Bf16).err().map(|error| error.to_string()))
        .collect();
    assert!(!errors.is_empty());
    for error in errors {
        assert_names(&error, &["experts.", WEIGHTS]);
    }
}

#[test]
fn a_tokenizer_that_is_missing_or_too_large_is_refused() {
    let checkpoint = Checkpoint::open(&tiny()).unwrap();
    let missing = Tokenizer::load(&tiny(), checkpoint.spec()).unwrap_err().to_string();
    assert_names(&missing, &["tokenizer.json", "no such file"]);
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/demo");
    let mismatch = Tokenizer::load(&demo, checkpoint.spec()).unwrap_err().to_string();
    assert_names(&mismatch, &["vocabulary mismatch", "4095", "256"]);
}

/// What an expert makes of a row that lets every weight count.
fn answer(expert: &ExpertWeights, checkpoint: &Checkpoint) -> Vec<f32> {
    let x: Vec<f32> = (0..checkpoint.spec().hidden_size).map(|i| (i as f32 * 0.7).sin() + 1.5).collect();
    expert.forward(&x, &Pool::new(1).unwrap())
}

#[test]
fn a_sharded_checkpoint_holds_the_same_weights() {
    let dir = copy();
    with_tensors(dir.path(), true, |_| ());
    let (sharded, single) = (Checkpoint::open(dir.path()).unwrap(), Checkpoint::open(&tiny()).unwrap());
    for key in single.spec().experts() {
        let (a, b) =
            (sharded.load_expert(key, ExpertDtype::Bf16).unwrap(), single.load_expert(key, ExpertDtype::Bf16).unwrap());
        assert!(answer(&a, &single) == answer(&b, &single), "{key}");
    }
    std::fs::remove_file(dir.path().join("model-00002-of-00002.safetensors")).unwrap();
    assert_names(&refusal(dir.path()), &["model-00002-of-00002.safetensors"]);
}

#[test]
fn an_index_cannot_point_out_of_the_folder() {
    let dir = copy();
    std::fs::remove_file(dir.path().join(WEIGHTS)).unwrap();
    let index = r#"{"weight_map":{"lm_head.weight":"../secret.safetensors"}}"#;
    std::fs::write(dir.path().join("model.safetensors.index.json"), index).unwrap();
    assert_names(&refusal(dir.path()), &["../secret.safetensors", "weight_map"]);
}

/// Overwrites everything in the data section that is neither `key`'s nor part of a gate.
fn poison_all_but(dir: &Path, key: ExpertKey) {
    let path = dir.join(WEIGHTS);
    let mut bytes = std::fs::read(&path).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let tensors: Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    let mine = format!("layers.{}.block_sparse_moe.experts.{}.", key.layer, key.expert);
    for (name, tensor) in tensors.as_object().unwrap() {
        if name == "__metadata__" || name.contains(&mine) || name.contains("gate") {
            continue;
        }
        let offset = |i: usize| 8 + header + tensor["data_offsets"][i].as_u64().unwrap() as usize;
        bytes[offset(0)..offset(1)].fill(0xff);
    }
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn an_expert_is_read_from_its_own_bytes_alone_and_takes_no_more_memory() {
    let clean = Checkpoint::open(&tiny()).unwrap();
    let key = ExpertKey { layer: LayerId(1), expert: ExpertId(5) };
    let dir = copy();
    poison_all_but(dir.path(), key);
    let poisoned = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(poisoned.identity().fingerprint, clean.identity().fingerprint);

    let (a, b) =
        (clean.load_expert(key, ExpertDtype::Bf16).unwrap(), poisoned.load_expert(key, ExpertDtype::Bf16).unwrap());
    assert!(answer(&a, &clean).iter().all(|value| value.is_finite()));
    assert_eq!(answer(&a, &clean), answer(&b, &clean));
    let other = poisoned.load_expert(ExpertKey { expert: ExpertId(4), ..key }, ExpertDtype::Bf16).unwrap();
    assert!(answer(&other, &clean).iter().all(|value| value.is_nan()), "the poison is real");

    let (memory, stored) = (b.bytes() as u64, clean.spec().expert_bytes());
    assert!(memory >= stored && memory * 100 < stored * 105, "{memory} bytes of memory for {stored} of weights");
}

#[test]
fn another_checkpoint_of_the_same_shape_has_another_fingerprint() {
    static GATE: [u8; 8 * 64 * 2] = [0x3f; 8 * 64 * 2];
    let dir = copy();
    let before = Checkpoint::open(dir.path()).unwrap().identity().fingerprint;
    with_tensors(dir.path(), false, |tensors| {
        let name = "model.layers.0.block_sparse_moe.gate.weight";
        tensors.insert(name.into(), TensorView::new(Dtype::BF16, vec![8, 64], &GATE).unwrap());
    });
    assert_ne!(Checkpoint::open(dir.path()).unwrap().identity().fingerprint, before);
}
