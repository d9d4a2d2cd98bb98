//! Tools, their calls and their results as text, for templates that do not know them:
//!
//! - the first message of the user begins with `[AVAILABLE_TOOLS] [<tool>, …][/AVAILABLE_TOOLS]` and a line break, each tool in
//!   the JSON of OpenAI's API;
//! - an answer that called tools is (its text, a line break and) `[TOOL_CALLS] [{"name": …, "arguments": {…}}, …]`;
//! - results become a message of the user, a line each: `[TOOL_RESULTS] <content>[/TOOL_RESULTS]`.
//!
//! JSON is written as Python writes it, here and by the templates' own `tojson`.

use std::io;

use minijinja::value::Kwargs;
use minijinja::{Error, ErrorKind};
use serde::Serialize;
use serde_json::Value;
use serde_json::ser::{Formatter, PrettyFormatter};

use super::Message;
use crate::calls::TOOL_CALLS;

/// The conversation in messages of the system, the user and the assistant that are text alone.
pub(super) fn without_tools(messages: &[Message], tools: &[Value]) -> Vec<Message> {
    let mut plain: Vec<Message> = Vec::with_capacity(messages.len());
    let mut after_result = false;
    for message in messages {
        let is_result = message.role == "tool";
        let next = match message.role.as_str() {
            "tool" => {
                let content = message.content.as_deref().unwrap_or_default();
                said("user", format!("[TOOL_RESULTS] {content}[/TOOL_RESULTS]"))
            }
            "assistant" if !message.tool_calls.is_empty() => said("assistant", with_calls(message)),
            _ => Message { tool_calls: Vec::new(), ..message.clone() },
        };
        // Many templates refuse a user who speaks twice.
        match plain.last_mut() {
            Some(last) if next.role == "user" && after_result => {
                let text = format!("{}\n{}", text_of(last), text_of(&next));
                last.content = Some(text);
            }
            _ => plain.push(next),
        }
        after_result = is_result || (after_result && message.role == "user");
    }
    if !tools.is_empty() {
        let list = written(&Value::from(tools));
        let first = plain.iter().position(|message| message.role == "user").unwrap_or(0);
        if let Some(message) = plain.get_mut(first) {
            let text = format!("[AVAILABLE_TOOLS] {list}[/AVAILABLE_TOOLS]\n{}", text_of(message));
            message.content = Some(text);
        }
    }
    plain
}

fn said(role: &str, content: String) -> Message {
    Message { role: role.to_owned(), content: Some(content), ..Message::default() }
}

fn text_of(message: &Message) -> &str {
    message.content.as_deref().unwrap_or_default()
}

fn with_calls(message: &Message) -> String {
    let calls: Vec<String> = message.tool_calls.iter().map(|call| written(&call.function)).collect();
    let calls = format!("{TOOL_CALLS} [{}]", calls.join(", "));
    match text_of(message) {
        "" => calls,
        text => format!("{text}\n{calls}"),
    }
}

/// The filter `tojson`.
pub(super) fn to_json(value: &minijinja::Value, options: &Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let value = serde_json::to_value(value);
    let value = value.map_err(|error| Error::new(ErrorKind::InvalidOperation, error.to_string()))?;
    let Some(indent) = indent else { return Ok(written(&value)) };
    let indent = " ".repeat(indent.min(16));
    Ok(formatted(&value, PrettyFormatter::with_indent(indent.as_bytes())))
}

fn written(value: &impl Serialize) -> String {
    formatted(value, OneLine)
}

fn formatted(value: &impl Serialize, formatter: impl Formatter) -> String {
    let mut bytes = Vec::new();
    let mut serializer = serde_json::Serializer::with_formatter(&mut bytes, formatter);
    value.serialize(&mut serializer).expect("JSON is written to memory");
    String::from_utf8(bytes).expect("JSON is UTF-8")
}

/// JSON on one line, with a space after commas and colons.
struct OneLine;

impl Formatter for OneLine {
    fn begin_array_value<W: io::Write + ?Sized>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: io::Write + ?Sized>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: io::Write + ?Sized>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::{CalledFunction, ToolCall};
    use super::*;

    #[test]
    fn tools_calls_and_results_become_text() {
        let call = |name: &str, arguments: Value| ToolCall {
            id: "i".into(),
            function: CalledFunction { name: name.into(), arguments },
        };
        let answer = |content: Option<&str>, tool_calls: Vec<ToolCall>| Message {
            role: "assistant".into(),
            content: content.map(str::to_owned),
            tool_calls,
            ..Message::default()
        };
        let message = |role: &str, content: &str| said(role, content.into());
        let messages = [
            message("system", "s"),
            message("user", "u"),
            answer(Some("wait"), vec![call("f", json!({"b": "é", "a": {}})), call("g", json!({}))]),
            message("tool", "1"),
            message("tool", "2"),
            message("user", "and?"),
            answer(None, vec![call("g", json!({}))]),
            message("tool", "3"),
        ];
        let expected = [
            message("system", "s"),
            message("user", "[AVAILABLE_TOOLS] [{\"type\": \"function\"}, {}][/AVAILABLE_TOOLS]\nu"),
            message(
                "assistant",
                "wait\n[TOOL_CALLS] [{\"name\": \"f\", \"arguments\": {\"b\": \"é\", \"a\": {}}}, {\"name\": \"g\", \
                 \"arguments\": {}}]",
            ),
            message("user", "[TOOL_RESULTS] 1[/TOOL_RESULTS]\n[TOOL_RESULTS] 2[/TOOL_RESULTS]\nand?"),
            message("assistant", "[TOOL_CALLS] [{\"name\": \"g\", \"arguments\": {}}]"),
            message("user", "[TOOL_RESULTS] 3[/TOOL_RESULTS]"),
        ];
        assert_eq!(without_tools(&messages, &[json!({"type": "function"}), json!({})]), expected);
        assert_eq!(without_tools(&messages[..2], &[]), messages[..2]);
    }
}
