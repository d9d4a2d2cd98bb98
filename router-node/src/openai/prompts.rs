//! What a request wants completed: prompts of `/v1/completions`, messages of `/v1/chat/completions`.

use std::collections::BTreeSet;

use serde_json::Value;
use sirocco_model::{CalledFunction, Message, ToolCall};
use sirocco_proto::inference::Prompt;

use super::problem::Problem;

const FORMS: &str = "must be a string, a list of strings, a list of token ids or a list of such lists";
const ROLES: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];

/// The prompts in `given`, each with the name by which to blame it.
pub(super) fn of_completion(given: &Value) -> Result<Vec<(String, Prompt)>, Problem> {
    let prompts = match given {
        Value::Null => return Err(Problem::invalid("prompt", format!("absent, it {FORMS}"))),
        Value::String(text) => vec![("prompt".to_owned(), Prompt::Text(text.clone()))],
        Value::Array(list) if list.is_empty() => return Err(Problem::invalid("prompt", format!("empty, it {FORMS}"))),
        Value::Array(list) if list[0].is_number() => vec![("prompt".to_owned(), Prompt::Ids(ids("prompt", list)?))],
        Value::Array(list) => {
            list.iter().enumerate().map(|(index, item)| one_of_list(index, item)).collect::<Result<_, _>>()?
        }
        _ => return Err(Problem::invalid("prompt", FORMS)),
    };
    for (param, prompt) in &prompts {
        prompt.validate().map_err(|error| Problem::from(error).blamed_on(param))?;
    }
    Ok(prompts)
}

fn one_of_list(index: usize, given: &Value) -> Result<(String, Prompt), Problem> {
    let param = format!("prompt[{index}]");
    match given {
        Value::String(text) => Ok((param, Prompt::Text(text.clone()))),
        Value::Array(list) => ids(&param, list).map(|ids| (param, Prompt::Ids(ids))),
        _ => Err(Problem::invalid(param, "must be a string or a list of token ids, as its neighbours")),
    }
}

fn ids(param: &str, list: &[Value]) -> Result<Vec<u32>, Problem> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    let ids: Option<Vec<u32>> = list.iter().map(id).collect();
    ids.ok_or_else(|| Problem::invalid(param, "every token id must be an integer from 0 to 4294967295"))
}

/// The conversation in `given`.
pub(super) fn of_chat(given: &Value) -> Result<Vec<Message>, Problem> {
    match given {
        Value::Array(list) if !list.is_empty() => {
            let messages: Vec<_> = list.iter().enumerate().map(|(i, m)| message(i, m)).collect::<Result<_, _>>()?;
            check_results(&messages)?;
            Ok(messages)
        }
        Value::Array(_) => Err(Problem::invalid("messages", "empty, it must have at least 1 message")),
        Value::Null => Err(Problem::invalid("messages", "absent, it must be a list of messages")),
        _ => Err(Problem::invalid("messages", "must be a list of messages")),
    }
}

fn message(index: usize, given: &Value) -> Result<Message, Problem> {
    let param = |field: &str| format!("messages[{index}].{field}");
    let role = match given["role"].as_str() {
        // What newer clients call it; templates know the older name.
        Some("developer") => "system",
        Some(role) if ROLES.contains(&role) => role,
        Some(role) => {
            let problem = format!("{role:?} is not supported in this version, it must be one of {}", ROLES.join(", "));
            return Err(Problem::invalid(param("role"), problem));
        }
        None => return Err(Problem::invalid(param("role"), format!("must be one of {}", ROLES.join(", ")))),
    };
    for field in ["function_call", "audio"] {
        if !given[field].is_null() {
            return Err(Problem::unsupported(param(field)));
        }
    }
    let tool_calls = match &given["tool_calls"] {
        Value::Null => Vec::new(),
        Value::Array(list) if role == "assistant" => list
            .iter()
            .enumerate()
            .map(|(i, c)| call(&param(&format!("tool_calls[{i}]")), c))
            .collect::<Result<_, _>>()?,
        _ => return Err(Problem::invalid(param("tool_calls"), "must be a list, in a message of the assistant")),
    };
    let content = match &given["content"] {
        Value::String(text) => Some(text.clone()),
        Value::Array(parts) => {
            let parts = parts.iter().enumerate().map(|(i, given)| part(&param(&format!("content[{i}]")), given));
            Some(parts.collect::<Result<Vec<_>, _>>()?.join("\n"))
        }
        Value::Null if !tool_calls.is_empty() => None,
        _ => return Err(Problem::invalid(param("content"), "must be a string or a list of text parts")),
    };
    let tool_call_id = match (role, &given["tool_call_id"]) {
        ("tool", Value::String(id)) => Some(id.clone()),
        ("tool", _) => return Err(Problem::invalid(param("tool_call_id"), "must be the id of a call before it")),
        _ => None,
    };
    let name = given["name"].as_str().map(str::to_owned);
    Ok(Message { role: role.to_owned(), content, tool_calls, tool_call_id, name })
}

