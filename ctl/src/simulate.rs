//! `sirocco simulate`: what the planner would do, without nodes.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use sirocco_coordinator::plan::{Knobs, Layout, Plan, PlanNode, Problem, Shape, plan};
use sirocco_coordinator::simulate::{
    Cluster, Language, Loads, NamedShape, Outcome, SHAPES, drifted, first, judge, reshuffled, slots_for,
};
use sirocco_types::Bytes;

use crate::output::{self, Column, Format, column, wide};

/// Most nodes that can be simulated.
const MAX_NODES: i64 = 10_000;

/// Flags of `simulate`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The model's shape: demo, mixtral-8x7b, qwen3-235b, deepseek-v3 or switch-c; all of them when left out
    #[arg(long, env = "SIROCCO_SHAPE", value_name = "NAME", value_parser = shape)]
    shape: Option<NamedShape>,
    /// How many nodes; when left out a small and a large cluster for the shape
    #[arg(long, env = "SIROCCO_NODES", value_name = "N", value_parser = clap::value_parser!(u32).range(1..=MAX_NODES))]
    nodes: Option<u32>,
    /// How many experts of a layer a node may hold, which also sets its memory; by default as few as will do
    #[arg(long, env = "SIROCCO_SLOTS", value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    slots: Option<u32>,
    /// How many replicas beyond the first of each expert a layer has room for; by default an eighth of the experts
    #[arg(long, env = "SIROCCO_EXTRA_REPLICAS", value_name = "N", conflicts_with = "slots")]
    extra_replicas: Option<u32>,
    /// How many zones the nodes are dealt to in turn
    #[arg(long, env = "SIROCCO_ZONES", value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=MAX_NODES))]
    zones: u32,
    /// Speeds that are dealt to the nodes in turn, 100 for an ordinary one
    #[arg(long, env = "SIROCCO_SPEEDS", value_name = "N,N", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=10_000))]
    speeds: Vec<u32>,
    /// Loads of the experts: zipf:EXPONENT, uniform, measured:LANGUAGE (en, fr, de, es, it) or file:PATH, JSON:
    /// a list of layers of experts, or of rounds of layers of experts
    #[arg(long, env = "SIROCCO_LOADS", value_name = "SOURCE", default_value = "zipf:1")]
    loads: Source,
    /// How often to plan
    #[arg(long, env = "SIROCCO_ROUNDS", value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// By which share an expert's load changes at most, up or down, from round to round
    #[arg(long, env = "SIROCCO_DRIFT", value_name = "SHARE", default_value_t = 0.1, value_parser = share)]
    drift: f64,
    /// The round from which loads are suddenly others: those of --shift-language, else the same in another order
    #[arg(long, env = "SIROCCO_SHIFT_ROUND", value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    shift_round: Option<u32>,
    /// The language of --shift-round: loads as of measured:LANGUAGE
    #[arg(long, env = "SIROCCO_SHIFT_LANGUAGE", value_name = "LANGUAGE", requires = "shift_round")]
    shift_language: Option<Language>,
    /// What random numbers follow from
    #[arg(long, env = "SIROCCO_SEED", value_name = "N", default_value_t = 1)]
    seed: u64,
    #[command(flatten)]
    prices: Prices,
    /// Show which nodes hold each expert too, in JSON and YAML: by layer, expert and replica
    #[arg(long, env = "SIROCCO_LAYOUT")]
    layout: bool,
    /// How to show the answer
    #[arg(short, long, env = "SIROCCO_OUTPUT", value_enum, default_value_t)]
    output: Format,
}

/// What changes must earn. All in millionths of a layer's ideal time.
#[derive(Clone, Copy, Debug, clap::Args)]
struct Prices {
    /// What loading an expert costs, in millionths of a layer's ideal time
    #[arg(long, env = "SIROCCO_MOVE_COST", value_name = "N", default_value_t = Knobs::default().move_cost)]
    move_cost: u64,
    /// What keeping a replica costs, in millionths of a layer's ideal time
    #[arg(long, env = "SIROCCO_REPLICA_RENT", value_name = "N", default_value_t = Knobs::default().replica_rent)]
    replica_rent: u64,
    /// Bytes that moves for balance may load in a round; no limit when left out
    #[arg(long, env = "SIROCCO_MAX_MOVED_BYTES", value_name = "BYTES")]
    max_moved_bytes: Option<u64>,
}

/// Where loads come from.
#[derive(Clone, Debug)]
enum Source {
    Named(Loads),
    File(PathBuf),
}

impl FromStr for Source {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.strip_prefix("file:") {
            Some(path) => Ok(Self::File(path.into())),
            None => text.parse().map(Self::Named).map_err(|error| format!("{error}; or file:PATH")),
        }
    }
}

/// A file of loads.
#[derive(Deserialize)]
#[serde(untagged)]
enum File {
    Once(Vec<Vec<u64>>),
    Rounds(Vec<Vec<Vec<u64>>>),
}

