//! What `etcdctl` says of a store: a second opinion that shares no code with Sirocco.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::process::Process;
use crate::wait_for;

/// A change of one key: its new value, or none when it was deleted.
pub type Change = (String, Option<Value>);

/// What etcdctl prints for `args`, asked of the members at `endpoints`, with commas between.
pub fn etcdctl(endpoints: &str, args: &[&str]) -> Result<String> {
    let mut command = Command::new(binary());
    command.env("ETCDCTL_API", "3").args(["--endpoints", endpoints]).args(args);
    let output = command.output().context("start etcdctl, which is installed with etcd")?;
    ensure!(output.status.success(), "etcdctl {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

/// Keys and values under a cluster's prefix.
pub fn entries(endpoints: &str, cluster: &str) -> Result<Vec<(String, Value)>> {
    let text = etcdctl(endpoints, &["get", "--prefix", &format!("/sirocco/{cluster}/")])?;
    let mut lines = text.lines();
    let pairs = std::iter::from_fn(|| lines.next().zip(lines.next()));
    Ok(pairs.map(|(key, value)| (key.to_owned(), json(value))).collect())
}

/// What each member says of itself, as `endpoint status` does.
pub fn status(endpoints: &str) -> Result<Vec<Value>> {
    Ok(serde_json::from_str(&etcdctl(endpoints, &["endpoint", "status", "-w", "json"])?)?)
}

/// The revision of the store, which every write raises by one.
pub fn revision(endpoints: &str) -> Result<u64> {
    let revisions = status(endpoints)?;
    let revisions = revisions.iter().filter_map(|member| member["Status"]["header"]["revision"].as_u64());
    revisions.max().context("etcdctl names no revision")
}

/// Every change under a cluster's prefix from revision `from` on, in order, up to the first that is `last`.
pub fn history(endpoints: &str, cluster: &str, from: u64, last: impl Fn(&Change) -> bool) -> Result<Vec<Change>> {
    let (prefix, from) = (format!("/sirocco/{cluster}/"), from.to_string());
    let args = ["--endpoints", endpoints, "watch", "--prefix", &prefix, "--rev", &from];
    let watch = Process::start_at(&binary(), &args, &[("ETCDCTL_API", "3")])?;
    wait_for("the last change", || {
        let mut changes = changes(&watch.stdout());
        let end = changes.iter().position(&last);
        Ok(end.map(|end| {
            changes.truncate(end + 1);
            changes
        }))
    })
    .with_context(|| watch.stderr())
}

/// The changes in what `etcdctl watch` has printed: for each three lines, of which the last may not be there yet.
fn changes(printed: &str) -> Vec<Change> {
    let mut lines = printed.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n'));
    let mut changes = Vec::new();
    while let (Some(kind), Some(key), Some(value)) = (lines.next(), lines.next(), lines.next()) {
        changes.push((key.to_owned(), (kind == "PUT").then(|| json(value))));
    }
    changes
}

/// Values that are not JSON are shown as they are.
fn json(value: &str) -> Value {
    serde_json::from_str(value).unwrap_or_else(|_| Value::String(value.to_owned()))
}

/// `SIROCCO_ETCDCTL_BIN`, or `etcdctl` from the path.
fn binary() -> PathBuf {
    std::env::var_os("SIROCCO_ETCDCTL_BIN").unwrap_or_else(|| "etcdctl".into()).into()
}
