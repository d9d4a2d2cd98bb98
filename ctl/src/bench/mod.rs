//! `sirocco bench`: puts load on a router node over gRPC and says how it was served.
//!
//! Prompts are random token ids, completions have a fixed length, so that runs can be compared whatever the model says. With
//! `--rate` requests come at random moments whether or not earlier ones have ended; else `--streams` clients ask again as soon
//! as they are answered.

mod load;
mod report;

use std::time::Duration;

use anyhow::{Result, ensure};
use sirocco_proto::channel;
use sirocco_proto::inference::InferenceServiceClient;
use sirocco_proto::tonic::transport::Channel;
use sirocco_proto::wire::inference as wire;

use crate::Unreachable;
use crate::generate::refusal;
use crate::output::{self, Format};

/// Connections the load is spread over: a server takes only so many streams on one.
const CONNECTIONS: usize = 8;

/// Flags of `bench`.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    /// The router node's gRPC address
    #[arg(long, env = "SIROCCO_ROUTER", value_name = "ADDR", default_value = "127.0.0.1:8001")]
    router: String,
    /// Requests under way at once
    #[arg(long, env = "SIROCCO_BENCH_STREAMS", value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..))]
    streams: u32,
    /// Requests a second, at random moments, instead of a fixed number under way
    #[arg(long, env = "SIROCCO_BENCH_RATE", value_name = "X", conflicts_with = "streams")]
    rate: Option<f64>,
    /// How long to go on asking, in seconds
    #[arg(long, env = "SIROCCO_BENCH_SECONDS", value_name = "S", default_value_t = 10.0)]
    seconds: f64,
    /// Tokens of each prompt
    #[arg(long, env = "SIROCCO_BENCH_PROMPT_TOKENS", value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    prompt_tokens: u32,
    /// Tokens at the beginning that all prompts have in common
    #[arg(long, env = "SIROCCO_BENCH_SHARED_TOKENS", value_name = "N", default_value_t = 0)]
    shared_tokens: u32,
    /// Tokens to generate for each
    #[arg(long, env = "SIROCCO_BENCH_MAX_TOKENS", value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    max_tokens: u32,
    /// What prompts and moments are drawn from; another seed asks what no cache has
    #[arg(long, env = "SIROCCO_SEED", value_name = "N", default_value_t = 0)]
    seed: u64,
    /// How to show what was measured
    #[arg(short, long, env = "SIROCCO_OUTPUT", value_enum, default_value_t)]
    output: Format,
}

/// Measures and prints.
pub(crate) async fn run(args: Args) -> Result<()> {
    ensure!(
        args.seconds > 0.0 && args.seconds <= 86_400.0,
        "--seconds is {}, it must be from 0 to 86400",
        args.seconds
    );
    let sane = args.rate.is_none_or(|rate| rate > 0.0 && rate <= 100_000.0);
    ensure!(sane, "--rate is {}, it must be from 0 to 100000", args.rate.unwrap_or_default());
    ensure!(
        args.shared_tokens <= args.prompt_tokens,
        "--shared-tokens is {}, --prompt-tokens only {}",
        args.shared_tokens,
        args.prompt_tokens
    );
    let mut clients = Vec::with_capacity(CONNECTIONS);
    for _ in 0..CONNECTIONS {
        clients.push(connect(&args.router).await?);
    }
    let models = clients[0].list_models(wire::ListModelsRequest {}).await;
    let models = models.map_err(|status| refusal(&args.router, &status))?.into_inner().models;
    let vocab_size = models.first().map_or(1, |model| model.vocab_size);
    let plan = load::Plan {
        clients,
        arrivals: match args.rate {
            Some(rate) => load::Arrivals::Random { rate },
            None => load::Arrivals::AsAnswered { streams: args.streams as usize },
        },
        duration: Duration::from_secs_f64(args.seconds),
        asked: load::Asked {
            prompt_tokens: args.prompt_tokens,
            shared_tokens: args.shared_tokens,
            max_tokens: args.max_tokens,
            vocab_size,
        },
        seed: args.seed,
    };
    let report = report::Report::of(&load::run(plan).await, args.seconds);
    output::print(&output::one(args.output, &report, || report.text())?)
}

async fn connect(address: &str) -> Result<InferenceServiceClient<Channel>> {
    let channel = channel::connect(address)
        .await
        .map_err(|error| Unreachable(format!("router node {address}: {}", sirocco_process::chain(&error))))?;
    Ok(InferenceServiceClient::new(channel))
}
