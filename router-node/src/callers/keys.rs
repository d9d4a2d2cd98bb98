//! API keys and the file that says who has one, in TOML. Never holds a key itself, only its hash, and never shows either.
//!
//! A key is 256 bits from the system's randomness, so there is nothing to guess and one plain SHA-256 protects it: slow hashes
//! are for passwords that people choose, and would let everybody who reaches the port burn a router's time.

use std::num::NonZeroU32;
use std::ops::Range;

use jiff::Timestamp;
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use sirocco_types::Priority;
use toml::Spanned;

const PREFIX: &str = "sk-sirocco-";
const HASH_PREFIX: &str = "sha256:";
const NAME_BYTES: usize = 64;

/// One entry of the file.
#[derive(Clone, PartialEq, Eq)]
pub struct Entry {
    /// Names the caller in logs; unique in the file.
    pub name: String,
    /// What the caller may take.
    pub limits: Limits,
    /// The highest priority the caller's requests get.
    pub max_priority: Priority,
    /// When the key stops being good.
    pub expires: Option<Timestamp>,
    pub(super) hash: Hash,
}

/// SHA-256 of a key.
pub(super) type Hash = [u8; 32];

/// What one caller may take; no limit where there is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Requests in a minute.
    pub requests_per_minute: Option<NonZeroU32>,
    /// Tokens of prompts and completions in a minute.
    pub tokens_per_minute: Option<NonZeroU32>,
    /// Requests that are answered at once.
    pub concurrent_requests: Option<NonZeroU32>,
}

/// What is wrong with a file of keys, and where.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}{}: {problem}", .key.as_ref().map(|key| format!(", {key}")).unwrap_or_default())]
pub struct KeysError {
    line: usize,
    /// The key of that line, in TOML's sense.
    key: Option<String>,
    problem: String,
}

impl std::fmt::Debug for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Entry").field("name", &self.name).finish_non_exhaustive()
    }
}

/// A new key: to be told to its owner once, and its hash for the file.
pub struct NewKey {
    /// The key.
    pub secret: String,
    /// As the file has it.
    pub hash: String,
}

impl NewKey {
    /// Draws a key from the system's randomness. Errors: the system has none.
    pub fn generate() -> std::io::Result<Self> {
        let mut bytes = [0; 32];
        getrandom::fill(&mut bytes).map_err(std::io::Error::from)?;
        let secret = format!("{PREFIX}{}", hex(&bytes));
        let hash = format!("{HASH_PREFIX}{}", hex(&hash(secret.as_bytes())));
        Ok(Self { secret, hash })
    }
}

/// The hash of `key`.
pub(super) fn hash(key: &[u8]) -> Hash {
    Sha256::digest(key).into()
}

/// Refuses a name that cannot name a caller.
pub fn check_name(name: &str) -> Result<(), String> {
    let fits = |c: char| c.is_ascii_alphanumeric() || "._@-".contains(c);
    if (1..=NAME_BYTES).contains(&name.len()) && name.chars().all(fits) {
        return Ok(());
    }
    Err(format!("{name:?}, must be 1 to {NAME_BYTES} letters, digits and characters of . _ @ -"))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    key: Vec<Raw>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    name: Spanned<String>,
    hash: Spanned<String>,
    requests_per_minute: Option<NonZeroU32>,
    tokens_per_minute: Option<NonZeroU32>,
    concurrent_requests: Option<NonZeroU32>,
    #[serde(default)]
    max_priority: Priority,
    expires: Option<Spanned<String>>,
}

/// Reads the entries of a file of keys.
pub fn parse(text: &str) -> Result<Vec<Entry>, KeysError> {
    let at = |span: Option<Range<usize>>, problem: String| KeysError::at(text, span, problem);
    let file: File = toml::from_str(text).map_err(|error| at(error.span(), error.message().to_owned()))?;
    let mut entries: Vec<Entry> = Vec::with_capacity(file.key.len());
    for raw in file.key {
        let name = raw.name.get_ref();
        check_name(name).map_err(|problem| at(Some(raw.name.span()), problem))?;
        if entries.iter().any(|entry| entry.name == *name) {
            return Err(at(Some(raw.name.span()), format!("{name:?} is there already, names must be unique")));
        }
        let hash = parse_hash(raw.hash.get_ref()).ok_or_else(|| {
            let problem = format!("must be {HASH_PREFIX} and 64 hexadecimal digits, the SHA-256 of the key");
            at(Some(raw.hash.span()), problem)
        })?;
        let expires = match &raw.expires {
            Some(given) => Some(given.get_ref().parse().map_err(|_| {
                let problem = format!("{:?}, must be a time such as \"2030-01-31T12:00:00Z\"", given.get_ref());
                at(Some(given.span()), problem)
            })?),
            None => None,
        };
        let limits = Limits {
            requests_per_minute: raw.requests_per_minute,
            tokens_per_minute: raw.tokens_per_minute,
            concurrent_requests: raw.concurrent_requests,
        };
        entries.push(Entry { name: raw.name.into_inner(), hash, limits, max_priority: raw.max_priority, expires });
    }
    Ok(entries)
}

