//! `cargo xtask bench serve`: a cluster in one process with the bundled model, under load by `sirocco bench`.
//!
//! Every figure is a ratio of two that were measured in the same run, or a share of the machine; its limit stands beside it.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use super::figures::{Bar, Figure, Measured};
use super::parts;

/// How long a cluster may take to be ready.
const READY: Duration = Duration::from_mins(1);
/// How long what is not idle yet may take to become so, and how long it is then watched.
const IDLE: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(10));
/// How long each load is put on, but for overload.
const SECONDS: &str = "12";
const OVERLOAD_SECONDS: &str = "60";

/// A value over another, and what their ratio must reach.
fn figure(name: &str, (value, floor, unit): (f64, f64, &str), bar: Bar, note: String) -> Figure {
    let measured = Measured { value, floor, unit: unit.to_owned(), note };
    Figure { name: name.to_owned(), measured: Some(measured), bar: Some(bar) }
}

/// Measures.
pub(super) fn run() -> Result<Vec<Figure>> {
    parts::build_dist(&["--package", "sirocco"])?;
    let cluster = Cluster::start(parts::built("sirocco")?)?;
    let mut figures = vec![cluster.idle()?];
    figures.extend(cluster.streams()?);
    figures.push(cluster.prefix()?);
    figures.extend(cluster.overload()?);
    Ok(figures)
}

/// `sirocco up` on free ports. Dropping it ends it.
struct Cluster {
    sirocco: PathBuf,
    process: Child,
    router: String,
}

impl Cluster {
    fn start(sirocco: PathBuf) -> Result<Self> {
        let output = std::env::temp_dir().join(format!("sirocco-bench-{}.log", std::process::id()));
        let file = std::fs::File::create(&output).with_context(|| output.display().to_string())?;
        let mut command = Command::new(&sirocco);
        crate::without_settings(&mut command).args(["up", "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0"]);
        command.args(["--coordinator-grpc", "127.0.0.1:0", "--coordinator-http", "127.0.0.1:0"]);
        let process =
            command.stdin(Stdio::null()).stdout(file).stderr(Stdio::null()).spawn().context("start sirocco")?;
        let mut cluster = Self { sirocco, process, router: String::new() };
        let began = Instant::now();
        let said = loop {
            let said = std::fs::read_to_string(&output)?;
            if said.lines().any(|line| line == "ready") {
                break said;
            }
            if cluster.process.try_wait()?.is_some() || began.elapsed() > READY {
                bail!("the cluster is not ready: {said}");
            }
            std::thread::sleep(Duration::from_millis(50));
        };
        std::fs::remove_file(&output)?;
        let mut router = said.lines().filter(|line| line.split_whitespace().nth(1) == Some("router"));
        let address = router.next().and_then(|line| line.split_whitespace().nth(3));
        address.context("the router's address")?.clone_into(&mut cluster.router);
        Ok(cluster)
    }

    /// Puts a load on and returns what `sirocco bench` reports.
    fn bench(&self, args: &[&str]) -> Result<Value> {
        let mut command = Command::new(&self.sirocco);
        crate::without_settings(&mut command).args(["bench", "--router", &self.router, "-o", "json"]).args(args);
        let output = command.output().context("start sirocco bench")?;
        ensure!(output.status.success(), "sirocco bench: {}", String::from_utf8_lossy(&output.stderr));
        let report: Value = serde_json::from_slice(&output.stdout).context("its report")?;
        ensure!(report["failed"] == 0, "requests failed: {report}");
        eprintln!("sirocco bench {}: {report}", args.join(" "));
        Ok(report)
    }

    /// What a cluster without requests takes of one core: router, coordinator and expert nodes together.
    fn idle(&self) -> Result<Figure> {
        std::thread::sleep(IDLE.0);
        let before = self.cpu_seconds()?;
        std::thread::sleep(IDLE.1);
        let share = (self.cpu_seconds()? - before) / IDLE.1.as_secs_f64();
        let from = "router, coordinator and 8 expert nodes".to_owned();
        Ok(figure("idle cluster: share of one core", (share, 1.0, "cores"), Bar::below(0.01), from))
    }

