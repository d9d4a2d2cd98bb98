//! The chat template of a checkpoint folder: messages to the text the model continues.
//!
//! Templates are Jinja and come with the checkpoint, so they run with limits and reach nothing but what they are given. Those
//! that know tools get them as Hugging Face's get them; for others `plain` writes them into the messages.

mod plain;

use std::path::Path;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{Environment, Error, ErrorKind};
use serde::Serialize;
use serde_json::Value;

/// Steps a template may take.
const FUEL: u64 = 1_000_000;

/// One message of a conversation.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Message {
    /// `system`, `user`, `assistant` or `tool`; templates may know more.
    pub role: String,
    /// The text; none in an answer that only calls tools.
    pub content: Option<String>,
    /// The tools that an answer calls.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCall>,
    /// The call whose result this is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tool_call_id: Option<String>,
    /// Who speaks, or which tool this is the result of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// A call of a tool in an answer.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "type", rename = "function")]
pub struct ToolCall {
    /// Names it for its result.
    pub id: String,
    /// Which tool, and with what.
    pub function: CalledFunction,
}

/// What is called.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CalledFunction {
    /// The tool's name.
    pub name: String,
    /// An object, by the tool's schema.
    pub arguments: Value,
}

/// A compiled template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos_token: String,
    eos_token: String,
    knows_tools: bool,
}

/// A template that cannot be read or refuses its messages.
#[derive(Debug, thiserror::Error)]
pub enum ChatError {
    /// The file is not valid.
    #[error("{file}: {problem}")]
    Load {
        /// Its name.
        file: &'static str,
        /// What is wrong.
        problem: String,
    },
    /// The template failed on these messages.
    #[error("the chat template: {0}")]
    Render(String),
}

/// What a template sees.
#[derive(Serialize)]
struct Context<'a> {
    messages: &'a [Message],
    tools: Option<&'a [Value]>,
    bos_token: &'a str,
    eos_token: &'a str,
    add_generation_prompt: bool,
}

impl ChatTemplate {
    /// Reads the folder's template; none when it has none.
    pub fn load(folder: &Path) -> Result<Option<Self>, ChatError> {
        const CONFIG: &str = "tokenizer_config.json";
        const FILE: &str = "chat_template.jinja";
        let config = match std::fs::read(folder.join(CONFIG)) {
            Ok(text) => serde_json::from_slice(&text)
                .map_err(|error| ChatError::Load { file: CONFIG, problem: error.to_string() })?,
            Err(_) => Value::Null,
        };
        let (file, template) = match std::fs::read_to_string(folder.join(FILE)) {
            Ok(template) => (FILE, template),
            Err(_) => match in_config(&config["chat_template"]) {
                Some(template) => (CONFIG, template.to_owned()),
                None => return Ok(None),
            },
        };
        let mut environment = Environment::new();
        environment.set_fuel(Some(FUEL));
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|error| ChatError::Load { file, problem: error.to_string() })?);
        environment.add_function("raise_exception", |message: String| -> Result<String, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_filter("tojson", |value: minijinja::Value, options: Kwargs| plain::to_json(&value, &options));
        let knows_tools = template.contains("tools") && template.contains("tool_calls");
        environment
            .add_template_owned("chat", template)
            .map_err(|error| ChatError::Load { file, problem: error.to_string() })?;
        let token = |name: &str| {
            let token = &config[name];
            token.as_str().or(token["content"].as_str()).unwrap_or_default().to_owned()
        };
        Ok(Some(Self { environment, bos_token: token("bos_token"), eos_token: token("eos_token"), knows_tools }))
    }

    /// The text of a conversation, ready for the model's answer, in which it may call `tools`, given as OpenAI's API takes them. It
    /// has its special tokens already.
    pub fn render(&self, messages: &[Message], tools: &[Value]) -> Result<String, ChatError> {
        let template = self.environment.get_template("chat").expect("it was added when this was made");
        let plain;
        let (messages, tools) = if self.knows_tools {
            (messages, (!tools.is_empty()).then_some(tools))
        } else {
            plain = plain::without_tools(messages, tools);
            (plain.as_slice(), None)
        };
        let context = Context {
            messages,
            tools,
            bos_token: &self.bos_token,
            eos_token: &self.eos_token,
            add_generation_prompt: true,
        };
        template.render(Serde(context)).map_err(|error| ChatError::Render(error.to_string()))
    }
}

