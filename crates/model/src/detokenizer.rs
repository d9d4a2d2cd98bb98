//! Text from token ids, one at a time.
//!
//! A token may be part of a character, so text is given out only up to the last whole one. What is given out, put together, is
//! the decoding of all ids at once.

use crate::Tokenizer;

/// Tokens that are decoded again with every new one; enough for any character and for decoders that look at neighbours.
const CONTEXT: usize = 8;

/// Tokens after which incomplete text is no longer waited for.
const PATIENCE: usize = 64;

/// Turns one completion's ids into text.
#[derive(Clone, Debug, Default)]
pub struct Detokenizer {
    /// The last ids, whose text may still change.
    ids: Vec<u32>,
    /// Bytes of their text already given out.
    given: usize,
}

impl Detokenizer {
    /// The text that `id` completes.
    pub fn push(&mut self, id: u32, tokenizer: &Tokenizer) -> String {
        self.ids.push(id);
        let text = tokenizer.decode(&self.ids);
        let whole =
            if self.ids.len() > PATIENCE { text.as_str() } else { text.trim_end_matches(char::REPLACEMENT_CHARACTER) };
        let new = whole.get(self.given..).unwrap_or_default().to_owned();
        self.given = self.given.max(whole.len());
        if self.ids.len() > 2 * CONTEXT && whole.len() == text.len() {
            self.ids.drain(..self.ids.len() - CONTEXT);
            self.given = tokenizer.decode(&self.ids).len();
        }
        new
    }

    /// What is left at the end, complete or not.
    pub fn finish(self, tokenizer: &Tokenizer) -> String {
        tokenizer.decode(&self.ids).get(self.given..).unwrap_or_default().to_owned()
    }
}
