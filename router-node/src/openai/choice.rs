//! One choice of an answer, whole or in pieces.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::Arc;

use serde_json::{Map, Value, json};
use sirocco_model::{CallReader, Marker, Said, Tokenizer};
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
    /// That tools may be called, and what their calls' ids are made of.
    pub(super) calls: Option<(Marker, String)>,
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
    /// Finds calls of tools, where they may be.
    calls: Option<CallReader>,
    /// Calls that began.
    called: usize,
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
        let calls = report.calls.as_ref().map(|(marker, _)| CallReader::new(*marker));
        Self { report, index, echo, prompt, first: true, offset: 0, calls, called: 0 }
    }

    /// The opening piece of a streamed chat message: its role.
    pub(super) fn opening(&self) -> Value {
        let content = if self.calls.is_some() { Value::Null } else { "".into() };
        let delta = json!({"role": "assistant", "content": content});
        json!({"index": self.index, "delta": delta, "logprobs": null, "finish_reason": null})
    }

    /// The whole choice, as it stands among the `choices` of an answer.
    pub(super) fn whole(&mut self, piece: &Piece) -> Value {
        let echo = std::mem::take(&mut self.echo);
        let (parts, logprobs) = (self.parts(&echo, piece), self.logprobs(&echo, piece));
        let mut text = String::new();
        let mut calls: Vec<Value> = Vec::new();
        let mut arguments = String::new();
        let mut parts = parts.into_iter().peekable();
        while let Some(part) = parts.next() {
            match part {
                Said::Text(more) => text += &more,
                Said::Arguments(more) => arguments += &more,
                Said::Call(name) => calls.push(self.call(&name)),
            }
            if let (Some(call), None | Some(Said::Call(_))) = (calls.last_mut(), parts.peek()) {
                call["function"]["arguments"] = std::mem::take(&mut arguments).into();
            }
        }
        let mut said = json!({"index": self.index, "logprobs": logprobs, "finish_reason": self.reason(piece)});
        match self.report.kind {
            Kind::Completion => said["text"] = text.into(),
            Kind::Chat => {
                let content = if text.is_empty() && self.calls.is_some() { Value::Null } else { text.into() };
                said["message"] = json!({"role": "assistant", "content": content, "refusal": null});
                if !calls.is_empty() {
                    said["message"]["tool_calls"] = calls.into();
                }
            }
        }
        self.add_ids(&mut said, piece);
        said
    }

    /// `piece` of a stream as it stands among the `choices` of one or more answers; none when it has nothing to say.
    pub(super) fn say(&mut self, piece: &Piece) -> Vec<Value> {
        let echo = std::mem::take(&mut self.echo);
        let (parts, logprobs) = (self.parts(&echo, piece), self.logprobs(&echo, piece));
        let tokens_count = self.report.logprobs.is_some() || self.report.token_ids || self.report.experts.is_some();
        let mut said: Vec<Value> = parts.into_iter().map(|part| self.delta(part)).collect();
        if said.is_empty() && (piece.reason.is_some() || (tokens_count && !piece.tokens.is_empty())) {
            said.push(self.delta(Said::Text(String::new())));
        }
        if let Some(first) = said.first_mut() {
            first["logprobs"] = logprobs;
            self.add_ids(first, piece);
        }
        if let Some(last) = said.last_mut() {
            last["finish_reason"] = self.reason(piece);
        }
        said
    }

    fn delta(&mut self, part: Said) -> Value {
        let mut said = json!({"index": self.index, "logprobs": null, "finish_reason": null});
        let delta = match (self.report.kind, part) {
            (Kind::Completion, Said::Text(text)) => {
                said["text"] = text.into();
                return said;
            }
            (_, Said::Text(text)) if text.is_empty() => json!({}),
            (_, Said::Text(text)) => json!({"content": text}),
            (_, Said::Call(name)) => {
                let index = self.called;
                let mut call = self.call(&name);
                call["index"] = index.into();
                json!({"tool_calls": [call]})
            }
            (_, Said::Arguments(arguments)) => {
                // Pieces are put together by clients, so the name goes on with nothing; Mistral's clients insist that there is one.
                let function = json!({"name": "", "arguments": arguments});
                json!({"tool_calls": [{"index": self.called.saturating_sub(1), "function": function}]})
            }
        };
        said["delta"] = delta;
        said
    }

    /// What `piece` says, after `echo`.
    fn parts(&mut self, echo: &str, piece: &Piece) -> Vec<Said> {
        let Some(reader) = &mut self.calls else {
            let texts = piece.tokens.iter().map(|token| token.text.as_str());
            let text: String = [echo].into_iter().chain(texts).chain([piece.tail.as_str()]).collect();
            return if text.is_empty() { Vec::new() } else { vec![Said::Text(text)] };
        };
        let mut parts: Vec<Said> = piece.tokens.iter().flat_map(|token| reader.push(token.id, &token.text)).collect();
        parts.extend(reader.push_text(&piece.tail));
        if piece.reason.is_some() {
            parts.extend(reader.finish());
        }
        parts
    }

    /// The next call, of the tool `name`, whose arguments are still to come.
    fn call(&mut self, name: &str) -> Value {
        let request = self.report.calls.as_ref().map_or("", |(_, request)| request);
        let id = call_id(request, self.index, self.called);
        self.called += 1;
        json!({"id": id, "type": "function", "function": {"name": name, "arguments": ""}})
    }

    fn reason(&self, piece: &Piece) -> Value {
        match piece.reason {
            Some(FinishReason::Stop) if self.called > 0 => "tool_calls".into(),
            reason => json!(reason),
        }
    }

    fn logprobs(&mut self, echo: &str, piece: &Piece) -> Value {
        let start = self.offset + echo.chars().count();
        let texts = piece.tokens.iter().map(|token| token.text.as_str()).chain([piece.tail.as_str()]);
        self.offset = start + texts.map(|text| text.chars().count()).sum::<usize>();
        match (&self.report.logprobs, self.report.kind) {
            (None, _) => Value::Null,
            (Some(writer), Kind::Completion) => completion_logprobs(&piece.tokens, start, writer),
            (Some(writer), Kind::Chat) => json!({"content": chat_logprobs(&piece.tokens, writer), "refusal": null}),
        }
    }

    fn add_ids(&mut self, said: &mut Value, piece: &Piece) {
        if self.report.token_ids {
            said["token_ids"] = piece.tokens.iter().map(|token| token.id).collect();
            if std::mem::take(&mut self.first) {
                said["prompt_token_ids"] = std::mem::take(&mut self.prompt).into();
            }
        }
        if let Some(writer) = &self.report.experts {
            said["experts"] = piece.tokens.iter().map(|token| experts(token, writer)).collect();
        }
    }
}

/// Names a call within its conversation. Nine letters and digits: the templates of Mistral's models refuse other ids.
fn call_id(request: &str, choice: usize, call: usize) -> String {
    const SIGNS: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
    let mut hasher = DefaultHasher::new();
    (request, choice, call).hash(&mut hasher);
    let mut rest = hasher.finish();
    let sign = || {
        let sign = SIGNS[(rest % 62) as usize];
        rest /= 62;
        char::from(sign)
    };
    std::iter::repeat_with(sign).take(9).collect()
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
