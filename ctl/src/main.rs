//! The `sirocco` command: starts clusters, talks to them, and shows how they are.
#![forbid(unsafe_code)]

mod bench;
mod bundled;
mod cluster;
mod generate;
mod generate_random;
mod inspect;
mod keys;
mod output;
mod quality;
mod random;
mod simulate;
mod terminal;
mod time;
mod up;
mod watch;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory as _, Parser, Subcommand};
use sirocco_process::{Shutdown, config, exit, logs};
use tokio_util::sync::CancellationToken;

/// Serves Mixture-of-Experts models from a cluster in which every expert lives on its own node
#[derive(Debug, Parser)]
#[command(name = "sirocco", version, after_help = EXIT_CODES)]
struct Cli {
    /// Configuration file (TOML): a table for each command, its keys the flags' names
    #[arg(long, global = true, env = "SIROCCO_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

const EXIT_CODES: &str = "Exit status: 0 done, 1 failed, 2 usage, 3 cluster unreachable";

#[derive(Debug, Subcommand)]
enum Command {
    /// Start a whole cluster and serve until stopped
    Up(Box<up::Args>),
    /// Complete a prompt
    Generate(generate::Args),
    #[command(flatten)]
    Cluster(cluster::Command),
    /// Look at a checkpoint, or make one
    #[command(subcommand)]
    Model(inspect::Command),
    /// Make, list and revoke the API keys of routers
    #[command(subcommand)]
    Keys(keys::Command),
    /// Put load on a router node and measure how it is served
    Bench(bench::Args),
    /// Simulate the planner without nodes: how it balances and what it moves
    Simulate(simulate::Args),
    /// Write a shell's completion script
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

/// No part of the cluster answers: exit status 3.
#[derive(Debug)]
pub(crate) struct Unreachable(String);

impl std::fmt::Display for Unreachable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Unreachable {}

#[tokio::main]
async fn main() -> ExitCode {
    let cli: Cli = config::parse();
    let quiet = matches!(&cli.command, Command::Up(args) if args.prompt.is_some());
    logs::init(if matches!(cli.command, Command::Up(_)) && !quiet { logs::SERVER } else { logs::COMMAND });
    let token = CancellationToken::new();
    let result = match Shutdown::listen() {
        Ok(signals) => signals.drive(&token, run(cli.command, token.clone())).await,
        Err(error) => Err(error.into()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("sirocco: {error:#}");
            let unreachable = error.chain().any(|cause| cause.is::<Unreachable>());
            ExitCode::from(if unreachable { exit::UNREACHABLE } else { exit::FAILED })
        }
    }
}

async fn run(command: Command, shutdown: CancellationToken) -> anyhow::Result<()> {
    if let Command::Up(args) = command {
        return up::run(*args, shutdown).await;
    }
    // In this order, so that a command that ends by itself when it is interrupted can do so.
    tokio::select! {
        biased;
        result = ask(command, &shutdown) => result,
        () = shutdown.cancelled() => Err(anyhow::anyhow!("interrupted")),
    }
}

/// The commands that ask something; `shutdown` is the usual end of those that do so again and again.
async fn ask(command: Command, shutdown: &CancellationToken) -> anyhow::Result<()> {
    match command {
        Command::Up(_) => unreachable!("it has been taken care of"),
        Command::Generate(args) => generate::run(args).await,
        Command::Cluster(command) => cluster::run(command, shutdown).await,
        Command::Model(command) => inspect::run(command).await,
        Command::Keys(command) => keys::run(command),
        Command::Bench(args) => bench::run(args).await,
        Command::Simulate(args) => simulate::run(&args),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "sirocco", &mut std::io::stdout());
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Args as _;

    use super::*;

    /// The flags of `command` and of its subcommands that no environment variable of ours sets.
    fn without_variable(command: &clap::Command) -> Vec<String> {
        let flags = command
            .get_arguments()
            .filter(|arg| arg.get_long().is_some_and(|long| !["help", "version"].contains(&long)));
        let ours = |arg: &clap::Arg| arg.get_env().is_some_and(|name| name.as_encoded_bytes().starts_with(b"SIROCCO_"));
        let mut found: Vec<String> =
            flags.filter(|arg| !ours(arg)).map(|arg| format!("{} --{}", command.get_name(), arg.get_id())).collect();
        found.extend(command.get_subcommands().flat_map(without_variable));
        found
    }

    #[test]
    fn every_flag_has_an_environment_variable() {
        assert_eq!(without_variable(&Cli::command()), Vec::<String>::new());
        let node = |name| sirocco_process::NodeArgs::augment_args(clap::Command::new(name));
        for command in [
            sirocco_coordinator::Config::augment_args(node("coordinator")),
            sirocco_expert_node::Config::augment_args(node("expert-node")),
            sirocco_router_node::Config::augment_args(node("router-node")),
        ] {
            assert_eq!(without_variable(&command), Vec::<String>::new());
        }
    }

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }
}