fn call(param: &str, given: &Value) -> Result<ToolCall, Problem> {
    if !(given["type"] == "function" || given["type"].is_null()) {
        return Err(Problem::invalid(format!("{param}.type"), "must be \"function\""));
    }
    let text = |field: &str, value: &Value| {
        let text = value.as_str().map(str::to_owned);
        text.ok_or_else(|| Problem::invalid(format!("{param}.{field}"), "must be a string"))
    };
    let id = text("id", &given["id"])?;
    let name = text("function.name", &given["function"]["name"])?;
    let arguments = text("function.arguments", &given["function"]["arguments"])?;
    let arguments = serde_json::from_str(&arguments).ok().filter(Value::is_object);
    let arguments = arguments.ok_or_else(|| {
        Problem::invalid(format!("{param}.function.arguments"), "must be a string with the JSON of an object")
    })?;
    Ok(ToolCall { id, function: CalledFunction { name, arguments } })
}

/// Refuses results of calls that were not made.
fn check_results(messages: &[Message]) -> Result<(), Problem> {
    let mut made = BTreeSet::new();
    for (index, message) in messages.iter().enumerate() {
        made.extend(message.tool_calls.iter().map(|call| &call.id));
        if let Some(id) = message.tool_call_id.as_ref().filter(|id| !made.contains(id)) {
            let problem = format!("{id:?} is the id of no call before it");
            return Err(Problem::invalid(format!("messages[{index}].tool_call_id"), problem));
        }
    }
    Ok(())
}

