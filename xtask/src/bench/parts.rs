//! What `cargo xtask bench` consists of: examples of the crates, which measure and print a line of JSON for each figure.

use std::io::stderr;
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::figures::{Bar, Figure, Measured};
use super::{bars, model};

/// Names and figures, in the order in which they were printed.
pub(super) type Lines = Vec<(String, Measured)>;

/// Measurements that belong together, and what must be among them.
pub(super) struct Part {
    name: &'static str,
    runs: &'static [fn() -> Result<Lines>],
    bars: &'static [(&'static str, Bar)],
}

/// All of them.
pub(super) const PARTS: [Part; 4] = [
    Part {
        name: "kernels",
        runs: &[|| example("sirocco-compute", "kernels"), || example("sirocco-compute", "quant")],
        bars: bars::KERNELS,
    },
    Part { name: "attention", runs: &[|| example("sirocco-compute", "attention")], bars: bars::ATTENTION },
    Part { name: "hop", runs: &[|| example("sirocco-proto", "hop")], bars: bars::HOP },
    Part {
        name: "model",
        runs: &[|| model::run("bf16"), || model::run("int8"), || model::run("int4")],
        bars: bars::MODEL,
    },
];

/// The part called `name`.
pub(super) fn find(name: &str) -> Option<&'static Part> {
    PARTS.iter().find(|part| part.name == name)
}

/// Runs `parts` one after the other; what one could not measure is shown as that, and the next one goes on.
pub(super) fn measure(parts: &[Part]) -> Vec<Figure> {
    parts.iter().flat_map(measure_part).collect()
}

fn measure_part(part: &Part) -> Vec<Figure> {
    let mut lines = Lines::new();
    for run in part.runs {
        match run() {
            Ok(more) => lines.extend(more),
            Err(error) => eprintln!("xtask: {}: {error:#}", part.name),
        }
    }
    beside(lines, part.bars)
}

/// Each figure with its bar, and each bar without a figure.
pub(super) fn beside(lines: Lines, bars: &[(&str, Bar)]) -> Vec<Figure> {
    let bar = |name: &str| bars.iter().find(|(known, _)| *known == name).map(|(_, bar)| *bar);
    let absent: Vec<Figure> = bars
        .iter()
        .filter(|(name, _)| !lines.iter().any(|(known, _)| known == name))
        .map(|(name, bar)| Figure { name: (*name).to_owned(), measured: None, bar: Some(*bar) })
        .collect();
    let measured = lines.into_iter().map(|(name, measured)| {
        let bar = bar(&name);
        Figure { name, measured: Some(measured), bar }
    });
    measured.chain(absent).collect()
}

/// Builds and runs an example that needs nothing.
fn example(package: &str, name: &str) -> Result<Lines> {
    build_dist(&["--package", package, "--example", name])?;
    lines(&mut Command::new(built(&format!("examples/{name}"))?))
}

/// Builds `targets` as `profile`; what is printed goes to standard error.
pub(crate) fn build(profile: &str, targets: &[&str]) -> Result<()> {
    let mut build = crate::cargo(&["build", "--locked", "--profile", profile])?;
    build.args(targets).stdout(Stdio::from(stderr().as_fd().try_clone_to_owned()?));
    let status = build.status().context("start cargo")?;
    ensure!(status.success(), "`cargo build --profile {profile} {}` ended with {status}", targets.join(" "));
    Ok(())
}

/// Builds `targets` as images have them.
pub(super) fn build_dist(targets: &[&str]) -> Result<()> {
    build("dist", targets)
}

/// Where [`build_dist`] leaves a program.
pub(super) fn built(program: &str) -> Result<PathBuf> {
    Ok(crate::target_folder()?.join("dist").join(program))
}

/// Runs `command`, without settings from the environment, and reads the figures it prints.
pub(super) fn lines(command: &mut Command) -> Result<Lines> {
    let program = command.get_program().display().to_string();
    eprintln!("xtask: measuring: {program}");
    crate::without_settings(command);
    let output = command.stderr(Stdio::inherit()).output().with_context(|| format!("start {program}"))?;
    ensure!(output.status.success(), "{program} ended with {}", output.status);
    let text = String::from_utf8(output.stdout).with_context(|| program.clone())?;
    text.lines().map(|line| read(line).with_context(|| format!("{program} printed {line:?}"))).collect()
}

/// A figure: `{"name", "measured", "floor", "unit"}`.
fn read(line: &str) -> Result<(String, Measured)> {
    let value: Value = serde_json::from_str(line)?;
    let text = |key: &str| value[key].as_str().map(str::to_owned).with_context(|| format!("{key} is {}", value[key]));
    let number = |key: &str| {
        let number = value[key].as_f64().filter(|number| number.is_finite() && *number > 0.0);
        number.with_context(|| format!("{key} is {}, must be a number above 0", value[key]))
    };
    let measured =
        Measured { value: number("measured")?, floor: number("floor")?, unit: text("unit")?, note: String::new() };
    Ok((text("name")?, measured))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_whose_figure_is_missing_is_missed_and_a_figure_without_bar_is_shown() {
        let lines = [
            r#"{"name": "b", "measured": 3, "floor": 4.0, "unit": "s"}"#,
            r#"{"name": "c", "measured": 1, "floor": 1, "unit": "s"}"#,
        ];
        let lines: Lines = lines.iter().map(|line| read(line).unwrap()).collect();
        let bar = Bar::above(0.5);
        let figures = beside(lines, &[("a", bar), ("b", bar)]);
        let seen: Vec<_> = figures.iter().map(|f| (f.name.as_str(), f.bar.is_some(), f.missed())).collect();
        assert_eq!(seen, [("b", true, false), ("c", false, false), ("a", true, true)]);
    }

    #[test]
    fn a_line_that_is_no_figure_is_refused() {
        for line in [
            "",
            "{}",
            r#"{"name": "a", "measured": 0, "floor": 1, "unit": "s"}"#,
            r#"{"name": "a", "measured": 1, "floor": "x", "unit": "s"}"#,
        ] {
            assert!(read(line).is_err(), "{line}");
        }
    }
}
