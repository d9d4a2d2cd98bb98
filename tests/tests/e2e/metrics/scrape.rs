//! What a process says at `/metrics`, read as Prometheus reads it; and `promtool`, which judges it.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::process::{Command, Stdio};

use crate::openai::client::{Answer, send};

/// A metric: its type, labels and meaning.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Family {
    pub(super) kind: String,
    /// In alphabetical order, without a histogram's `le`.
    pub(super) labels: BTreeSet<String>,
    pub(super) help: String,
}

/// One answer.
#[derive(Debug, Default)]
pub(crate) struct Scrape {
    pub(super) text: String,
    pub(super) families: BTreeMap<String, Family>,
    /// Names with labels, as they are written, and values.
    samples: Vec<(String, f64)>,
}

impl Scrape {
    /// Scrapes the process whose HTTP server listens at `address`.
    pub(crate) fn of(address: &str) -> Self {
        let answer = Answer::of(send(address, "GET", "/metrics", "", b""));
        assert_eq!(
            (answer.status, answer.header("content-type")),
            (200, Some("text/plain; version=0.0.4; charset=utf-8"))
        );
        Self::parse(answer.text())
    }

    fn parse(text: String) -> Self {
        let mut families: BTreeMap<String, Family> = BTreeMap::new();
        let mut samples = Vec::new();
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                let (name, help) = rest.split_once(' ').unwrap();
                help.clone_into(&mut families.entry(name.to_owned()).or_default().help);
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').unwrap();
                kind.clone_into(&mut families.entry(name.to_owned()).or_default().kind);
            } else {
                let (series, value) = line.rsplit_once(' ').unwrap();
                let (name, labels) = series.split_once('{').unwrap_or((series, ""));
                let family = family_of(&families, name).unwrap_or_else(|| panic!("{name} has no HELP"));
                let labels = labels.trim_end_matches('}').split(',').filter_map(|label| label.split_once('='));
                let labels = labels.map(|(label, _)| label.to_owned()).filter(|label| label != "le");
                families.get_mut(&family).unwrap().labels.extend(labels);
                samples.push((series.to_owned(), value.parse().unwrap()));
            }
        }
        Self { text, families, samples }
    }

    /// The value of `series`, written as it is shown. 0 when there is none.
    pub(crate) fn exact(&self, series: &str) -> f64 {
        self.samples.iter().find(|(name, _)| name == series).map_or(0.0, |(_, value)| *value)
    }

    /// The value of `series`, a count.
    pub(super) fn value(&self, series: &str) -> u64 {
        self.exact(series) as u64
    }

    /// The sum of all series that start with `start`, counts.
    pub(super) fn sum(&self, start: &str) -> u64 {
        self.samples.iter().filter(|(name, _)| name.starts_with(start)).map(|(_, value)| *value as u64).sum()
    }
}

/// The metric that a sample called `sample` belongs to.
fn family_of(families: &BTreeMap<String, Family>, sample: &str) -> Option<String> {
    let stems = ["_bucket", "_sum", "_count"].iter().filter_map(|end| sample.strip_suffix(end));
    let mut names = [sample].into_iter().chain(stems);
    names.find(|name| families.contains_key(*name)).map(str::to_owned)
}

/// Runs promtool with `args` and `input`; it must find nothing to say against it.
pub(super) fn promtool(args: &[&str], input: &str) {
    let program = std::env::var_os("SIROCCO_PROMTOOL_BIN").unwrap_or_else(|| "promtool".into());
    let mut command = Command::new(&program);
    command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn();
    let mut child =
        child.unwrap_or_else(|error| panic!("{}: {error}; Debian's package prometheus has it", program.display()));
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = [output.stdout, output.stderr].map(|said| String::from_utf8(said).unwrap()).concat();
    assert!(output.status.success() && !said.contains("lint"), "promtool {args:?}: {said}");
}
