//! Text from token ids, one at a time.
//!
//! A token may be part of a character, so text is given out only up to where it is whole. Decoders look at neighbours (a leading
//! space goes, a run of byte tokens is one piece), so new ids are decoded together with those that gave the last text, which
//! began where the text was whole. What is given out, put together, is the decoding of all ids at once, but for bytes that never
//! become a character: those do not reach back into text already given.

use crate::Tokenizer;

/// Tokens after which text that is not whole is no longer waited for.
const PATIENCE: usize = 64;

/// Turns one completion's ids into text.
#[derive(Clone, Debug, Default)]
pub struct Detokenizer {
    /// The ids that gave the last text, then those that have given none yet.
    ids: Vec<u32>,
    /// How many of them gave the last text.
    told: usize,
    /// What those decode to.
    context: String,
}

impl Detokenizer {
    /// The text that `id` completes.
    pub fn push(&mut self, id: u32, tokenizer: &Tokenizer) -> String {
        self.ids.push(id);
        let patient = self.ids.len() - self.told <= PATIENCE;
        let text = tokenizer.decode(&self.ids);
        if patient && text.ends_with(char::REPLACEMENT_CHARACTER) {
            return String::new();
        }
        let new = self.after_context(&text, tokenizer);
        if !new.is_empty() {
            self.ids.drain(..self.told);
            self.told = self.ids.len();
            self.context = tokenizer.decode(&self.ids);
        } else if !patient {
            self.ids.truncate(self.told);
        }
        new
    }

    /// What is left at the end, complete or not.
    pub fn finish(self, tokenizer: &Tokenizer) -> String {
        self.after_context(&tokenizer.decode(&self.ids), tokenizer)
    }

    /// The part of `text`, which all ids decode to, that has not been given out.
    fn after_context(&self, text: &str, tokenizer: &Tokenizer) -> String {
        match text.strip_prefix(&self.context) {
            Some(new) => new.to_owned(),
            None => tokenizer.decode(&self.ids[self.told..]),
        }
    }
}