/// One round of one simulation, as shown to people and programs.
#[derive(Serialize)]
struct RoundView {
    shape: &'static str,
    nodes: usize,
    slots: u32,
    round: u32,
    balance_before: Option<f64>,
    balance: f64,
    imbalance_before: Option<f64>,
    imbalance: f64,
    replicas: usize,
    moved_experts: usize,
    moved_bytes: u64,
    plan_ms: f64,
    unserved: usize,
    short_of_replicas: usize,
    crowded: usize,
    /// `layout[l][e]` are the nodes of expert `e` of layer `l`.
    #[serde(skip_serializing_if = "Option::is_none")]
    layout: Option<Vec<Vec<Vec<u32>>>>,
}

const COLUMNS: [Column; 15] = [
    column("shape"),
    column("nodes"),
    wide("slots"),
    column("round"),
    column("balance before"),
    column("balance"),
    wide("imbalance before"),
    column("imbalance"),
    wide("replicas"),
    column("moved experts"),
    column("moved bytes"),
    column("plan time"),
    wide("unserved"),
    wide("short of replicas"),
    wide("crowded"),
];

/// Simulates and prints a line for every round.
pub(crate) fn run(args: &Args) -> Result<()> {
    let shapes: Vec<NamedShape> = args.shape.map_or(SHAPES.to_vec(), |shape| vec![shape]);
    let mut rounds = Vec::new();
    for shape in shapes {
        let sizes = args.nodes.map_or(shape.nodes.to_vec(), |nodes| vec![nodes as usize]);
        for nodes in sizes {
            rounds.extend(simulate(args, shape, nodes)?);
        }
    }
    output::print(&output::list(args.output, &COLUMNS, &rounds, RoundView::row)?)
}

fn simulate(args: &Args, NamedShape { name, shape, .. }: NamedShape, nodes: usize) -> Result<Vec<RoundView>> {
    let extra = args.extra_replicas.map_or(shape.experts / 8, |extra| extra as usize);
    let slots = args.slots.unwrap_or_else(|| slots_for(nodes, shape.experts, extra));
    let cluster = Cluster { nodes, slots, zones: args.zones, speeds: args.speeds.clone() };
    let plan_nodes = cluster.plan_nodes(shape);
    let min_replicas = vec![1; shape.total()];
    let mut loads = first_loads(args, shape)?;
    let mut previous: Option<Layout> = None;
    let mut views = Vec::new();
    for round in 0..args.rounds {
        if round > 0 {
            loads = next_loads(args, shape, round, &loads)?;
        }
        let problem = Problem {
            shape,
            nodes: &plan_nodes,
            loads: &loads,
            min_replicas: &min_replicas,
            previous: previous.as_ref(),
            knobs: args.prices.knobs(),
        };
        let began = Instant::now();
        let plan = plan(&problem);
        let took = began.elapsed();
        let outcome = judge(&problem, &plan);
        let mut view = RoundView::new((name, &plan_nodes, slots, round), outcome, &plan, took);
        view.layout = args.layout.then(|| plan.layout.holders.chunks(shape.experts).map(<[_]>::to_vec).collect());
        views.push(view);
        previous = Some(plan.layout);
    }
    Ok(views)
}

fn first_loads(args: &Args, shape: Shape) -> Result<Vec<u64>> {
    match &args.loads {
        Source::Named(loads) => Ok(first(loads, shape, args.seed)?),
        Source::File(path) => read_loads(path, shape, 0),
    }
}

/// The loads of `round`, from 1: a file with rounds says them itself; drift and shift come on top.
fn next_loads(args: &Args, shape: Shape, round: u32, last: &[u64]) -> Result<Vec<u64>> {
    let seed = args.seed.wrapping_add(u64::from(round) << 32);
    let present = match (&args.loads, args.shift_language) {
        (_, Some(language)) if args.shift_round == Some(round) => {
            first(&Loads::Measured { language }, shape, args.seed)?
        }
        (Source::File(path), _) => read_loads(path, shape, round as usize)?,
        (Source::Named(_), _) => last.to_vec(),
    };
    let shifted = match args.shift_language {
        None if args.shift_round == Some(round) => reshuffled(&present, shape.experts, seed),
        _ => present,
    };
    Ok(drifted(&shifted, args.drift, seed))
}

fn read_loads(path: &PathBuf, shape: Shape, round: usize) -> Result<Vec<u64>> {
    let what = || format!("--loads file:{}", path.display());
    let text = std::fs::read_to_string(path).with_context(what)?;
    let layers = match serde_json::from_str(&text) {
        Ok(File::Once(layers)) => layers,
        Ok(File::Rounds(mut rounds)) if !rounds.is_empty() => rounds.swap_remove(round.min(rounds.len() - 1)),
        _ => bail!("{}: it is not [layers][experts] or [rounds][layers][experts] of whole numbers", what()),
    };
    first(&Loads::Given { layers }, shape, 0).with_context(what)
}

impl Prices {
    fn knobs(self) -> Knobs {
        let Self { move_cost, replica_rent, max_moved_bytes } = self;
        Knobs { move_cost, replica_rent, max_moved_bytes }
    }
}

