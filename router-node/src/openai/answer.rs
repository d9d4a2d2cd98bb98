//! What stands around the choices of an answer, whole or in pieces.

use serde_json::{Value, json};
use sirocco_types::{ModelIdentity, Usage};

use super::choice::Kind;

/// What every piece of an answer repeats.
#[derive(Clone, Debug)]
pub(super) struct Head {
    kind: Kind,
    id: String,
    model: String,
    fingerprint: String,
    created: u64,
}

impl Head {
    /// The head of the answer to request `request` about `model`.
    pub(super) fn new(kind: Kind, request: &str, model: &ModelIdentity) -> Self {
        let prefix = match kind {
            Kind::Completion => "cmpl",
            Kind::Chat => "chatcmpl",
        };
        Self {
            kind,
            id: format!("{prefix}-{request}"),
            model: model.name.clone(),
            fingerprint: format!("fp_{}", model.fingerprint.short()),
            created: now(),
        }
    }

    /// A whole answer.
    pub(super) fn whole(&self, choices: Vec<Value>, usage: Usage) -> Value {
        let object = match self.kind {
            Kind::Completion => "text_completion",
            Kind::Chat => "chat.completion",
        };
        let mut answer = self.around(object, choices);
        answer["usage"] = total(usage);
        answer
    }

    /// A piece of a streamed answer.
    pub(super) fn piece(&self, choices: Vec<Value>) -> Value {
        let object = match self.kind {
            Kind::Completion => "text_completion",
            Kind::Chat => "chat.completion.chunk",
        };
        self.around(object, choices)
    }

    /// One for tests.
    #[cfg(test)]
    pub(super) fn example(kind: Kind) -> Self {
        Self { kind, id: "cmpl-1".into(), model: "m".into(), fingerprint: "fp_0".into(), created: 5 }
    }

    fn around(&self, object: &str, choices: Vec<Value>) -> Value {
        let mut answer = json!({
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        });
        answer["choices"] = choices.into();
        answer
    }
}

/// Usage in OpenAI's shape.
pub(super) fn total(usage: Usage) -> Value {
    json!({
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    })
}

/// Seconds since 1970.
pub(super) fn now() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |now| now.as_secs())
}
