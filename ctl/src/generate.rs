//! `sirocco generate`: completes one prompt on a router node and shows the text as it comes.

use std::io::{IsTerminal as _, Read as _, Write as _};

use anyhow::{Context as _, Result, anyhow, bail};
use serde::Serialize;
use sirocco_proto::generation::{Generation, GenerationError};
use sirocco_proto::tonic::{Code, Status};
use sirocco_proto::wire::inference as wire;
use sirocco_proto::wire::inference::generate_response::Event;
use sirocco_types::{Timings, Usage};

use crate::Unreachable;
use crate::output::{self, Format};

/// Flags of `generate`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// What to complete; read from standard input when neither this nor --prompt-ids is given
    prompt: Option<String>,
    /// Token ids to complete, with commas between
    #[arg(long, env = "SIROCCO_PROMPT_IDS", value_delimiter = ',', conflicts_with = "prompt", value_name = "IDS")]
    prompt_ids: Vec<u32>,
    /// The router nodes' gRPC addresses, with commas between; when one is lost, the completion goes on at the next
    #[arg(long, env = "SIROCCO_ROUTER", value_name = "ADDRS", value_delimiter = ',', default_value = "127.0.0.1:8001")]
    router: Vec<String>,
    /// The model's name; the one served when absent
    #[arg(long, env = "SIROCCO_MODEL_NAME", value_name = "NAME", default_value = "", hide_default_value = true)]
    model: String,
    /// The API key, where routers want one; best in the environment, because command lines can be read by everybody
    #[arg(long, env = "SIROCCO_API_KEY", value_name = "KEY", hide_env_values = true)]
    api_key: Option<String>,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// How to show the completion
    #[arg(short, long, env = "SIROCCO_OUTPUT", value_enum, default_value_t)]
    output: Format,
}

/// Flags that say how a completion is drawn. Values out of range are refused by the router, which knows the limits.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct SamplingArgs {
    /// Most tokens to generate
    #[arg(long, env = "SIROCCO_MAX_TOKENS", value_name = "N", default_value_t = 128)]
    max_tokens: u32,
    /// 0 takes the most likely token [default: 1]
    #[arg(long, env = "SIROCCO_TEMPERATURE", value_name = "X", allow_negative_numbers = true)]
    temperature: Option<f32>,
    /// Draw among this many of the most likely tokens; 0: all [default: 0]
    #[arg(long, env = "SIROCCO_TOP_K", value_name = "N")]
    top_k: Option<u32>,
    /// Draw among the most likely tokens that together reach this probability [default: 1]
    #[arg(long, env = "SIROCCO_TOP_P", value_name = "X", allow_negative_numbers = true)]
    top_p: Option<f32>,
    /// Draw among tokens at least this many times as likely as the most likely [default: 0]
    #[arg(long, env = "SIROCCO_MIN_P", value_name = "X", allow_negative_numbers = true)]
    min_p: Option<f32>,
    /// Makes tokens that have been used less likely; 1 changes nothing [default: 1]
    #[arg(long, env = "SIROCCO_REPETITION_PENALTY", value_name = "X", allow_negative_numbers = true)]
    repetition_penalty: Option<f32>,
    /// Subtracted for tokens that were generated already, -2 to 2 [default: 0]
    #[arg(long, env = "SIROCCO_PRESENCE_PENALTY", value_name = "X", allow_negative_numbers = true)]
    presence_penalty: Option<f32>,
    /// Subtracted for each time a token was generated, -2 to 2 [default: 0]
    #[arg(long, env = "SIROCCO_FREQUENCY_PENALTY", value_name = "X", allow_negative_numbers = true)]
    frequency_penalty: Option<f32>,
    /// The same seed gives the same completion [default: random]
    #[arg(long, env = "SIROCCO_SEED", value_name = "N")]
    seed: Option<u64>,
    /// End before this text; may be given several times
    #[arg(long, env = "SIROCCO_STOP", value_name = "TEXT")]
    stop: Vec<String>,
    /// Do not end at the model's end-of-sequence token
    #[arg(long, env = "SIROCCO_IGNORE_EOS")]
    ignore_eos: bool,
}

/// A whole completion.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Completion {
    request_id: String,
    model: String,
    seed: u64,
    text: String,
    token_ids: Vec<u32>,
    finish_reason: &'static str,
    usage: Usage,
    timings: Timings,
}