impl RoundView {
    fn new(
        (shape, nodes, slots, round): (&'static str, &[PlanNode], u32, u32),
        outcome: Outcome,
        plan: &Plan,
        took: Duration,
    ) -> Self {
        Self {
            shape,
            nodes: nodes.len(),
            slots,
            round,
            balance_before: outcome.before.map(|quality| quality.balance),
            balance: outcome.after.balance,
            imbalance_before: outcome.before.map(|quality| quality.imbalance),
            imbalance: outcome.after.imbalance,
            replicas: outcome.replicas,
            moved_experts: outcome.moved_experts,
            moved_bytes: outcome.moved_bytes,
            plan_ms: took.as_secs_f64() * 1e3,
            unserved: plan.unserved.len(),
            short_of_replicas: plan.short.len(),
            crowded: plan.crowded.len(),
            layout: None,
        }
    }

    /// One text for each of [`COLUMNS`].
    fn row(&self) -> Vec<String> {
        let before = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.3}"));
        vec![
            self.shape.to_owned(),
            self.nodes.to_string(),
            self.slots.to_string(),
            self.round.to_string(),
            before(self.balance_before),
            format!("{:.3}", self.balance),
            before(self.imbalance_before),
            format!("{:.3}", self.imbalance),
            self.replicas.to_string(),
            self.moved_experts.to_string(),
            Bytes(self.moved_bytes).to_string(),
            format!("{:.1} ms", self.plan_ms),
            self.unserved.to_string(),
            self.short_of_replicas.to_string(),
            self.crowded.to_string(),
        ]
    }
}

fn shape(text: &str) -> Result<NamedShape, String> {
    let names: Vec<&str> = SHAPES.iter().map(|shape| shape.name).collect();
    let found = SHAPES.iter().find(|shape| shape.name == text).copied();
    found.ok_or_else(|| format!("shapes are {}", names.join(", ")))
}

fn share(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(share) if (0.0..=1.0).contains(&share) => Ok(share),
        _ => Err("a share is a number from 0 to 1".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[derive(clap::Parser)]
    struct Command {
        #[command(flatten)]
        args: Args,
    }

    fn args(text: &str) -> Result<Args, String> {
        let parsed = Command::try_parse_from(std::iter::once("simulate").chain(text.split_whitespace()));
        parsed.map(|command| command.args).map_err(|error| error.to_string())
    }

    fn rounds(text: &str) -> Vec<RoundView> {
        let args = args(text).unwrap();
        simulate(&args, args.shape.unwrap(), args.nodes.unwrap() as usize).unwrap()
    }

    #[test]
    fn a_language_change_is_answered_by_moves_that_restore_the_balance() {
        let rounds = rounds(
            "--shape demo --nodes 4 --slots 4 --loads measured:en --rounds 3 --drift 0 --shift-round 2 --shift-language es",
        );
        assert_eq!(rounds[1].moved_experts, 0);
        assert!(rounds[2].moved_experts > 0 && rounds[2].balance > rounds[2].balance_before.unwrap());
    }

    #[test]
    fn bad_input_names_the_flag_the_value_and_the_limit() {
        let cases = [
            ("--shape gpt", ["--shape", "'gpt'", "mixtral-8x7b"]),
            ("--nodes 0", ["--nodes", "0", "1..=10000"]),
            ("--loads zipf:9", ["--loads", "\"9\"", "from 0 to 4"]),
            ("--drift 2", ["--drift", "'2'", "from 0 to 1"]),
            ("--speeds 100,0", ["--speeds", "0", "1..=10000"]),
            ("--shift-round 1 --shift-language nl", ["--shift-language", "\"nl\"", "en, fr, de, es and it"]),
        ];
        for (text, parts) in cases {
            let error = args(text).unwrap_err();
            assert!(parts.iter().all(|part| error.contains(part)), "{text}: {error}");
        }
    }

    #[test]
    fn a_file_says_the_loads_of_each_round_and_a_wrong_one_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("loads.json");
        let loads =
            |hot: usize| vec![(0..8).map(|expert| if expert == hot { 500 } else { 10 }).collect::<Vec<u64>>(); 4];
        std::fs::write(&path, serde_json::to_string(&[loads(0), loads(5)]).unwrap()).unwrap();
        let flags = format!("--shape demo --nodes 4 --slots 3 --drift 0 --layout --loads file:{}", path.display());
        let found = rounds(&flags);
        let replicas = |round: usize, expert: usize| found[round].layout.as_ref().unwrap()[0][expert].len();
        assert!(replicas(0, 0) > 1 && replicas(1, 5) > 1);
        std::fs::write(&path, "[[1, 2]]").unwrap();
        let wrong = simulate(&args(&flags).unwrap(), SHAPES[0], 4).err().unwrap();
        let wrong = format!("{wrong:#}");
        assert!(wrong.contains("--loads file:") && wrong.contains("1 layers of 2 experts"), "{wrong}");
    }
}