fn part<'a>(param: &str, given: &'a Value) -> Result<&'a str, Problem> {
    match given["type"].as_str() {
        Some("text") => {
            given["text"].as_str().ok_or_else(|| Problem::invalid(format!("{param}.text"), "must be a string"))
        }
        Some(other) => {
            let problem = format!("{other:?} is not supported in this version, it must be \"text\"");
            Err(Problem::invalid(format!("{param}.type"), problem))
        }
        None => Err(Problem::invalid(format!("{param}.type"), "must be \"text\"")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_prompt_has_four_forms() {
        let text = |text: &str| Prompt::Text(text.into());
        let cases = [
            (json!("a"), vec![("prompt", text("a"))]),
            (json!(["a", "b"]), vec![("prompt[0]", text("a")), ("prompt[1]", text("b"))]),
            (json!([1, 2]), vec![("prompt", Prompt::Ids(vec![1, 2]))]),
            (json!([[1], [2, 3]]), vec![("prompt[0]", Prompt::Ids(vec![1])), ("prompt[1]", Prompt::Ids(vec![2, 3]))]),
        ];
        for (given, expected) in cases {
            let expected = expected.into_iter().map(|(param, prompt)| (param.to_owned(), prompt)).collect();
            assert_eq!(of_completion(&given), Ok(expected));
        }
    }

    #[test]
    fn a_bad_prompt_is_blamed_by_its_place() {
        let cases = [
            (Value::Null, "prompt"),
            (json!(5), "prompt"),
            (json!([]), "prompt"),
            (json!(""), "prompt"),
            (json!(["a", ""]), "prompt[1]"),
            (json!([[1], []]), "prompt[1]"),
            (json!([1, "a"]), "prompt"),
            (json!([1, -1]), "prompt"),
            (json!(["a", 1]), "prompt[1]"),
            (json!([[1], [1.5]]), "prompt[1]"),
        ];
        for (given, param) in cases {
            assert_eq!(of_completion(&given).unwrap_err().param.as_deref(), Some(param), "{given}");
        }
    }

    #[test]
    fn messages_are_text_from_a_known_role() {
        let given = json!([
            {"role": "developer", "content": "a"},
            {"role": "user", "content": [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}], "name": "x"},
            {"role": "assistant", "content": "d", "tool_calls": null},
        ]);
        let message = |role: &str, content: &str| Message {
            role: role.into(),
            content: Some(content.into()),
            ..Message::default()
        };
        let user = Message { name: Some("x".into()), ..message("user", "b\nc") };
        assert_eq!(of_chat(&given), Ok(vec![message("system", "a"), user, message("assistant", "d")]));
    }

    #[test]
    fn calls_and_their_results_are_part_of_a_conversation() {
        let given = json!([
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": null, "tool_calls": [
                {"id": "i", "type": "function", "function": {"name": "f", "arguments": "{\"z\": 1, \"a\": 2}"}},
            ]},
            {"role": "tool", "tool_call_id": "i", "content": "b"},
        ]);
        let messages = of_chat(&given).unwrap();
        let function = CalledFunction { name: "f".into(), arguments: json!({"z": 1, "a": 2}) };
        assert_eq!(messages[1].tool_calls, [ToolCall { id: "i".into(), function }]);
        assert_eq!((messages[1].content.as_ref(), messages[2].tool_call_id.as_deref()), (None, Some("i")));
    }

    #[test]
    fn a_bad_message_is_blamed_by_its_place() {
        let user = |content: Value| json!([{"role": "user", "content": content}]);
        let calls = |call: Value| json!([{"role": "assistant", "content": null, "tool_calls": [call]}]);
        let cases = [
            (Value::Null, "messages"),
            (json!([]), "messages"),
            (json!("a"), "messages"),
            (json!(["a"]), "messages[0].role"),
            (json!([{"role": "function", "content": "a"}]), "messages[0].role"),
            (json!([{"role": "tool", "content": "a"}]), "messages[0].tool_call_id"),
            (json!([{"role": "tool", "content": "a", "tool_call_id": "i"}]), "messages[0].tool_call_id"),
            (json!([{"role": "user", "content": "a", "tool_calls": []}]), "messages[0].tool_calls"),
            (json!([{"role": "assistant", "tool_calls": []}]), "messages[0].content"),
            (calls(json!({"type": "custom"})), "messages[0].tool_calls[0].type"),
            (calls(json!({"function": {"name": "f", "arguments": "{}"}})), "messages[0].tool_calls[0].id"),
            (calls(json!({"id": "i"})), "messages[0].tool_calls[0].function.name"),
            (calls(json!({"id": "i", "function": {"name": "f"}})), "messages[0].tool_calls[0].function.arguments"),
            (
                calls(json!({"id": "i", "function": {"name": "f", "arguments": "{\"a\""}})),
                "messages[0].tool_calls[0].function.arguments",
            ),
            (json!([{"role": "assistant", "content": "a", "function_call": {}}]), "messages[0].function_call"),
            (user(Value::Null), "messages[0].content"),
            (user(json!([{"type": "image_url"}])), "messages[0].content[0].type"),
            (user(json!([{"type": "text", "text": "a"}, {"type": "input_audio"}])), "messages[0].content[1].type"),
            (user(json!([{"type": "text"}])), "messages[0].content[0].text"),
            (user(json!(["a"])), "messages[0].content[0].type"),
        ];
        for (given, param) in cases {
            assert_eq!(of_chat(&given).unwrap_err().param.as_deref(), Some(param), "{given}");
        }
    }
}
