//! What a model is: the numbers of its `config.json` that placement, dispatch and compute need, and its fingerprint.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{ExpertId, ExpertKey, LayerId};

/// The shape of a Mixture-of-Experts model. Field names are those of a Hugging Face `config.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelSpec {
    /// The family, e.g. `mixtral`.
    pub model_type: String,
    /// Width of a hidden state.
    pub hidden_size: usize,
    /// Width inside one expert.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_hidden_layers: usize,
    /// Experts in each layer.
    pub num_local_experts: usize,
    /// Experts each token is sent to.
    pub num_experts_per_tok: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; divides `num_attention_heads`.
    pub num_key_value_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Token ids run from 0 to `vocab_size - 1`.
    pub vocab_size: usize,
    /// The longest sequence (prompt and completion), in tokens.
    pub max_position_embeddings: usize,
    /// Each token attends to the last `sliding_window` tokens, itself included; all when absent.
    pub sliding_window: Option<usize>,
    /// Added to the mean square in RMSNorm.
    pub rms_norm_eps: f32,
    /// Base of the rotary position embedding.
    pub rope_theta: f32,
    /// The output projection is the embedding matrix.
    pub tie_word_embeddings: bool,
    /// Put before every prompt by the tokenizer, when there is one.
    pub bos_token_id: Option<u32>,
    /// Ids that end a completion.
    pub eos_token_ids: Vec<u32>,
    /// How the weights are stored.
    pub dtype: Dtype,
}

/// A number of a [`ModelSpec`] that is beyond any model.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field} is {value}, must be from 1 to {limit}")]
pub struct SpecError {
    /// Whose it is.
    pub field: &'static str,
    /// What it says.
    pub value: usize,
    /// The most it may be.
    pub limit: usize,
}

impl ModelSpec {
    /// Refuses numbers that nothing should be sized by: they come from files and from the store.
    ///
    /// Errors name the first field that is 0 or over its limit. What passes can be multiplied as shapes are without overflow.
    pub fn check(&self) -> Result<(), SpecError> {
        let fields = [
            ("hidden_size", self.hidden_size, 1 << 16),
            ("intermediate_size", self.intermediate_size, 1 << 20),
            ("num_hidden_layers", self.num_hidden_layers, 1 << 10),
            ("num_local_experts", self.num_local_experts, 1 << 12),
            ("num_experts_per_tok", self.num_experts_per_tok, self.num_local_experts),
            ("num_attention_heads", self.num_attention_heads, 1 << 10),
            ("num_key_value_heads", self.num_key_value_heads, self.num_attention_heads),
            ("head_dim", self.head_dim, 1 << 12),
            ("vocab_size", self.vocab_size, 1 << 24),
            ("max_position_embeddings", self.max_position_embeddings, 1 << 31),
            ("sliding_window", self.sliding_window.unwrap_or(1), 1 << 31),
        ];
        match fields.into_iter().find(|(_, value, limit)| !(1..=*limit).contains(value)) {
            Some((field, value, limit)) => Err(SpecError { field, value, limit }),
            None => Ok(()),
        }
    }

    /// Bytes of one expert's weights in the checkpoint: w1, w2 and w3.
    pub fn expert_bytes(&self) -> u64 {
        3 * self.hidden_size as u64 * self.intermediate_size as u64 * self.dtype.size() as u64
    }

    /// Memory that one expert's weights take as `dtype`, scales included, but for what pads widths to a multiple of 32.
    pub fn expert_bytes_as(&self, dtype: ExpertDtype) -> u64 {
        let weights = 3 * self.hidden_size as u64 * self.intermediate_size as u64;
        match dtype {
            ExpertDtype::Bf16 => self.expert_bytes(),
            ExpertDtype::Int8 => weights * 17 / 16,
            ExpertDtype::Int4 => weights * 9 / 16,
        }
    }

    /// Every layer, in order.
    pub fn layers(&self) -> impl Iterator<Item = LayerId> + use<> {
        (0..self.num_hidden_layers as u32).map(LayerId)
    }

    /// Every expert of every layer, by layer, then by index.
    pub fn experts(&self) -> impl Iterator<Item = ExpertKey> + use<> {
        let experts = self.num_local_experts as u32;
        self.layers().flat_map(move |layer| (0..experts).map(move |e| ExpertKey { layer, expert: ExpertId(e) }))
    }
}

