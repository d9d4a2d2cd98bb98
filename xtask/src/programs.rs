//! Finds the programs of others that tests start, or installs Debian's: one row of [`PROGRAMS`] for each. Never leaves a service
//! enabled or running.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// A program that tests start.
#[derive(Debug)]
pub(crate) struct Program {
    /// What it is called on the path.
    name: &'static str,
    /// Names its file; tests read it too.
    variable: &'static str,
    /// Debian's packages that bring it and what it needs.
    packages: &'static [&'static str],
    /// The unit that its package enables, if any.
    unit: Option<&'static str>,
}

/// Every such program.
pub(crate) const PROGRAMS: [Program; 12] = [
    Program { name: "etcd", variable: "SIROCCO_ETCD_BIN", packages: &["etcd-server"], unit: Some("etcd.service") },
    Program { name: "etcdctl", variable: "SIROCCO_ETCDCTL_BIN", packages: &["etcd-client"], unit: None },
    Program {
        name: "promtool",
        variable: "SIROCCO_PROMTOOL_BIN",
        packages: &["prometheus"],
        unit: Some("prometheus.service"),
    },
    Program { name: "chromium", variable: "SIROCCO_CHROMIUM_BIN", packages: CHROMIUM, unit: None },
    Program { name: "chromedriver", variable: "SIROCCO_CHROMEDRIVER_BIN", packages: &["chromium-driver"], unit: None },
    Program { name: "python3", variable: "SIROCCO_PYTHON_BIN", packages: PYTHON, unit: None },
    Program { name: "node", variable: "SIROCCO_NODE_BIN", packages: &["nodejs"], unit: None },
    Program { name: "faketime", variable: "SIROCCO_FAKETIME_BIN", packages: &["faketime"], unit: None },
    Program { name: "c++", variable: "SIROCCO_CXX_BIN", packages: &["g++"], unit: None },
    Program { name: "npm", variable: "SIROCCO_NPM_BIN", packages: &["npm"], unit: None },
    Program { name: "qemu-aarch64", variable: "SIROCCO_QEMU_AARCH64_BIN", packages: &["qemu-user"], unit: None },
    Program {
        name: "aarch64-linux-gnu-gcc",
        variable: "SIROCCO_AARCH64_GCC_BIN",
        packages: &["gcc-aarch64-linux-gnu", "libc6-dev-arm64-cross"],
        unit: None,
    },
];

/// What stands in for an Arm machine; only `cargo xtask neon` needs these.
const ARM: [&str; 2] = ["qemu-aarch64", "aarch64-linux-gnu-gcc"];

/// A browser without fonts shows no text; with these, screenshots look the same everywhere.
const CHROMIUM: &[&str] = &["chromium", "fonts-dejavu-core", "fonts-inter"];

/// With what environments of its own are made of.
const PYTHON: &[&str] = &["python3", "python3-venv"];

/// What to do on a machine where programs are missing.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum WhenMissing {
    /// Install Debian's packages, as root or through `sudo`.
    Install,
    /// Say what to run and fail.
    Fail,
}

/// Programs that were found, each with the variable that names it.
#[derive(Debug)]
pub(crate) struct Found(Vec<(&'static str, PathBuf)>);

impl Found {
    /// The file of a program that was asked for.
    pub(crate) fn path(&self, name: &str) -> Result<&Path> {
        let program = PROGRAMS.iter().find(|program| program.name == name);
        let variable = program.with_context(|| format!("{name} is no program of tests"))?.variable;
        let found = self.0.iter().find(|(known, _)| *known == variable);
        Ok(&found.with_context(|| format!("{name} was not looked for"))?.1)
    }

    /// Tells tests which programs to start.
    pub(crate) fn export(&self, command: &mut Command) {
        command.envs(self.0.iter().map(|(variable, path)| (variable, path)));
    }
}

/// Finds the programs called `names`, installing those that are missing first when need be.
pub(crate) fn ensure(names: &[&str], when_missing: WhenMissing) -> Result<Found> {
    let wanted: Vec<&Program> = PROGRAMS.iter().filter(|program| names.contains(&program.name)).collect();
    let missing = missing(&wanted)?;
    if !missing.is_empty() {
        if when_missing == WhenMissing::Fail {
            let (names, variables) = (list(&missing, |p| p.name), list(&missing, |p| p.variable));
            bail!("missing: {names}; set {variables} or run: {}", by_hand(&missing));
        }
        install(&missing)?;
    }
    let path = |program: &&Program| {
        let path = find(program)?;
        let path = path.with_context(|| format!("{0} is neither on the path nor in /usr/bin", program.name))?;
        Ok((program.variable, path))
    };
    Ok(Found(wanted.iter().map(path).collect::<Result<_>>()?))
}

/// The names of all programs that the tests of this machine start.
pub(crate) fn all() -> Vec<&'static str> {
    PROGRAMS.iter().map(|program| program.name).filter(|name| !ARM.contains(name)).collect()
}

/// The names of those that the kernels' tests need on an emulated Arm: the C++ compiler is this machine's, and so is what it makes.
pub(crate) fn for_arm() -> Vec<&'static str> {
    [&ARM[..], &["c++"]].concat()
}

