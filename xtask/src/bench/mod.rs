//! `cargo xtask bench`: what images ship, measured, with each figure beside what it must reach. Fails when one does not.

mod bars;
mod control;
pub(crate) mod figures;
mod gpu;
mod model;
pub(crate) mod parts;
mod plan;
mod serve;

use std::fmt::Write as _;

use anyhow::{Result, bail};
use figures::Figure;

/// What a benchmark does.
#[derive(Clone, Copy)]
enum Bench {
    /// Measures programs, each figure of which has its bar.
    Measures(fn() -> Result<Vec<Figure>>),
    /// Prints by itself.
    Prints(fn() -> Result<()>),
}

/// The benchmarks by name. Without a name those of [`parts::PARTS`] run.
const BENCHES: [(&str, Bench); 4] = [
    ("plan", Bench::Prints(plan::run)),
    ("control", Bench::Prints(control::run)),
    ("serve", Bench::Measures(serve::run)),
    ("gpu", Bench::Measures(gpu::run)),
];

/// What the command line asks for.
pub(crate) struct Request {
    /// None for all parts.
    name: Option<String>,
    json: bool,
}

impl Request {
    /// Reads what follows `bench`; what is wrong with it otherwise.
    pub(crate) fn parse(args: &[&str]) -> Result<Self, String> {
        let mut request = Self { name: None, json: false };
        let mut args = args.iter().copied();
        while let Some(arg) = args.next() {
            match arg {
                "-o" | "--output" => match args.next() {
                    Some("json") => request.json = true,
                    Some("table") => request.json = false,
                    other => return Err(format!("{arg} is {}, must be table or json", other.unwrap_or("missing"))),
                },
                name if !name.starts_with('-') && request.name.is_none() => request.name = Some(name.to_owned()),
                other => return Err(format!("`bench` has no argument {other:?}")),
            }
        }
        match &request.name {
            Some(name) if request.json && matches!(find(name), Some(Bench::Prints(_))) => {
                Err(format!("`bench {name}` has no JSON"))
            }
            Some(name) if find(name).is_none() && parts::find(name).is_none() => {
                Err(format!("there is no benchmark {name:?}"))
            }
            _ => Ok(request),
        }
    }

    /// Measures, prints, and fails when a bar is missed.
    pub(crate) fn run(self) -> Result<()> {
        let figures = match &self.name {
            None => parts::measure(&parts::PARTS),
            Some(name) => match (find(name), parts::find(name)) {
                (Some(Bench::Prints(run)), _) => return run(),
                (Some(Bench::Measures(run)), _) => run()?,
                (None, Some(part)) => parts::measure(std::slice::from_ref(part)),
                (None, None) => bail!("there is no benchmark {name:?}"),
            },
        };
        if self.json {
            println!("{}", figures::json(&figures));
        } else {
            print!("{}", figures::table(&figures));
        }
        let missed: Vec<&Figure> = figures.iter().filter(|figure| figure.missed()).collect();
        if missed.is_empty() {
            return Ok(());
        }
        let mut names = String::new();
        for figure in &missed {
            let _ = write!(names, "\n  {}", figure.name);
        }
        bail!("{} of {} bars were missed:{names}", missed.len(), figures.iter().filter(|f| f.bar.is_some()).count())
    }
}

fn find(name: &str) -> Option<Bench> {
    BENCHES.into_iter().find(|(known, _)| *known == name).map(|(_, bench)| bench)
}
