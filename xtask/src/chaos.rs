//! `cargo xtask chaos`: release processes under load and faults, each alone beside its bar, or many in an order that a seed decides.
//!
//! The faults themselves are tests that other runs leave out: they start clusters as the end-to-end tests do.

use std::io::{BufRead as _, BufReader};
use std::process::Stdio;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::bench::figures::{self, Bar, Figure, Measured};
use crate::bench::parts;
use crate::programs::{self, WhenMissing};

/// The tests that do it, in package `sirocco-testkit`.
const TABLE: &str = "chaos::table::";
const RANDOM: &str = "chaos::random_faults_fail_no_request_and_change_no_byte_for_long";

/// What the command line asks for.
pub(crate) enum Request {
    /// Each fault alone.
    Table { json: bool },
    /// Many faults, of this seed and for so many minutes.
    Random { seed: u64, minutes: u64 },
}

impl Request {
    /// Reads what follows `chaos`; what is wrong with it otherwise.
    pub(crate) fn parse(args: &[&str]) -> Result<Self, String> {
        match args {
            ["table"] | ["table", "-o" | "--output", "table"] => return Ok(Self::Table { json: false }),
            ["table", "-o" | "--output", "json"] => return Ok(Self::Table { json: true }),
            _ => {}
        }
        let (mut seed, mut minutes) = (1, 10);
        let mut args = args.iter();
        while let Some(arg) = args.next() {
            let value = match *arg {
                "--seed" => &mut seed,
                "--minutes" => &mut minutes,
                other => return Err(format!("`chaos` has no argument {other:?}")),
            };
            let text = args.next().ok_or_else(|| format!("{arg} has no value"))?;
            *value = text.parse().map_err(|error| format!("{arg} {text}: {error}"))?;
        }
        if minutes == 0 {
            return Err("--minutes 0: must be 1 or more".to_owned());
        }
        Ok(Self::Random { seed, minutes })
    }

    /// Builds the programs and the test, and runs it; fails when it does or a bar is missed.
    pub(crate) fn run(self) -> Result<()> {
        let found = programs::ensure(&["etcd", "etcdctl", "faketime"], WhenMissing::Install)?;
        let packages = crate::up::PACKAGES.iter().flat_map(|package| ["--package", package]);
        parts::build("release", &["--bins"].into_iter().chain(packages).collect::<Vec<_>>())?;
        let mut test =
            crate::cargo(&["test", "--locked", "--release", "--package", "sirocco-testkit", "--test", "e2e"])?;
        test.args(["--", "--ignored", "--nocapture", "--test-threads", "1"]);
        found.export(&mut test);
        match self {
            Self::Random { seed, minutes } => {
                test.args(["--exact", RANDOM]).env("SIROCCO_CHAOS_SEED", seed.to_string());
                test.env("SIROCCO_CHAOS_MINUTES", minutes.to_string());
                let status = test.status().context("start cargo")?;
                ensure!(status.success(), "seed {seed}: cargo ended with {status}");
                Ok(())
            }
            Self::Table { json } => {
                let mut run = test.arg(TABLE).stdout(Stdio::piped()).spawn().context("start cargo")?;
                let mut figures = Vec::new();
                for line in BufReader::new(run.stdout.take().context("its output")?).lines() {
                    let line = line?;
                    match figure(&line) {
                        Some(figure) => figures.push(figure),
                        None => eprintln!("{line}"),
                    }
                }
                let status = run.wait()?;
                if json {
                    println!("{}", figures::json(&figures));
                } else {
                    print!("{}", figures::table(&figures));
                }
                ensure!(status.success(), "cargo ended with {status}");
                let missed = figures.iter().filter(|figure| figure.missed()).count();
                ensure!(missed == 0 && !figures.is_empty(), "{missed} of {} figures missed their bars", figures.len());
                Ok(())
            }
        }
    }
}

/// A figure that the test printed; none for a line of other things.
fn figure(line: &str) -> Option<Figure> {
    let value: Value = serde_json::from_str(line.get(line.find("{\"")?..)?).ok()?;
    let text = |key: &str| value[key].as_str().map(str::to_owned);
    let number = |key: &str| value[key].as_f64();
    let bar = number("bar").map(|at| {
        let bar = if value["less_is_better"] == true { Bar::below(at) } else { Bar::above(at) };
        number("stretch").map_or(bar, |stretch| bar.stretch(stretch))
    });
    let (floor, unit) = (number("floor")?, text("unit")?);
    // What is no number was not measured.
    let measured = number("measured").map(|value| Measured { value, floor, unit, note: String::new() });
    Some(Figure { name: text("name")?, measured, bar })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_for_is_read_or_refused_by_name() {
        assert!(matches!(Request::parse(&["table", "-o", "json"]), Ok(Request::Table { json: true })));
        assert!(matches!(Request::parse(&[]), Ok(Request::Random { seed: 1, minutes: 10 })));
        let asked = Request::parse(&["--minutes", "3", "--seed", "9"]);
        assert!(matches!(asked, Ok(Request::Random { seed: 9, minutes: 3 })));
        for (args, problem) in [
            (&["--seed"][..], "--seed has no value"),
            (&["--seed", "x"], "--seed x: invalid digit found in string"),
            (&["--minutes", "0"], "--minutes 0: must be 1 or more"),
            (&["tables"], "`chaos` has no argument \"tables\""),
        ] {
            assert_eq!(Request::parse(args).err().as_deref(), Some(problem));
        }
    }

    #[test]
    fn figures_are_read_from_among_other_lines() {
        let line = r#"test a ... {"name":"a","measured":0.0,"floor":1.0,"unit":"s","bar":0.0,"stretch":null,"less_is_better":true}"#;
        let read = figure(line).unwrap();
        assert_eq!((read.name.as_str(), read.missed()), ("a", false));
        for measured in ["1.0", "null"] {
            assert!(figure(&line.replace("0.0,\"floor\"", &format!("{measured},\"floor\""))).unwrap().missed());
        }
        assert!(figure("running 1 test").is_none() && figure("{\"name\":\"a\"}").is_none());
    }
}