/// Completes the prompt of the command line.
pub(crate) async fn run(args: Args) -> Result<()> {
    let prompt = match (args.prompt, args.prompt_ids) {
        (Some(text), _) => wire::generate_request::Prompt::Text(text),
        (None, ids) if !ids.is_empty() => wire::generate_request::Prompt::TokenIds(wire::TokenIds { ids }),
        (None, _) => wire::generate_request::Prompt::Text(read_stdin()?),
    };
    let shows = args.output == Format::Table || args.output == Format::Wide;
    let asked = Asked { routers: args.router, model: args.model, api_key: args.api_key, prompt };
    let completion = complete(asked, args.sampling, |text| {
        if shows {
            show(text);
        }
    })
    .await?;
    if shows {
        println!();
        return Ok(());
    }
    output::print(&output::one(args.output, &completion, String::new)?)
}

/// Who is asked for what.
pub(crate) struct Asked {
    /// The routers' gRPC addresses.
    pub(crate) routers: Vec<String>,
    /// Empty: the one served.
    pub(crate) model: String,
    pub(crate) api_key: Option<String>,
    pub(crate) prompt: wire::generate_request::Prompt,
}

/// Has a router complete a prompt; `text` gets each piece of the text as it comes.
pub(crate) async fn complete(asked: Asked, sampling: SamplingArgs, mut text: impl FnMut(&str)) -> Result<Completion> {
    let Asked { routers, model, api_key, prompt } = asked;
    let request = wire::GenerateRequest {
        model,
        prompt: Some(prompt),
        sampling: Some(wire::SamplingParams {
            temperature: sampling.temperature,
            top_k: sampling.top_k,
            top_p: sampling.top_p,
            min_p: sampling.min_p,
            repetition_penalty: sampling.repetition_penalty,
            presence_penalty: sampling.presence_penalty,
            frequency_penalty: sampling.frequency_penalty,
            seed: sampling.seed,
            ..Default::default()
        }),
        max_tokens: Some(sampling.max_tokens),
        stop: sampling.stop,
        ignore_eos: sampling.ignore_eos,
        ..Default::default()
    };
    let mut generation = Generation::new(routers, request);
    if let Some(key) = api_key {
        // Neither the key nor the reason may end up on a screen.
        let bearer =
            format!("Bearer {key}").parse().map_err(|_| anyhow!("--api-key: it cannot be sent as a header"))?;
        generation = generation.authorized(bearer);
    }
    let mut completion = Completion::default();
    loop {
        match generation.event().await.map_err(failure)? {
            Event::Started(started) => {
                completion.request_id = started.request_id;
                completion.model = started.model;
                completion.seed = started.seed;
            }
            Event::Token(token) => {
                completion.token_ids.push(token.id);
                completion.text += &token.text;
                text(&token.text);
            }
            Event::Finished(finished) => {
                completion.text += &finished.text;
                text(&finished.text);
                completion.end(&finished);
                return Ok(completion);
            }
        }
    }
}

/// Why a completion does not go on, as an error of this program.
fn failure(error: GenerationError) -> anyhow::Error {
    match error {
        GenerationError::Refused(router, status) => refusal(&router, &status),
        error @ GenerationError::Unreachable(..) => Unreachable(sirocco_process::chain(&error)).into(),
    }
}

impl Completion {
    fn end(&mut self, finished: &wire::Finished) {
        self.finish_reason = match finished.reason() {
            wire::FinishReason::Stop => "stop",
            wire::FinishReason::Length => "length",
            wire::FinishReason::Unspecified => "unknown",
        };
        let usage = finished.usage.unwrap_or_default();
        self.usage = Usage {
            prompt_tokens: usage.prompt_tokens,
            cached_tokens: usage.cached_tokens,
            completion_tokens: usage.completion_tokens,
        };
        let timings = finished.timings.unwrap_or_default();
        self.timings =
            Timings { queue_ms: timings.queue_ms, first_token_ms: timings.first_token_ms, total_ms: timings.total_ms };
    }
}

/// Writes a piece of text at once. A reader that has gone is noticed at the next line's end.
pub(crate) fn show(text: &str) {
    let mut stdout = std::io::stdout();
    let _ = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
}

/// A gRPC status as an error of this program.
pub(crate) fn refusal(address: &str, status: &Status) -> anyhow::Error {
    if status.code() == Code::Unavailable && status.message().is_empty() {
        return Unreachable(format!("{address} does not answer")).into();
    }
    anyhow::anyhow!("{address}: {}: {}", status.code(), status.message())
}

fn read_stdin() -> Result<String> {
    let mut stdin = std::io::stdin();
    if stdin.is_terminal() {
        bail!("no prompt: give one as an argument, with --prompt-ids, or on standard input");
    }
    let mut text = String::new();
    stdin.read_to_string(&mut text).context("standard input is no prompt")?;
    Ok(text)
}
