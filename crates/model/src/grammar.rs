//! Keeps completions within a grammar: which tokens may come next, given those that came.
//!
//! Built on llguidance, which follows a grammar byte by byte over the trie of all tokens. [`Grammars`] holds that trie, once for
//! a model; [`Grammars::compile`] makes a [`Constraint`], which follows one sequence. A constraint depends on its grammar and its
//! own tokens only, never on other sequences or on time, and allows every way to cut what the grammar allows into tokens. What
//! it may cost is limited, in compiling and at each token.

use std::fmt;
use std::sync::Arc;

use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, INVALID_TOKEN, SimpleVob, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};
use sirocco_compute::TokenSet;
use sirocco_types::{Grammar, JsonSchema, ModelSpec, Otherwise, grammar_limits};

use crate::calls;
use crate::tokenizer::{Tokenizer, TokenizerError};

/// States of a grammar's lexer, at one or two KiB each.
const LEXER_STATES: usize = 10_000;
/// Lexer work for one token, at 14,000 a millisecond; half of llguidance's default.
const STEP_FUEL: u64 = 100_000;
/// llguidance goes down recursively into what refers to something that refers to something else. What fits the limits on lengths
/// was seen to take a tenth of this.
const COMPILE_STACK_BYTES: usize = 256 << 20;
/// Longest reason repeated to a client, in characters.
const REASON_CHARS: usize = 300;

/// What constraints of one model are made with.
pub struct Grammars {
    factory: ParserFactory,
    calls: calls::Marker,
}

/// A sequence's grammar and how far the sequence has come in it.
pub struct Constraint {
    matcher: Matcher,
    /// How many tokens came.
    tokens: usize,
}

/// A grammar that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct GrammarError {
    /// Of several tools the one whose arguments are to blame.
    pub tool: Option<usize>,
    /// What is wrong.
    pub reason: String,
}

/// A grammar that a sequence cannot be kept in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConstraintError {
    /// The work for one token is limited.
    #[error("the grammar has become too complex to follow at token {0}")]
    TooComplex(usize),
    /// The model has no token for what must come.
    #[error("the grammar allows no token of the model at token {0}")]
    NoToken(usize),
    /// A token that the grammar does not allow.
    #[error("token {index} of the completion, id {id}, is not allowed by the grammar")]
    NotAllowed {
        /// Its place, from 0.
        index: usize,
        /// Its id.
        id: u32,
    },
}

impl Grammars {
    /// Reads the bytes of all tokens. Fails for tokenizers whose tokens are not made of bytes.
    pub fn new(tokenizer: &Tokenizer, spec: &ModelSpec) -> Result<Self, TokenizerError> {
        let tokens = tokenizer.token_bytes()?;
        let eos = &spec.eos_token_ids;
        let info = TokRxInfo::new(tokens.len() as u32, eos.first().copied().unwrap_or(INVALID_TOKEN));
        let mut trie = TokTrie::from(&info, &tokens);
        if !eos.is_empty() {
            trie = trie.with_eos_tokens(eos);
        }
        let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory =
            ParserFactory::new_simple(&env).map_err(|error| TokenizerError::Load(reason(&error.to_string())))?;
        factory.quiet();
        let limits = factory.limits_mut();
        limits.max_lexer_states = LEXER_STATES;
        limits.step_lexer_fuel = STEP_FUEL;
        limits.verbose_errors = false;
        Ok(Self { factory, calls: calls::Marker::of(tokenizer) })
    }