impl KeysError {
    /// Says where in `text` it is, never what stands there: it may be a key.
    fn at(text: &str, span: Option<Range<usize>>, problem: String) -> Self {
        let start = span.map_or(text.len(), |span| span.start);
        let before = text.get(..start).unwrap_or(text);
        let line = before.matches('\n').count();
        let shown = text.lines().nth(line).unwrap_or_default();
        let key = shown.split_once('=').map(|(key, _)| key.trim().to_owned());
        Self { line: line + 1, key, problem }
    }
}

fn parse_hash(text: &str) -> Option<Hash> {
    let digits = text.strip_prefix(HASH_PREFIX)?.as_bytes();
    let mut hash = Hash::default();
    if digits.len() != 2 * hash.len() {
        return None;
    }
    for (byte, pair) in hash.iter_mut().zip(digits.chunks(2)) {
        let digit = |digit: u8| char::from(digit).to_digit(16);
        *byte = (digit(pair[0])? * 16 + digit(pair[1])?) as u8;
    }
    Some(hash)
}

fn hex(bytes: &[u8]) -> String {
    let digits = bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]);
    digits.filter_map(|digit| char::from_digit(u32::from(digit), 16)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_key_is_in_the_file_by_its_hash_alone() {
        let (new, other) = (NewKey::generate().unwrap(), NewKey::generate().unwrap());
        assert_ne!(new.secret, other.secret);
        assert_eq!(new.secret.len(), PREFIX.len() + 64);
        let text = format!("[[key]]\nname = \"ada\"\nhash = \"{}\"\n", new.hash);
        let entry = parse(&text).unwrap().swap_remove(0);
        assert_eq!((entry.hash, entry.max_priority), (hash(new.secret.as_bytes()), Priority::Normal));
        assert!(!text.contains(&new.secret) && !format!("{entry:?}").contains("sha256"));
    }

    #[test]
    fn every_field_is_read() {
        let text = format!(
            "[[key]]\nname = \"ada\"\nhash = \"sha256:{}\"\nrequests_per_minute = 1\ntokens_per_minute = 2\n\
             concurrent_requests = 3\nmax_priority = \"high\"\nexpires = \"2030-01-31T12:00:00Z\"",
            "ab".repeat(32)
        );
        let entry = parse(&text).unwrap().swap_remove(0);
        let limits = Limits {
            requests_per_minute: NonZeroU32::new(1),
            tokens_per_minute: NonZeroU32::new(2),
            concurrent_requests: NonZeroU32::new(3),
        };
        assert_eq!((entry.limits, entry.max_priority, entry.hash), (limits, Priority::High, [0xab; 32]));
        assert_eq!(entry.expires.unwrap().to_string(), "2030-01-31T12:00:00Z");
    }

    #[test]
    fn a_mistake_is_named_by_its_line_and_key_and_what_stands_there_is_not_shown() {
        let good = format!("[[key]]\nname = \"ada\"\nhash = \"sha256:{}\"\n", "0".repeat(64));
        let cases = [
            ("[[key]]\nname = \"ada\"\nhash = \"sk-sirocco-1\"".to_owned(), "line 3, hash: must be sha256:"),
            ("[[key]]\nname = \"a b\"\nhash = \"\"".to_owned(), "line 2, name: \"a b\", must be"),
            (format!("{good}rpm = 5"), "line 4, rpm: unknown field `rpm`"),
            (format!("{good}requests_per_minute = 0"), "line 4, requests_per_minute: invalid value: integer `0`"),
            (format!("{good}max_priority = \"urgent\""), "line 4, max_priority: unknown variant `urgent`"),
            (format!("{good}expires = \"tomorrow\""), "line 4, expires: \"tomorrow\", must be a time"),
            (format!("{good}{good}"), "line 5, name: \"ada\" is there already"),
            ("[[key]]\nname = \"ada\"".to_owned(), "line 1: missing field `hash`"),
            ("[[keys]]".to_owned(), "line 1: unknown field `keys`"),
            ("[[key]]\nhash = \"sk-sirocco-1".to_owned(), "line 2, hash: "),
        ];
        for (text, message) in cases {
            let error = parse(&text).unwrap_err().to_string();
            assert!(error.starts_with(message), "{error:?} is not {message:?}");
            assert!(!error.contains("sk-"), "{error}");
        }
    }
}
