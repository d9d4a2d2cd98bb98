//! `config.json` and `generation_config.json` of a checkpoint folder.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use serde_json::Value;
use sirocco_types::{Dtype, ModelSpec};

use crate::CheckpointError;

/// The families this reads.
const SUPPORTED: [&str; 1] = ["mixtral"];

/// Longest file of settings or index that is read; the index of a model with 100,000 tensors has 10 MB.
const MAX_JSON_BYTES: u64 = 64 << 20;

/// What transformers takes for a Mixtral that does not say.
const DEFAULT_ROPE_THETA: f32 = 1e6;

/// Reads and checks the model's shape from `config.json` and `generation_config.json` in `folder`. Weights need not be there.
///
/// Errors: `Read`, `Config`.
pub fn read_spec(folder: &Path) -> Result<ModelSpec, CheckpointError> {
    let config = Config { file: "config.json", value: read_json(folder, "config.json")? };
    let model_type = config.value["model_type"].as_str().ok_or_else(|| config.bad("model_type", "absent"))?;
    if !SUPPORTED.contains(&model_type) {
        return Err(config.bad("model_type", format!("{model_type:?}, must be one of: {}", SUPPORTED.join(", "))));
    }
    if let Some(activation) = config.value["hidden_act"].as_str()
        && activation != "silu"
    {
        return Err(config.bad("hidden_act", format!("{activation:?}, must be \"silu\"")));
    }
    let hidden_size = config.size("hidden_size")?;
    let num_attention_heads = config.size("num_attention_heads")?;
    let spec = ModelSpec {
        model_type: model_type.to_owned(),
        hidden_size,
        intermediate_size: config.size("intermediate_size")?,
        num_hidden_layers: config.size("num_hidden_layers")?,
        num_local_experts: config.size("num_local_experts")?,
        num_experts_per_tok: config.size("num_experts_per_tok")?,
        num_attention_heads,
        num_key_value_heads: config.optional_size("num_key_value_heads")?.unwrap_or(num_attention_heads),
        head_dim: config.head_dim(hidden_size, num_attention_heads)?,
        vocab_size: config.size("vocab_size")?,
        max_position_embeddings: config.size("max_position_embeddings")?,
        sliding_window: config.optional_size("sliding_window")?,
        rms_norm_eps: config.number("rms_norm_eps", &config.value["rms_norm_eps"])?,
        rope_theta: config.rope_theta()?,
        tie_word_embeddings: config.value["tie_word_embeddings"].as_bool().unwrap_or(false),
        bos_token_id: config.tokens("bos_token_id")?.first().copied(),
        eos_token_ids: eos_token_ids(folder, &config)?,
        dtype: Dtype::Bf16,
    };
    check(&config, &spec)?;
    Ok(spec)
}

/// Reads a JSON file of the folder.
pub(crate) fn read_json(folder: &Path, file: &'static str) -> Result<Value, CheckpointError> {
    let unreadable = |error| CheckpointError::Read { file: file.into(), error };
    let bad = |problem| CheckpointError::Config { file, key: "the file".into(), problem };
    let mut text = Vec::new();
    let opened = File::open(folder.join(file)).map_err(unreadable)?;
    opened.take(MAX_JSON_BYTES + 1).read_to_end(&mut text).map_err(unreadable)?;
    if text.len() as u64 > MAX_JSON_BYTES {
        return Err(bad(format!("longer than {MAX_JSON_BYTES} bytes")));
    }
    serde_json::from_slice(&text).map_err(|error| bad(error.to_string()))
}

struct Config {
    file: &'static str,
    value: Value,
}

impl Config {
    fn bad(&self, key: &str, problem: impl Into<String>) -> CheckpointError {
        CheckpointError::Config { file: self.file, key: key.to_owned(), problem: problem.into() }
    }

    /// A count that must be there.
    fn size(&self, key: &str) -> Result<usize, CheckpointError> {
        self.optional_size(key)?.ok_or_else(|| self.bad(key, "absent"))
    }