    /// A constraint at its beginning. Takes milliseconds for usual grammars and is bounded for all; runs on a thread of its own,
    /// for the sake of its stack.
    pub fn compile(&self, grammar: &Grammar) -> Result<Constraint, GrammarError> {
        let compiled = std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("grammar".into()).stack_size(COMPILE_STACK_BYTES);
            let thread =
                thread.spawn_scoped(scope, || self.compile_here(grammar)).map_err(|error| error.to_string())?;
            thread.join().map_err(|_| "the grammar could not be compiled".to_owned())
        });
        compiled.unwrap_or_else(|reason| Err(GrammarError { tool: None, reason }))
    }

    fn compile_here(&self, grammar: &Grammar) -> Result<Constraint, GrammarError> {
        let blameless = |reason| GrammarError { tool: None, reason };
        grammar.validate().map_err(|error| blameless(error.to_string()))?;
        let whole = match grammar {
            Grammar::Json(schema) => TopLevelGrammar::from_json_schema(read(schema).map_err(blameless)?),
            Grammar::Regex(regex) => TopLevelGrammar::from_regex(regex),
            Grammar::Lark(lark) => TopLevelGrammar::from_lark(lark.clone()),
            Grammar::Calls(calls) => {
                let mut arguments = Vec::with_capacity(calls.tools.len());
                for (index, tool) in calls.tools.iter().enumerate() {
                    let schema = read(&tool.arguments);
                    arguments.push(schema.map_err(|reason| GrammarError { tool: Some(index), reason })?);
                }
                let otherwise = match &calls.otherwise {
                    Otherwise::Nothing => calls::Instead::Nothing,
                    Otherwise::Text => calls::Instead::Text,
                    Otherwise::Json(schema) => calls::Instead::Json(read(schema).map_err(blameless)?),
                };
                TopLevelGrammar::from_lark(calls::lark(self.calls, calls, &arguments, &otherwise))
            }
        };
        self.start(whole).map_err(|reason| {
            let tools = match grammar {
                Grammar::Calls(calls) => calls.tools.as_slice(),
                _ => &[],
            };
            let bad = |schema: &JsonSchema| self.compile_here(&Grammar::Json(schema.clone())).err();
            let found = tools.iter().enumerate().find_map(|(index, tool)| Some((index, bad(&tool.arguments)?.reason)));
            match found {
                Some((index, reason)) => GrammarError { tool: Some(index), reason },
                None => blameless(reason),
            }
        })
    }

    fn start(&self, grammar: TopLevelGrammar) -> Result<Constraint, String> {
        let parser = self.factory.create_parser(grammar).map_err(|error| reason(&format!("{error:#}")))?;
        let mut constraint = Constraint { matcher: Matcher::new(Ok(parser)), tokens: 0 };
        // What cannot even begin is refused before it takes a place in the queue.
        constraint.mask().map_err(|error| error.to_string())?;
        Ok(constraint)
    }
}

impl Constraint {
    /// What may come next, at least one token. An end-of-sequence token may only where the grammar may end.
    pub fn mask(&mut self) -> Result<TokenSet, ConstraintError> {
        let mask: SimpleVob = self.matcher.compute_mask_or_eos().map_err(|_| self.failure())?;
        Ok(Vec::from(mask).into())
    }

    /// Takes in the next token.
    pub fn commit(&mut self, id: u32) -> Result<(), ConstraintError> {
        self.take_in(&[id])
    }

    /// Takes in tokens that the sequence has already, so that it goes on after them.
    pub fn take_in(&mut self, ids: &[u32]) -> Result<(), ConstraintError> {
        let taken = self.matcher.try_consume_tokens(ids).map_err(|_| self.failure())?;
        self.tokens += taken;
        match ids.get(taken) {
            Some(id) => Err(ConstraintError::NotAllowed { index: self.tokens, id: *id }),
            None => Ok(()),
        }
    }

    /// Whether the grammar allows nothing more, or the end of the sequence has come.
    pub fn is_finished(&self) -> bool {
        self.matcher.is_stopped()
    }

    fn failure(&self) -> ConstraintError {
        use llguidance::api::StopReason::{NoExtension, NoExtensionBias};
        match self.matcher.stop_reason() {
            NoExtension | NoExtensionBias => ConstraintError::NoToken(self.tokens),
            _ => ConstraintError::TooComplex(self.tokens),
        }
    }
}

impl Clone for Constraint {
    /// Shares nothing with the original, so that what one sequence costs is not charged to another.
    fn clone(&self) -> Self {
        Self { matcher: self.matcher.deep_clone(), tokens: self.tokens }
    }
}

impl fmt::Debug for Constraint {
    /// Never shows the grammar or what came: both are a client's.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Constraint")
    }
}

impl fmt::Debug for Grammars {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Grammars")
    }
}

/// The schema, with what decides how its JSON is written. A client's own settings are not heeded.
fn read(schema: &JsonSchema) -> Result<Value, String> {
    let value: Value = serde_json::from_str(&schema.text).map_err(|error| format!("it is not JSON: {error}"))?;
    if depth(&value) > grammar_limits::DEPTH {
        return Err(format!("it is nested more than {} deep", grammar_limits::DEPTH));
    }
    let Value::Object(mut fields) = value else {
        return Err("it must be an object".into());
    };
    fields.insert(
        "x-guidance".into(),
        json!({"whitespace_flexible": false, "item_separator": ", ", "key_separator": ": ", "lenient": !schema.strict}),
    );
    Ok(Value::Object(fields))
}

fn depth(value: &Value) -> usize {
    match value {
        Value::Array(items) => 1 + items.iter().map(depth).max().unwrap_or(0),
        Value::Object(fields) => 1 + fields.values().map(depth).max().unwrap_or(0),
        _ => 0,
    }
}

/// The part of llguidance's message that a client can use: without the parser's state and backtraces.
fn reason(message: &str) -> String {
    let message = message.split("\n<").next().unwrap_or_default().trim();
    let mut short: String = message.chars().take(REASON_CHARS).collect();
    if short.len() < message.len() {
        short.push('…');
    }
    short
}
