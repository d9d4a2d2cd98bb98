//! Calls of tools in a completion: the form they have, and how they are found in its text.
//!
//! A completion that calls tools is `[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, …]` and nothing else, as Mistral's models
//! write it. Where the tokenizer has a token `[TOOL_CALLS]` that token is meant, elsewhere its letters. [`lark`] allows this form
//! and no other, so what [`CallReader`] reads is always well formed as far as it goes.

use std::fmt::Write as _;

use serde_json::Value;
use sirocco_types::Calls;

use crate::Tokenizer;

/// What calls begin with.
pub const TOOL_CALLS: &str = "[TOOL_CALLS]";
const NAME: &str = "\"name\": \"";

/// How the beginning of calls is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Marker {
    /// By a token of its own, which has no text.
    Token(u32),
    /// By its letters.
    Letters,
}

/// What a completion may be instead of calls.
pub(crate) enum Instead {
    Nothing,
    Text,
    Json(Value),
}

impl Marker {
    /// That of the models that `tokenizer` belongs to.
    pub fn of(tokenizer: &Tokenizer) -> Self {
        tokenizer.special_token(TOOL_CALLS).map_or(Self::Letters, Self::Token)
    }
}

/// The grammar of `calls`, whose tools take `arguments`, in their order.
pub(crate) fn lark(marker: Marker, calls: &Calls, arguments: &[Value], instead: &Instead) -> String {
    let mut lark = String::new();
    let (start, text) = match instead {
        Instead::Nothing => ("calls", String::new()),
        Instead::Text => ("TEXT | calls", text(marker)),
        Instead::Json(schema) => ("json | calls", format!("json: %json {schema}\n")),
    };
    let beginning = match (marker, instead) {
        (Marker::Token(id), _) => format!("<[{id}]> / ?\\[/"),
        // Text that decodes to the same letters but for white space before them is no text either.
        (Marker::Letters, Instead::Text) => r"/[ \t\r\n]*\[TOOL_CALLS\] \[/".to_owned(),
        (Marker::Letters, _) => format!("\"{TOOL_CALLS} [\""),
    };
    let more = if calls.several { " (\", \" call)*" } else { "" };
    let names: Vec<String> = (0..calls.tools.len()).map(|index| format!("call_{index}")).collect();
    let rules = [
        format!("start: {start}\n{text}"),
        format!("calls: {beginning} call{more} \"]\"\n"),
        format!("call: {}\n", names.join(" | ")),
    ];
    lark.extend(rules);
    for (index, (tool, arguments)) in calls.tools.iter().zip(arguments).enumerate() {
        let head = format!("{{{NAME}{}\", \"arguments\": ", tool.name);
        let _ = writeln!(lark, "call_{index}: {} arguments_{index} \"}}\"", Value::from(head));
        let _ = writeln!(lark, "arguments_{index}: %json {arguments}");
    }
    lark
}

/// Text that does not begin like calls.
fn text(marker: Marker) -> String {
    match marker {
        Marker::Token(_) => "TEXT: /(?s:.*)/\n".to_owned(),
        Marker::Letters => "TEXT: /(?s:.*)/ & ~/[ \\t\\r\\n]*\\[TOOL_CALLS\\](?s:.*)/\n".to_owned(),
    }
}

/// A part of what a completion says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Said {
    /// Text, which is no call.
    Text(String),
    /// A call of this tool begins.
    Call(String),
    /// More of the last call's arguments, which are JSON.
    Arguments(String),
}

/// Finds calls in a completion as its text comes.
#[derive(Clone, Debug)]
pub struct CallReader {
    marker: Marker,
    state: State,
    /// Text that has not been understood yet.
    held: String,
}

#[derive(Clone, Debug)]
enum State {
    /// It may become text or calls.
    Open,
    Text,
    /// Before the name of a call.
    Name,
    /// Between a call's name and its arguments.
    Between,
    Arguments {
        depth: usize,
        quoted: bool,
        escaped: bool,
    },
}

impl CallReader {
    /// A reader of a completion that may be text or calls.
    pub fn new(marker: Marker) -> Self {
        Self { marker, state: State::Open, held: String::new() }
    }

    /// Takes in a token and the text that came with it.
    pub fn push(&mut self, id: u32, text: &str) -> Vec<Said> {
        if matches!(self.state, State::Open) && self.marker == Marker::Token(id) {
            self.state = State::Name;
        }
        self.push_text(text)
    }

    /// Takes in text that came without a token.
    pub fn push_text(&mut self, text: &str) -> Vec<Said> {
        self.held += text;
        let mut said = Vec::new();
        while self.advance(&mut said) {}
        said
    }

    /// What was held back, once the completion has ended.
    pub fn finish(&mut self) -> Vec<Said> {
        let rest = std::mem::take(&mut self.held);
        match self.state {
            State::Open | State::Text if !rest.is_empty() => vec![Said::Text(rest)],
            _ => Vec::new(),
        }
    }

