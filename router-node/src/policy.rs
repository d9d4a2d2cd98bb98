//! Who may call a router node and how much a request may ask for, as it is configured.

use std::path::PathBuf;
use std::time::Duration;

const REQUEST_TIMEOUT_S: u64 = 600;
const BODY_TIMEOUT_S: u64 = 30;
const MAX_BODY_BYTES: usize = 4 << 20;
const MAX_CHOICES: u32 = 16;
const MAX_CONNECTIONS: u32 = 1024;

/// What a router node lets in.
#[derive(Clone, Debug, PartialEq, Eq, clap::Args)]
pub struct Policy {
    /// File of API keys (TOML, see `sirocco keys`), followed when it changes [default: everybody may call]
    #[arg(long, env = "SIROCCO_API_KEYS", value_name = "FILE")]
    pub api_keys: Option<PathBuf>,
    /// Longest time for a request, in seconds, from its arrival to its last token; a request may ask for less
    #[arg(long, env = "SIROCCO_REQUEST_TIMEOUT_S", value_name = "SECONDS", default_value_t = REQUEST_TIMEOUT_S, value_parser = clap::value_parser!(u64).range(1..=604_800))]
    pub request_timeout_s: u64,
    /// Longest time for the body of a request over HTTP to arrive, in seconds
    #[arg(long, env = "SIROCCO_BODY_TIMEOUT_S", value_name = "SECONDS", default_value_t = BODY_TIMEOUT_S, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub body_timeout_s: u64,
    /// Longest body of a request, in bytes
    #[arg(long, env = "SIROCCO_MAX_BODY_BYTES", value_name = "BYTES", default_value_t = MAX_BODY_BYTES)]
    pub max_body_bytes: usize,
    /// Most choices of a request: prompts times n
    #[arg(long, env = "SIROCCO_MAX_CHOICES", value_name = "N", default_value_t = MAX_CHOICES, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_choices: u32,
    /// Longest prompt, in tokens [default: what the model's context has room for]
    #[arg(long, env = "SIROCCO_MAX_PROMPT_TOKENS", value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub max_prompt_tokens: Option<u32>,
    /// Longest completion, in tokens [default: what the model's context has room for]
    #[arg(long, env = "SIROCCO_MAX_COMPLETION_TOKENS", value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub max_completion_tokens: Option<u32>,
    /// HTTP connections at once; more wait until one ends
    #[arg(long, env = "SIROCCO_MAX_CONNECTIONS", value_name = "N", default_value_t = MAX_CONNECTIONS, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_connections: u32,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            api_keys: None,
            request_timeout_s: REQUEST_TIMEOUT_S,
            body_timeout_s: BODY_TIMEOUT_S,
            max_body_bytes: MAX_BODY_BYTES,
            max_choices: MAX_CHOICES,
            max_prompt_tokens: None,
            max_completion_tokens: None,
            max_connections: MAX_CONNECTIONS,
        }
    }
}

impl Policy {
    /// The same as flags, for a router that is a process of its own.
    pub fn flags(&self) -> Vec<String> {
        let always = [
            ("request-timeout-s", self.request_timeout_s.to_string()),
            ("body-timeout-s", self.body_timeout_s.to_string()),
            ("max-body-bytes", self.max_body_bytes.to_string()),
            ("max-choices", self.max_choices.to_string()),
            ("max-connections", self.max_connections.to_string()),
        ];
        let given = [
            ("api-keys", self.api_keys.as_ref().map(|path| path.display().to_string())),
            ("max-prompt-tokens", self.max_prompt_tokens.map(|most| most.to_string())),
            ("max-completion-tokens", self.max_completion_tokens.map(|most| most.to_string())),
        ];
        let given = given.into_iter().filter_map(|(name, value)| Some((name, value?)));
        always.into_iter().chain(given).map(|(name, value)| format!("--{name}={value}")).collect()
    }

    pub(crate) fn request_timeout(&self) -> Duration {
        Duration::from_secs(self.request_timeout_s)
    }

    pub(crate) fn body_timeout(&self) -> Duration {
        Duration::from_secs(self.body_timeout_s)
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[derive(Debug, clap::Parser)]
    struct Program {
        #[command(flatten)]
        policy: Policy,
    }

    fn read(flags: Vec<String>) -> Policy {
        Program::try_parse_from(std::iter::once("program".to_owned()).chain(flags)).unwrap().policy
    }

    #[test]
    fn flags_say_all_of_it() {
        let all = Policy {
            api_keys: Some("keys.toml".into()),
            request_timeout_s: 1,
            body_timeout_s: 2,
            max_body_bytes: 3,
            max_choices: 4,
            max_prompt_tokens: Some(5),
            max_completion_tokens: Some(6),
            max_connections: 7,
        };
        for policy in [all, Policy::default(), read(Vec::new())] {
            assert_eq!(read(policy.flags()), policy);
        }
        assert_eq!(read(Vec::new()), Policy::default());
    }
}