/// A single template, or the one named `default` among several.
fn in_config(value: &Value) -> Option<&str> {
    let named = || value.as_array()?.iter().find(|template| template["name"] == "default")?["template"].as_str();
    value.as_str().or_else(named)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn message(role: &str, content: &str) -> Message {
        Message { role: role.into(), content: Some(content.into()), ..Message::default() }
    }

    #[test]
    fn the_bundled_models_template_joins_the_messages() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/demo");
        let template = ChatTemplate::load(&folder).unwrap().unwrap();
        assert_eq!(template.render(&[message("user", "The kernel")], &[]).unwrap(), "<s>The kernel");
        assert_eq!(template.render(&[message("user", "a"), message("assistant", "b")], &[]).unwrap(), "<s>a\nb");
    }

    #[test]
    fn a_template_may_refuse_and_may_not_run_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        let render = |template: &str| {
            std::fs::write(dir.path().join("chat_template.jinja"), template).unwrap();
            ChatTemplate::load(dir.path()).map(|t| t.unwrap().render(&[message("user", "x")], &[]))
        };
        assert!(render("{{ raise_exception('no') }}").unwrap().unwrap_err().to_string().contains("no"));
        let endless = "{% for a in range(9999) %}{% for b in range(9999) %}x{% endfor %}{% endfor %}";
        assert!(render(endless).unwrap().is_err());
        assert!(render("{% if %}").is_err());
    }
    #[test]
    fn a_template_that_knows_tools_gets_them_as_hugging_face_gives_them() {
        // The loops of Mistral 7B Instruct v0.3's template.
        let template = "{% if tools %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}\
            {% for message in messages %}{% if message.tool_calls is defined and message.tool_calls is not none %}\
            [TOOL_CALLS] [{% for call in message.tool_calls %}{{ (call.function | tojson)[:-1] }}, \"id\": \"{{ call.id }}\"}\
            {% if not loop.last %}, {% endif %}{% endfor %}]{% elif message.role == 'tool' %}[TOOL_RESULTS] \
            {{ {'content': message.content, 'call_id': message.tool_call_id} | tojson }}[/TOOL_RESULTS]\
            {% else %}{{ message.role }}: {{ message.content }}{% endif %}{% endfor %}";
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("chat_template.jinja"), template).unwrap();
        let template = ChatTemplate::load(dir.path()).unwrap().unwrap();
        let tools = [json!({"type": "function", "function": {"name": "f", "parameters": {"z": 1, "a": "<é'>"}}})];
        let function = CalledFunction { name: "f".into(), arguments: json!({"z": 1, "a": [true, null]}) };
        let call = ToolCall { id: "a1b2c3d4e".into(), function };
        let messages = [
            message("user", "x"),
            Message { content: None, tool_calls: vec![call], ..message("assistant", "") },
            Message { tool_call_id: Some("a1b2c3d4e".into()), ..message("tool", "21") },
        ];
        let expected = "[AVAILABLE_TOOLS] [{\"type\": \"function\", \"function\": {\"name\": \"f\", \"parameters\": \
            {\"z\": 1, \"a\": \"<é'>\"}}}][/AVAILABLE_TOOLS]user: x\
            [TOOL_CALLS] [{\"name\": \"f\", \"arguments\": {\"z\": 1, \"a\": [true, null]}, \"id\": \"a1b2c3d4e\"}]\
            [TOOL_RESULTS] {\"content\": \"21\", \"call_id\": \"a1b2c3d4e\"}[/TOOL_RESULTS]";
        assert_eq!(template.render(&messages, &tools).unwrap(), expected);
        assert_eq!(template.render(&messages[..1], &[]).unwrap(), "user: x");
    }
}