/// The element type of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// IEEE 754 single precision.
    F32,
    /// The upper half of an [`Dtype::F32`].
    Bf16,
}

impl Dtype {
    /// Bytes per element.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        })
    }
}

/// What an expert's weights are kept and multiplied as. It decides the numbers, so all experts of a cluster have the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ExpertDtype {
    /// As stored, with activations in f32.
    #[default]
    Bf16,
    /// Integers of 8 bits that share a scale by 32, with activations of 8 bits.
    Int8,
    /// Integers of 4 bits that share a scale by 32, with activations of 8 bits.
    Int4,
}

/// A text that names no [`ExpertDtype`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expert dtype {0:?} is none of bf16, int8 and int4")]
pub struct ExpertDtypeError(String);

impl ExpertDtype {
    /// Every dtype, most bytes first.
    pub const ALL: [Self; 3] = [Self::Bf16, Self::Int8, Self::Int4];

    /// The lower-case name, as in flags and records.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
            Self::Int4 => "int4",
        }
    }
}

impl fmt::Display for ExpertDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for ExpertDtype {
    type Err = ExpertDtypeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL.into_iter().find(|dtype| dtype.as_str() == text).ok_or_else(|| ExpertDtypeError(text.to_owned()))
    }
}

/// What two nodes compare to know that they serve the same checkpoint: a SHA-256, shown as 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Fingerprint(pub [u8; 32]);

/// A text that is no [`Fingerprint`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("fingerprint {0:?} is not 64 hexadecimal digits")]
pub struct FingerprintError(String);

impl Fingerprint {
    /// The first 12 digits: enough for a person to tell checkpoints apart.
    pub fn short(&self) -> String {
        self.to_string()[..12].to_owned()
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Fingerprint {
    type Err = FingerprintError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || FingerprintError(text.to_owned());
        if text.len() != 64 || !text.is_ascii() {
            return Err(error());
        }
        let mut bytes = [0; 32];
        for (byte, digits) in bytes.iter_mut().zip(text.as_bytes().chunks(2)) {
            let digits = str::from_utf8(digits).map_err(|_| error())?;
            *byte = u8::from_str_radix(digits, 16).map_err(|_| error())?;
        }
        Ok(Self(bytes))
    }
}

impl TryFrom<String> for Fingerprint {
    type Error = FingerprintError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Fingerprint> for String {
    fn from(fingerprint: Fingerprint) -> Self {
        fingerprint.to_string()
    }
}

/// Which model a node serves: what a cluster agrees on before any token flows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelIdentity {
    /// The name clients use: the checkpoint folder's name unless set otherwise.
    pub name: String,
    /// See [`Fingerprint`].
    pub fingerprint: Fingerprint,
    /// The model's shape.
    pub spec: ModelSpec,
    /// What the experts are kept as. Expert nodes say it; what routers say of it means nothing.
    #[serde(default)]
    pub expert_dtype: ExpertDtype,
}

impl ModelIdentity {
    /// Memory that one expert takes.
    pub fn expert_bytes(&self) -> u64 {
        self.spec.expert_bytes_as(self.expert_dtype)
    }

    /// Whether the experts of both give the same bits: those of the same checkpoint, kept as the same dtype.
    pub fn has_experts_of(&self, other: &Self) -> bool {
        self.fingerprint == other.fingerprint && self.expert_dtype == other.expert_dtype
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_expert_dtype_survives_its_text_and_json_forms() {
        for dtype in ExpertDtype::ALL {
            assert_eq!(dtype.to_string().parse(), Ok(dtype));
            assert_eq!(serde_json::to_value(dtype).unwrap(), dtype.as_str());
        }
        let error = "fp8".parse::<ExpertDtype>().unwrap_err();
        assert_eq!(error.to_string(), r#"expert dtype "fp8" is none of bf16, int8 and int4"#);
    }

    #[test]
    fn a_fingerprint_survives_its_text_form() {
        let fingerprint = Fingerprint(std::array::from_fn(|i| i as u8 * 7));
        assert_eq!(fingerprint.to_string().parse(), Ok(fingerprint));
        assert!("zz".repeat(32).parse::<Fingerprint>().is_err());
        assert!("00".parse::<Fingerprint>().is_err());
    }
}
