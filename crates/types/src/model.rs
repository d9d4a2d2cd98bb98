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

impl ModelSpec {
    /// Bytes of one expert's weights in the checkpoint: w1, w2 and w3.
    pub fn expert_bytes(&self) -> u64 {
        3 * self.hidden_size as u64 * self.intermediate_size as u64 * self.dtype.size() as u64
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
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fingerprint_survives_its_text_form() {
        let fingerprint = Fingerprint(std::array::from_fn(|i| i as u8 * 7));
        assert_eq!(fingerprint.to_string().parse(), Ok(fingerprint));
        assert!("zz".repeat(32).parse::<Fingerprint>().is_err());
        assert!("00".parse::<Fingerprint>().is_err());
    }
}