    /// Understands one more part of what is held; false when it takes more to go on.
    fn advance(&mut self, said: &mut Vec<Said>) -> bool {
        match &mut self.state {
            State::Open => {
                let beginning = self.held.trim_start_matches([' ', '\t', '\r', '\n']);
                self.state = match self.marker {
                    Marker::Letters if beginning.starts_with(TOOL_CALLS) => State::Name,
                    Marker::Letters if TOOL_CALLS.starts_with(beginning) => return false,
                    _ if self.held.is_empty() => return false,
                    _ => State::Text,
                };
                true
            }
            State::Text => {
                let text = std::mem::take(&mut self.held);
                if !text.is_empty() {
                    said.push(Said::Text(text));
                }
                false
            }
            State::Name => {
                let Some(start) = self.held.find(NAME).map(|at| at + NAME.len()) else { return false };
                let Some(len) = self.held[start..].find('"') else { return false };
                said.push(Said::Call(self.held[start..start + len].to_owned()));
                self.held.drain(..=start + len);
                self.state = State::Between;
                true
            }
            State::Between => {
                let Some(start) = self.held.find('{') else { return false };
                self.held.drain(..start);
                self.state = State::Arguments { depth: 0, quoted: false, escaped: false };
                true
            }
            State::Arguments { depth, quoted, escaped } => {
                let mut end = None;
                for (at, byte) in self.held.bytes().enumerate() {
                    match byte {
                        _ if *escaped => *escaped = false,
                        b'\\' if *quoted => *escaped = true,
                        b'"' => *quoted = !*quoted,
                        b'{' | b'[' if !*quoted => *depth += 1,
                        b'}' | b']' if !*quoted => {
                            *depth -= 1;
                            if *depth == 0 {
                                end = Some(at + 1);
                                break;
                            }
                        }
                        _ => {}
                    }
                }
                let piece: String = self.held.drain(..end.unwrap_or(self.held.len())).collect();
                if !piece.is_empty() {
                    said.push(Said::Arguments(piece));
                }
                if end.is_some() {
                    self.state = State::Name;
                }
                end.is_some()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What is said in all, whatever pieces it comes in.
    fn joined(said: impl IntoIterator<Item = Said>) -> Vec<Said> {
        let mut all: Vec<Said> = Vec::new();
        for next in said {
            match (all.last_mut(), next) {
                (Some(Said::Text(text)), Said::Text(more)) | (Some(Said::Arguments(text)), Said::Arguments(more)) => {
                    *text += &more;
                }
                (_, next) => all.push(next),
            }
        }
        all
    }

    fn read(marker: Marker, pieces: &[(u32, &str)]) -> Vec<Said> {
        let mut reader = CallReader::new(marker);
        let mut said: Vec<Said> = pieces.iter().flat_map(|(id, text)| reader.push(*id, text)).collect();
        said.extend(reader.finish());
        joined(said)
    }

    fn calls(calls: &[(&str, &str)]) -> Vec<Said> {
        let said = |(name, arguments): &(&str, &str)| {
            let arguments = (!arguments.is_empty()).then(|| Said::Arguments((*arguments).to_owned()));
            [Some(Said::Call((*name).to_owned())), arguments].into_iter().flatten().collect::<Vec<_>>()
        };
        calls.iter().flat_map(said).collect()
    }

    #[test]
    fn calls_are_found_and_everything_else_is_text() {
        let text = |text: &str| vec![Said::Text(text.into())];
        let cases = [
            ("", vec![]),
            ("hello", text("hello")),
            ("[TOOL", text("[TOOL")),
            (" [TOOL_CALLSx", text(" [TOOL_CALLSx")),
            ("a [TOOL_CALLS] [{\"name\": \"f\"", text("a [TOOL_CALLS] [{\"name\": \"f\"")),
            ("[TOOL_CALLS] [{\"name\": \"f", vec![]),
            ("[TOOL_CALLS] [{\"name\": \"f\", \"arg", calls(&[("f", "")])),
            ("[TOOL_CALLS] [{\"name\": \"f\", \"arguments\": {\"a", calls(&[("f", "{\"a")])),
            ("\n [TOOL_CALLS] [{\"name\": \"f\", \"arguments\": {}}]", calls(&[("f", "{}")])),
            (
                r#"[TOOL_CALLS] [{"name": "f", "arguments": {"a": "}\"{", "b": [{}]}}, {"name": "g", "arguments": {}}]"#,
                calls(&[("f", r#"{"a": "}\"{", "b": [{}]}"#), ("g", "{}")]),
            ),
        ];
        for (whole, expected) in cases {
            assert_eq!(read(Marker::Letters, &[(7, whole)]), expected, "{whole}");
        }
    }

    #[test]
    fn a_token_of_its_own_marks_calls_and_letters_do_not() {
        let list = " [{\"name\": \"f\", \"arguments\": {}}]";
        assert_eq!(read(Marker::Token(5), &[(5, ""), (9, list)]), calls(&[("f", "{}")]));
        let letters = "[TOOL_CALLS] [{\"name\": \"f\"";
        assert_eq!(read(Marker::Token(5), &[(9, letters)]), [Said::Text(letters.into())]);
    }

    proptest! {
        #[test]
        fn the_pieces_a_completion_comes_in_change_nothing(
            cuts in proptest::collection::vec(0_usize..120, 0..12), which in 0_usize..4,
        ) {
            let whole = [
                r#"[TOOL_CALLS] [{"name": "f", "arguments": {"a": "é\\\"}", "b": {"c": [1, {}]}}}, {"name": "g", "arguments": {}}]"#,
                "[TOOL_CALL is text, é",
                " \n[TOOL_CALLS] [{\"name\": \"long_name\", \"arguments\": {\"a",
                "  ",
            ][which];
            let mut pieces = Vec::new();
            let (mut start, mut cuts) = (0, cuts);
            cuts.sort_unstable();
            for cut in cuts.into_iter().filter(|cut| whole.is_char_boundary(*cut)) {
                pieces.push((0, &whole[start..cut]));
                start = cut;
            }
            pieces.push((0, &whole[start..]));
            prop_assert_eq!(read(Marker::Letters, &pieces), read(Marker::Letters, &[(0, whole)]));
        }
    }
}