    /// One stream, 32, and random arrivals at 80% of what those are served at.
    fn streams(&self) -> Result<[Figure; 2]> {
        let load = ["--prompt-tokens", "16", "--max-tokens", "128", "--seconds", SECONDS];
        let one = self.bench(&[&["--streams", "1", "--seed", "1"], &load[..]].concat())?;
        let many = self.bench(&[&["--streams", "32", "--seed", "2"], &load[..]].concat())?;
        let (alone, together) = (number(&one, "tokens_per_s")?, number(&many, "tokens_per_s")?);
        let rate = format!("{:.3}", 0.8 * number(&many, "requests_per_s")?);
        let busy = self.bench(&[&["--rate", &rate, "--seed", "3"], &load[..]].concat())?;
        let (p50, p99) = (number(&busy["inter_token_ms"], "p50")?, number(&busy["inter_token_ms"], "p99")?);
        Ok([
            figure("32 streams over one stream", (together, alone, "tokens/s"), Bar::above(6.0), String::new()),
            figure(
                "80% of peak load: p99 between tokens over p50",
                (p99, p50, "ms"),
                Bar::below(3.0),
                format!("at {rate} requests/s"),
            ),
        ])
    }

    /// The first token of a prompt of 1,000 tokens, and of others that begin with the same 1,000.
    fn prefix(&self) -> Result<Figure> {
        let once = |seed| ["--streams", "1", "--seconds", "0.01", "--max-tokens", "1", "--seed", seed];
        let mut ratios = Vec::new();
        for seed in ["11", "12", "13"] {
            let prompt = ["--prompt-tokens", "1016", "--shared-tokens", "1000"];
            let first = self.bench(&[&once(seed)[..], &prompt].concat())?;
            let others = ["--streams", "1", "--seconds", "0.3", "--max-tokens", "1", "--seed", seed];
            let second = self.bench(&[&others[..], &prompt].concat())?;
            let ms = |report: &Value| number(&report["first_token_ms"], "p50");
            ratios.push((ms(&second)? / ms(&first)?, ms(&second)?, ms(&first)?));
        }
        ratios.sort_by(|a, b| a.0.total_cmp(&b.0));
        let (_, second, first) = ratios[1];
        let name = "1,000 tokens in common: second first-token time over first";
        Ok(figure(name, (second, first, "ms"), Bar::below(0.2), "median of 3 prompts".to_owned()))
    }

    /// Three times as many requests as can be served, for a minute.
    fn overload(&self) -> Result<[Figure; 3]> {
        let load = ["--prompt-tokens", "64", "--max-tokens", "64"];
        let peak = self.bench(&[&["--streams", "32", "--seed", "21", "--seconds", SECONDS], &load[..]].concat())?;
        let rate = format!("{:.3}", 3.0 * number(&peak, "requests_per_s")?);
        let before = self.resident_bytes()?;
        let over = ["--rate", &rate, "--seed", "22", "--seconds", OVERLOAD_SECONDS];
        let over = self.bench(&[&over, &load[..]].concat())?;
        let after = self.resident_bytes()?;
        let (goodput, best) = (number(&over, "tokens_per_s")?, number(&peak, "tokens_per_s")?);
        let refused = number(&over, "refused")?;
        ensure!(refused > 0.0, "nothing was refused, so this was no overload: {over}");
        Ok([
            figure(
                "3x overload for 60 s: goodput over peak",
                (goodput, best, "tokens/s"),
                Bar::above(0.9),
                String::new(),
            ),
            figure(
                "3x overload: slowest refusal",
                (number(&over["refusal_ms"], "max")? / 1e3, 1.0, "s"),
                Bar::below(0.1),
                format!("{refused} refused, p99 {:.1} ms", number(&over["refusal_ms"], "p99")?),
            ),
            figure(
                "3x overload: memory after over before",
                (mib(after), mib(before), "MiB"),
                Bar::below(1.1),
                String::new(),
            ),
        ])
    }

    fn cpu_seconds(&self) -> Result<f64> {
        let stat = self.proc("stat")?;
        // After the name in parentheses: user and system time are the 14th and 15th of all fields, in hundredths of a second.
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        let ticks = fields[11].parse::<f64>()? + fields[12].parse::<f64>()?;
        Ok(ticks / 100.0)
    }

    fn resident_bytes(&self) -> Result<f64> {
        let status = self.proc("status")?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("VmRSS")?;
        Ok(line.trim().trim_end_matches(" kB").parse::<f64>()? * 1024.0)
    }

    fn proc(&self, file: &str) -> Result<String> {
        let path = format!("/proc/{}/{file}", self.process.id());
        std::fs::read_to_string(&path).context(path)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // It may have ended by itself; then there is nothing to kill and the wait reaps it.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn mib(bytes: f64) -> f64 {
    bytes / f64::from(1 << 20)
}

fn number(report: &Value, field: &str) -> Result<f64> {
    report[field].as_f64().with_context(|| format!("{field} in {report}"))
}
