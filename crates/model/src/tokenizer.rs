//! `tokenizer.json` of a checkpoint folder.

use std::collections::HashMap;
use std::path::Path;

use serde_json::Value;
use sirocco_types::ModelSpec;

/// Longest file that is read; those of 256,000 tokens have about 35 MB.
const MAX_BYTES: u64 = 256 << 20;

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
    /// What its tokens stand for is not known.
    #[error(
        "tokenizer.json: the decoder is neither byte-level nor with byte fallback, so its tokens have no known bytes"
    )]
    NoBytes,
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
        let bytes = path.metadata().map_err(|error| TokenizerError::Load(error.to_string()))?.len();
        if bytes > MAX_BYTES {
            return Err(TokenizerError::Load(format!("it is {bytes} bytes long, the limit is {MAX_BYTES}")));
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

    /// The id of the special token written `text`, if there is one.
    pub fn special_token(&self, text: &str) -> Option<u32> {
        let mut added = self.inner.get_added_tokens_decoder().into_iter();
        added.find(|(_, token)| token.special && token.content == text).map(|(id, _)| id)
    }

    /// The bytes of each token of the model's vocabulary, by id; none for special tokens and ids that are no tokens.
    pub(crate) fn token_bytes(&self) -> Result<Vec<Vec<u8>>, TokenizerError> {
        let decoder = self.inner.get_decoder().and_then(|decoder| serde_json::to_value(decoder).ok());
        let form = Form::of(&decoder.unwrap_or_default())?;
        let added = self.inner.get_added_tokens_decoder();
        let mut bytes = vec![Vec::new(); self.vocab_size as usize];
        for (text, id) in self.inner.get_vocab(true) {
            bytes[id as usize] = match added.get(&id) {
                Some(token) if token.special => Vec::new(),
                Some(token) => token.content.clone().into_bytes(),
                None => form.bytes(&text),
            };
        }
        Ok(bytes)
    }

    /// Refuses ids outside the model's vocabulary.
    pub fn check(&self, ids: &[u32]) -> Result<(), TokenizerError> {
        match ids.iter().find(|id| **id >= self.vocab_size) {
            Some(id) => Err(TokenizerError::UnknownId { id: *id, vocab_size: self.vocab_size }),
            None => Ok(()),
        }
    }
}

/// How tokens are written in the vocabulary.
enum Form {
    /// A character for each byte.
    ByteLevel(HashMap<char, u8>),
    /// Text with a sign for spaces; `<0xNN>` is a byte.
    Fallback { space: Option<String> },
}

impl Form {
    /// What `decoder` takes tokens for.
    fn of(decoder: &Value) -> Result<Self, TokenizerError> {
        let steps = match decoder["decoders"].as_array() {
            Some(steps) => steps.as_slice(),
            None => std::slice::from_ref(decoder),
        };
        let step = |kind: &str| steps.iter().find(|step| step["type"] == kind);
        if step("ByteLevel").is_some() {
            return Ok(Self::ByteLevel(byte_level()));
        }
        let space = match (step("Metaspace"), step("Replace")) {
            (Some(metaspace), _) => metaspace["replacement"].as_str(),
            (None, Some(replace)) if replace["content"] == " " => replace["pattern"]["String"].as_str(),
            _ => None,
        };
        if step("ByteFallback").is_none() && space.is_none() {
            return Err(TokenizerError::NoBytes);
        }
        Ok(Self::Fallback { space: space.map(str::to_owned) })
    }

    fn bytes(&self, token: &str) -> Vec<u8> {
        match self {
            Self::ByteLevel(bytes) => {
                let bytes: Option<Vec<u8>> = token.chars().map(|c| bytes.get(&c).copied()).collect();
                bytes.unwrap_or_default()
            }
            Self::Fallback { space } => {
                let byte = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
                match (byte.and_then(|hex| u8::from_str_radix(hex, 16).ok()), space) {
                    (Some(byte), _) => vec![byte],
                    (None, Some(space)) => token.replace(space, " ").into_bytes(),
                    (None, None) => token.as_bytes().to_vec(),
                }
            }
        }
    }
}

/// The characters that stand for bytes: visible ones for themselves, the others in order from U+0100 on. Source: GPT-2's
/// `bytes_to_unicode`.
fn byte_level() -> HashMap<char, u8> {
    let visible = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let others = (0..=255_u8).filter(|byte| !visible(*byte)).zip('\u{100}'..);
    let own = (0..=255_u8).filter(|byte| visible(*byte)).map(|byte| (char::from(byte), byte));
    own.chain(others.map(|(byte, c)| (c, byte))).collect()
}
