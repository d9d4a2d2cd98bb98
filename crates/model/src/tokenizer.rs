//! `tokenizer.json` of a checkpoint folder.

use std::path::Path;

use sirocco_types::ModelSpec;

/// Text to token ids and back, as Hugging Face's tokenizer of the same file does it.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    vocab_size: u32,
}

/// What keeps text and tokens apart.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// The file is missing or not a tokenizer.
    #[error("tokenizer.json: {0}")]
    Load(String),
    /// It has tokens the model does not.
    #[error("tokenizer.json: vocabulary mismatch: token id {id} is outside the model's vocab_size, {vocab_size}")]
    Vocabulary {
        /// Its highest id.
        id: u32,
        /// The model's limit.
        vocab_size: usize,
    },
    /// Text cannot be tokenised.
    #[error("the text cannot be tokenised: {0}")]
    Encode(String),
    /// An id is no token.
    #[error("token id {id} is outside the vocabulary of {vocab_size}")]
    UnknownId {
        /// The id.
        id: u32,
        /// The model's limit.
        vocab_size: u32,
    },
}

impl Tokenizer {
    /// Reads `folder`'s tokenizer and checks that it fits the model.
    pub fn load(folder: &Path, spec: &ModelSpec) -> Result<Self, TokenizerError> {
        let path = folder.join("tokenizer.json");
        if !path.is_file() {
            return Err(TokenizerError::Load(format!("there is no such file in {}", folder.display())));
        }
        let load = |error: tokenizers::Error| TokenizerError::Load(error.to_string());
        let mut inner = tokenizers::Tokenizer::from_file(path).map_err(load)?;
        // Some files keep the lengths their tokenizer was trained with; transformers ignores them too.
        inner.with_truncation(None).map_err(load)?.with_padding(None);
        if let Some(id) = inner.get_vocab(true).into_values().max().filter(|id| *id as usize >= spec.vocab_size) {
            return Err(TokenizerError::Vocabulary { id, vocab_size: spec.vocab_size });
        }
        Ok(Self { inner, vocab_size: spec.vocab_size as u32 })
    }

    /// The ids of `text`, with the special tokens the model expects around it or without.
    pub fn encode(&self, text: &str, special_tokens: bool) -> Result<Vec<u32>, TokenizerError> {
        let encoding = self.inner.encode_fast(text, special_tokens);
        Ok(encoding.map_err(|error| TokenizerError::Encode(error.to_string()))?.get_ids().to_vec())
    }

    /// The text of `ids`, without special tokens. Ids that are no tokens, and bytes that are no character, become U+FFFD or
    /// nothing.
    pub fn decode(&self, ids: &[u32]) -> String {
        self.inner.decode(ids, true).unwrap_or_default()
    }

    /// The text of a single token, special or not.
    pub fn token_text(&self, id: u32) -> String {
        self.inner.decode(&[id], false).unwrap_or_default()
    }

    /// Refuses ids outside the model's vocabulary.
    pub fn check(&self, ids: &[u32]) -> Result<(), TokenizerError> {
        match ids.iter().find(|id| **id >= self.vocab_size) {
            Some(id) => Err(TokenizerError::UnknownId { id: *id, vocab_size: self.vocab_size }),
            None => Ok(()),
        }
    }
}