fn missing<'a>(wanted: &[&'a Program]) -> Result<Vec<&'a Program>> {
    let mut missing = Vec::new();
    for program in wanted {
        if find(program)?.is_none() {
            missing.push(*program);
        }
    }
    Ok(missing)
}

/// The file its variable names, which must then exist; else its name on the path; else in /usr/bin.
fn find(program: &Program) -> Result<Option<PathBuf>> {
    let Program { name, variable, .. } = program;
    if let Some(path) = std::env::var_os(variable) {
        let path = std::path::absolute(&path).with_context(|| format!("{variable}={}", path.display()))?;
        if !path.is_file() {
            bail!("{variable}={} is not a file", path.display());
        }
        return Ok(Some(path));
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain([Path::new("/usr/bin").to_owned()]);
    Ok(folders.map(|folder| folder.join(name)).find(|file| file.is_file()))
}

/// Installs the packages of all `missing` programs at once.
fn install(missing: &[&Program]) -> Result<()> {
    let by_hand = by_hand(missing);
    let names = list(missing, |program| program.name);
    let mut command = if is_root()? {
        Command::new("sh")
    } else if can_sudo() {
        let mut sudo = Command::new("sudo");
        sudo.args(["-n", "sh"]);
        sudo
    } else {
        bail!("missing: {names}; installing needs root; run as root: {by_hand}");
    };
    let status = command.args(["-c", &script(missing)]).status().context("start apt-get")?;
    if !status.success() {
        bail!("installing {names} ended with {status}; install by hand: {by_hand}");
    }
    Ok(())
}

/// Installs packages. While they are unpacked, a policy script that was not there before forbids starting services; Debian
/// would also enable units for the next boot, which is undone.
fn script(missing: &[&Program]) -> String {
    let units: Vec<&str> = missing.iter().filter_map(|program| program.unit).collect();
    let (packages, units) = (packages(missing), units.join(" "));
    format!(
        "\
set -eu
export DEBIAN_FRONTEND=noninteractive
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
  trap 'rm -f $policy' EXIT
  printf '#!/bin/sh\\nexit 101\\n' > $policy
  chmod 755 $policy
fi
apt-get update
apt-get install -y --no-install-recommends {packages}
units='{units}'
if [ -n \"$units\" ] && command -v systemctl > /dev/null; then systemctl disable --now $units || true; fi
"
    )
}

/// What a person runs to get the same.
fn by_hand(missing: &[&Program]) -> String {
    format!("apt-get update && apt-get install -y --no-install-recommends {}", packages(missing))
}

fn packages(missing: &[&Program]) -> String {
    let packages: BTreeSet<&str> = missing.iter().flat_map(|program| program.packages).copied().collect();
    packages.into_iter().collect::<Vec<_>>().join(" ")
}

fn list(programs: &[&Program], part: impl Fn(&Program) -> &'static str) -> String {
    programs.iter().map(|program| part(program)).collect::<Vec<_>>().join(", ")
}

fn is_root() -> Result<bool> {
    let output = Command::new("id").arg("-u").output().context("start id")?;
    Ok(output.stdout.trim_ascii() == b"0")
}

/// Whether `sudo` works here without asking for a password.
fn can_sudo() -> bool {
    let mut sudo = Command::new("sudo");
    sudo.args(["-n", "true"]).stdout(Stdio::null()).stderr(Stdio::null());
    sudo.status().is_ok_and(|status| status.success())
}
