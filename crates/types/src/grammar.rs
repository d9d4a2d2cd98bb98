//! What a completion must be, when it may not be any text. Plain data: what it allows token by token is worked out where the
//! tokens are known.

use std::fmt;

/// The limits on grammars.
pub mod grammar_limits {
    /// Longest schema, in bytes.
    pub const SCHEMA_BYTES: usize = 64 << 10;
    /// Longest regular expression or Lark grammar, in bytes.
    pub const TEXT_BYTES: usize = 16 << 10;
    /// Deepest nesting of a schema's objects and lists.
    pub const DEPTH: usize = 64;
    /// Most tools of a request.
    pub const TOOLS: usize = 128;
    /// Most bytes of all tools of a request together, as the request writes them.
    pub const TOOLS_BYTES: usize = 256 << 10;
}

/// What a completion must be.
#[derive(Clone, PartialEq, Eq)]
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
#[derive(Clone, PartialEq, Eq)]
pub struct Calls {
    /// Which there are, at least one.
    pub tools: Vec<Tool>,
    /// Whether there may be more than one call.
    pub several: bool,
    /// What it may be instead.
    pub otherwise: Otherwise,
}

/// A tool that may be called.
#[derive(Clone, PartialEq, Eq)]
pub struct Tool {
    /// Letters, digits, `_` and `-`.
    pub name: String,
    /// What its arguments must be: an object.
    pub arguments: JsonSchema,
}

/// What a completion may be instead of calls.
#[derive(Clone, PartialEq, Eq)]
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
#[error("it has {bytes} bytes, it may have at most {most}")]
pub struct GrammarTooLong {
    bytes: usize,
    most: usize,
}

impl JsonSchema {
    /// Any object.
    pub fn object() -> Self {
        Self { text: r#"{"type": "object"}"#.into(), strict: true }
    }

    fn validate(&self) -> Result<(), GrammarTooLong> {
        at_most(self.text.len(), grammar_limits::SCHEMA_BYTES)
    }
}

impl Grammar {
    /// Refuses what is too long.
    pub fn validate(&self) -> Result<(), GrammarTooLong> {
        match self {
            Self::Json(schema) => schema.validate(),
            Self::Regex(text) | Self::Lark(text) => at_most(text.len(), grammar_limits::TEXT_BYTES),
            Self::Calls(calls) => {
                if let Otherwise::Json(schema) = &calls.otherwise {
                    schema.validate()?;
                }
                calls.tools.iter().try_for_each(|tool| tool.arguments.validate())?;
                let bytes = calls.tools.iter().map(|tool| tool.arguments.text.len()).sum();
                at_most(bytes, grammar_limits::TOOLS_BYTES)
            }
        }
    }
}

fn at_most(bytes: usize, most: usize) -> Result<(), GrammarTooLong> {
    if bytes > most { Err(GrammarTooLong { bytes, most }) } else { Ok(()) }
}

impl fmt::Debug for Grammar {
    /// Never shows the grammar: it is a client's.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Json(schema) => write!(f, "Json({schema:?})"),
            Self::Regex(text) => write!(f, "Regex({} bytes)", text.len()),
            Self::Lark(text) => write!(f, "Lark({} bytes)", text.len()),
            Self::Calls(calls) => write!(f, "Calls({} tools)", calls.tools.len()),
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
        let longest = "a".repeat(grammar_limits::TEXT_BYTES);
        let longer = format!("{longest}a");
        assert_eq!(Grammar::Regex(longest).validate(), Ok(()));
        let error = Grammar::Lark(longer.clone()).validate().unwrap_err();
        assert_eq!(error.to_string(), "it has 16385 bytes, it may have at most 16384");
        let schema = |text: String| JsonSchema { text, strict: false };
        assert_eq!(Grammar::Json(schema(longer.clone())).validate(), Ok(()));
        let calls = |count: usize, text: &str| {
            let tools = vec![Tool { name: "f".into(), arguments: schema(text.into()) }; count];
            Grammar::Calls(Calls { tools, several: true, otherwise: Otherwise::Text }).validate()
        };
        assert!(calls(1, &longer.repeat(4)).is_err());
        assert_eq!(calls(15, &longer), Ok(()));
        assert!(calls(16, &longer).is_err());
    }
}