    /// A count between 1 and 2^31.
    fn optional_size(&self, key: &str) -> Result<Option<usize>, CheckpointError> {
        let value = &self.value[key];
        if value.is_null() {
            return Ok(None);
        }
        match value.as_u64() {
            Some(size @ 1..=0x8000_0000) => Ok(Some(size as usize)),
            _ => Err(self.bad(key, format!("{value}, must be a whole number from 1 to 2147483648"))),
        }
    }

    /// The width of a head, an even share of the hidden state unless said otherwise.
    fn head_dim(&self, hidden_size: usize, num_attention_heads: usize) -> Result<usize, CheckpointError> {
        match self.optional_size("head_dim")? {
            Some(head_dim) => Ok(head_dim),
            None if hidden_size.is_multiple_of(num_attention_heads) => Ok(hidden_size / num_attention_heads),
            None => {
                let problem = format!("{num_attention_heads}, must divide hidden_size, {hidden_size}");
                Err(self.bad("num_attention_heads", problem))
            }
        }
    }

    fn number(&self, key: &str, value: &Value) -> Result<f32, CheckpointError> {
        match value.as_f64() {
            Some(number) if number > 0.0 && number.is_finite() => Ok(number as f32),
            _ => Err(self.bad(key, format!("{value}, must be a number above 0"))),
        }
    }

    /// The base of plain rotary embedding, as older and newer files write it; scaled kinds are refused.
    fn rope_theta(&self) -> Result<f32, CheckpointError> {
        let parameters = &self.value["rope_parameters"];
        let scaling = [&self.value["rope_scaling"], parameters].into_iter().filter(|value| !value.is_null());
        for value in scaling {
            let kind = value["rope_type"].as_str().or(value["type"].as_str()).unwrap_or("default");
            if kind != "default" {
                return Err(self.bad("rope_scaling", format!("{kind:?}, must be absent or \"default\"")));
            }
        }
        let value = [&parameters["rope_theta"], &self.value["rope_theta"]].into_iter().find(|value| !value.is_null());
        value.map_or(Ok(DEFAULT_ROPE_THETA), |value| self.number("rope_theta", value))
    }

    /// One token id, several, or none.
    fn tokens(&self, key: &str) -> Result<Vec<u32>, CheckpointError> {
        let value = &self.value[key];
        let token = |value: &Value| {
            let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
            id.ok_or_else(|| self.bad(key, format!("{value}, must be a token id")))
        };
        match value {
            Value::Null => Ok(Vec::new()),
            Value::Array(values) => values.iter().map(token).collect(),
            value => Ok(vec![token(value)?]),
        }
    }
}

/// The generation configuration's ids when it has some, else the model's.
fn eos_token_ids(folder: &Path, config: &Config) -> Result<Vec<u32>, CheckpointError> {
    const FILE: &str = "generation_config.json";
    if folder.join(FILE).exists() {
        let generation = Config { file: FILE, value: read_json(folder, FILE)? };
        let ids = generation.tokens("eos_token_id")?;
        if !ids.is_empty() {
            return Ok(ids);
        }
    }
    config.tokens("eos_token_id")
}

/// Refuses numbers that fit no model.
fn check(config: &Config, spec: &ModelSpec) -> Result<(), CheckpointError> {
    spec.check()
        .map_err(|error| config.bad(error.field, format!("{}, must be from 1 to {}", error.value, error.limit)))?;
    if !spec.num_attention_heads.is_multiple_of(spec.num_key_value_heads) {
        let problem =
            format!("{}, must divide num_attention_heads, {}", spec.num_key_value_heads, spec.num_attention_heads);
        return Err(config.bad("num_key_value_heads", problem));
    }
    if spec.head_dim == 0 || !spec.head_dim.is_multiple_of(2) {
        return Err(config.bad("head_dim", format!("{}, must be an even number above 0", spec.head_dim)));
    }
    match spec.eos_token_ids.iter().chain(&spec.bos_token_id).find(|id| **id as usize >= spec.vocab_size) {
        Some(id) => Err(config.bad("eos_token_id or bos_token_id", format!("{id}, vocab_size is {}", spec.vocab_size))),
        None => Ok(()),
    }
}
