//! One choice of an answer, whole or in pieces.

use std::sync::Arc;

use serde_json::{Map, Value, json};
use sirocco_model::Tokenizer;
use sirocco_proto::inference::{Event, Token};
use sirocco_types::FinishReason;

/// Which of the two APIs a request came by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// `/v1/completions`
    Completion,
    /// `/v1/chat/completions`
    Chat,
}

/// What is reported of every choice of a request.
#[derive(Clone, Debug)]
pub(super) struct Report {
    pub(super) kind: Kind,
    /// Log probabilities, of tokens as this writes them.
    pub(super) logprobs: Option<Arc<Tokenizer>>,
    pub(super) token_ids: bool,
    /// The experts of every token, of which this writes the text.
    pub(super) experts: Option<Arc<Tokenizer>>,
    pub(super) stream: bool,
}

/// A choice that is being answered, and what has been said of it.
#[derive(Debug)]
pub(super) struct Choice {
    report: Report,
    index: usize,
    /// Said before the first token.
    echo: String,
    /// Said with the first piece, when token ids are wanted.
    prompt: Vec<u32>,
    first: bool,
    /// Characters said.
    offset: usize,
}

/// What one or more events add to a choice.
#[derive(Debug, Default)]
pub(super) struct Piece {
    tokens: Vec<Token>,
    /// Text after that of the tokens.
    tail: String,
    reason: Option<FinishReason>,
}

impl Piece {
    /// Takes in one more event.
    pub(super) fn add(&mut self, event: Event) {
        match event {
            Event::Token(token) => self.tokens.push(token),
            Event::Finished(finished) => {
                self.tail = finished.text;
                self.reason = Some(finished.reason);
            }
            Event::Started(_) => {}
        }
    }
}

impl Choice {
    /// The choice at `index` for `prompt`, before its first token; `echo` is said first.
    pub(super) fn new(report: Report, index: usize, prompt: Vec<u32>, echo: String) -> Self {
        Self { report, index, echo, prompt, first: true, offset: 0 }
    }

    /// Whether `piece` has something to say.
    pub(super) fn says(&self, piece: &Piece) -> bool {
        let tokens_count = self.report.logprobs.is_some() || self.report.token_ids || self.report.experts.is_some();
        let text = piece.tokens.iter().any(|token| !token.text.is_empty()) || !piece.tail.is_empty();
        text || piece.reason.is_some() || !self.echo.is_empty() || (tokens_count && !piece.tokens.is_empty())
    }

    /// The opening piece of a streamed chat message: its role.
    pub(super) fn opening(&self) -> Value {
        let delta = json!({"role": "assistant", "content": ""});
        json!({"index": self.index, "delta": delta, "logprobs": null, "finish_reason": null})
    }

    /// `piece` as it stands among the `choices` of an answer.
    pub(super) fn say(&mut self, piece: &Piece) -> Value {
        let Report { kind, token_ids, stream, .. } = self.report;
        let mut text = std::mem::take(&mut self.echo);
        let echoed = text.chars().count();
        text.extend(piece.tokens.iter().map(|token| token.text.as_str()));
        text += &piece.tail;
        let logprobs = match (&self.report.logprobs, kind) {
            (None, _) => Value::Null,
            (Some(writer), Kind::Completion) => completion_logprobs(&piece.tokens, self.offset + echoed, writer),
            (Some(writer), Kind::Chat) => json!({"content": chat_logprobs(&piece.tokens, writer), "refusal": null}),
        };
        self.offset += text.chars().count();
        let mut said = json!({"index": self.index, "logprobs": logprobs, "finish_reason": piece.reason});
        match (kind, stream) {
            (Kind::Completion, _) => said["text"] = text.into(),
            (Kind::Chat, true) => said["delta"] = if text.is_empty() { json!({}) } else { json!({"content": text}) },
            (Kind::Chat, false) => {
                said["message"] = json!({"role": "assistant", "content": text, "refusal": null});
            }
        }
        if token_ids {
            said["token_ids"] = piece.tokens.iter().map(|token| token.id).collect();
            if std::mem::take(&mut self.first) {
                said["prompt_token_ids"] = std::mem::take(&mut self.prompt).into();
            }
        }
        if let Some(writer) = &self.report.experts {
            said["experts"] = piece.tokens.iter().map(|token| experts(token, writer)).collect();
        }
        said
    }
}

/// By layer, the experts and weights of the position that `token` was drawn from, strongest first.
fn experts(token: &Token, writer: &Tokenizer) -> Value {
    let last = token.routing.iter().filter_map(|layer| Some(layer.of(layer.tokens().checked_sub(1)?)));
    let layers = last.map(|(ids, weights)| {
        let ids: Vec<u32> = ids.iter().map(|id| id.0).collect();
        json!({"ids": ids, "weights": weights})
    });
    json!({"token_id": token.id, "text": writer.token_text(token.id), "layers": layers.collect::<Vec<_>>()})
}

/// Of a completion: parallel lists, offsets in characters.
fn completion_logprobs(tokens: &[Token], mut offset: usize, writer: &Tokenizer) -> Value {
    let (mut texts, mut logprobs, mut tops, mut offsets) = (vec![], vec![], vec![], vec![]);
    for token in tokens {
        let own = writer.token_text(token.id);
        let mut top = Map::new();
        for (_, logprob, text) in &token.top_logprobs {
            // Tokens that are parts of a character have the same text; the most likely one stands for them.
            top.entry(text.clone()).or_insert((*logprob).into());
        }
        top.entry(own.clone()).or_insert(token.logprob.into());
        texts.push(own);
        logprobs.push(token.logprob);
        tops.push(top);
        offsets.push(offset);
        offset += token.text.chars().count();
    }
    json!({"tokens": texts, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets})
}

/// Of a chat message: an object for each token.
fn chat_logprobs(tokens: &[Token], writer: &Tokenizer) -> Vec<Value> {
    let entry = |text: &str, logprob: Option<f32>| {
        // A part of a character has no text, and its bytes are not known here.
        let bytes = (!text.contains(char::REPLACEMENT_CHARACTER)).then(|| text.as_bytes().to_vec());
        json!({"token": text, "logprob": logprob, "bytes": bytes})
    };
    let with_top = |token: &Token| {
        let top = token.top_logprobs.iter().map(|(_, logprob, text)| entry(text, Some(*logprob)));
        let mut said = entry(&writer.token_text(token.id), token.logprob);
        said["top_logprobs"] = top.collect();
        said
    };
    tokens.iter().map(with_top).collect()
}
