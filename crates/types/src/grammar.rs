//! What a completion must be, when it may not be any text. Plain data: what it allows token by token is worked out where the
//! tokens are known.

use std::fmt;

/// The limits on grammars.
pub mod grammar_limits {
    /// Longest schema, regular expression or Lark grammar, in bytes.
    pub const BYTES: usize = 64 << 10;
    /// Deepest nesting of a schema's objects and lists.
    pub const DEPTH: usize = 64;
    /// Most tools of a request.
    pub const TOOLS: usize = 128;
    /// Most bytes of all tools of a request together.
    pub const TOOLS_BYTES: usize = 256 << 10;
}

/// What a completion must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Grammar {
    /// JSON.
    Json(JsonSchema),
    /// Text that a regular expression matches as a whole.
    Regex(String),
    /// Text of a grammar in llguidance's variant of Lark.
    Lark(String),
    /// Calls of tools.
    Calls(Calls),
}

/// Which JSON is meant. It is written on one line, with a space after each comma and colon.
#[derive(Clone, PartialEq, Eq)]
pub struct JsonSchema {
    /// The schema in JSON.
    pub text: String,
    /// Refuse a schema with keywords that cannot be honoured, rather than ignore them.
    pub strict: bool,
}

/// A completion that calls tools.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Calls {
    /// Which there are, at least one.
    pub tools: Vec<Tool>,
    /// Whether there may be more than one call.
    pub several: bool,
    /// What it may be instead.
    pub otherwise: Otherwise,
}

/// A tool that may be called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tool {
    /// Letters, digits, `_` and `-`.
    pub name: String,
    /// What its arguments must be: an object.
    pub arguments: JsonSchema,
}

/// What a completion may be instead of calls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Otherwise {
    /// Nothing else.
    Nothing,
    /// Any text that does not begin like calls.
    Text,
    /// JSON.
    Json(JsonSchema),
}

/// A grammar that is too long to be considered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it has {0} bytes, it may have at most {max}", max = grammar_limits::BYTES)]
pub struct GrammarTooLong(usize);

impl JsonSchema {
    /// Any object.
    pub fn object() -> Self {
        Self { text: r#"{"type": "object"}"#.into(), strict: true }
    }
}

impl Grammar {
    /// Refuses what is too long.
    pub fn validate(&self) -> Result<(), GrammarTooLong> {
        let texts: Vec<&str> = match self {
            Self::Json(schema) => vec![&schema.text],
            Self::Regex(text) | Self::Lark(text) => vec![text],
            Self::Calls(calls) => {
                let otherwise = match &calls.otherwise {
                    Otherwise::Json(schema) => Some(schema),
                    Otherwise::Nothing | Otherwise::Text => None,
                };
                let schemas = calls.tools.iter().map(|tool| &tool.arguments).chain(otherwise);
                schemas.map(|schema| schema.text.as_str()).collect()
            }
        };
        match texts.into_iter().map(str::len).find(|bytes| *bytes > grammar_limits::BYTES) {
            Some(bytes) => Err(GrammarTooLong(bytes)),
            None => Ok(()),
        }
    }
}

impl fmt::Debug for JsonSchema {
    /// Never shows the schema: it is a client's.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "JsonSchema({} bytes)", self.text.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grammar_has_a_longest_length() {
        let longest = "a".repeat(grammar_limits::BYTES);
        let longer = format!("{longest}a");
        assert_eq!(Grammar::Regex(longest).validate(), Ok(()));
        let error = Grammar::Lark(longer.clone()).validate().unwrap_err();
        assert_eq!(error.to_string(), "it has 65537 bytes, it may have at most 65536");
        let arguments = JsonSchema { text: longer, strict: false };
        let tools = vec![Tool { name: "f".into(), arguments }];
        assert!(Grammar::Calls(Calls { tools, several: true, otherwise: Otherwise::Text }).validate().is_err());
    }
}
