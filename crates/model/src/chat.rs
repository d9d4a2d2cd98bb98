//! The chat template of a checkpoint folder: messages to the text the model continues.
//!
//! Templates are Jinja and come with the checkpoint, so they run with limits and reach nothing but what they are given.

use std::path::Path;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, Error, ErrorKind};
use serde::{Deserialize, Serialize};

/// Steps a template may take.
const FUEL: u64 = 1_000_000;

/// One message of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user` or `assistant`; templates may know more.
    pub role: String,
    /// The text.
    pub content: String,
}

/// A compiled template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos_token: String,
    eos_token: String,
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
            Err(_) => serde_json::Value::Null,
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
        environment
            .add_template_owned("chat", template)
            .map_err(|error| ChatError::Load { file, problem: error.to_string() })?;
        let token = |name: &str| {
            let token = &config[name];
            token.as_str().or(token["content"].as_str()).unwrap_or_default().to_owned()
        };
        Ok(Some(Self { environment, bos_token: token("bos_token"), eos_token: token("eos_token") }))
    }

    /// The text of a conversation, ready for the model's answer. It has its special tokens already.
    pub fn render(&self, messages: &[Message]) -> Result<String, ChatError> {
        let template = self.environment.get_template("chat").expect("it was added when this was made");
        let context =
            Context { messages, bos_token: &self.bos_token, eos_token: &self.eos_token, add_generation_prompt: true };
        template.render(Serde(context)).map_err(|error| ChatError::Render(error.to_string()))
    }
}

/// A single template, or the one named `default` among several.
fn in_config(value: &serde_json::Value) -> Option<&str> {
    let named = || value.as_array()?.iter().find(|template| template["name"] == "default")?["template"].as_str();
    value.as_str().or_else(named)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(role: &str, content: &str) -> Message {
        Message { role: role.into(), content: content.into() }
    }

    #[test]
    fn the_bundled_models_template_joins_the_messages() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/demo");
        let template = ChatTemplate::load(&folder).unwrap().unwrap();
        assert_eq!(template.render(&[message("user", "The kernel")]).unwrap(), "<s>The kernel");
        assert_eq!(template.render(&[message("user", "a"), message("assistant", "b")]).unwrap(), "<s>a\nb");
    }

    #[test]
    fn a_template_may_refuse_and_may_not_run_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        let render = |template: &str| {
            std::fs::write(dir.path().join("chat_template.jinja"), template).unwrap();
            ChatTemplate::load(dir.path()).map(|t| t.unwrap().render(&[message("user", "x")]))
        };
        assert!(render("{{ raise_exception('no') }}").unwrap().unwrap_err().to_string().contains("no"));
        let endless = "{% for a in range(9999) %}{% for b in range(9999) %}x{% endfor %}{% endfor %}";
        assert!(render(endless).unwrap().is_err());
        assert!(render("{% if %}").is_err());
    }
}
