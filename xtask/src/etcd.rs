//! Finds the etcd that tests start, or installs Debian's. Never leaves an etcd service enabled or running.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// Installs both packages. While they are unpacked, a policy script that was not there before forbids starting services; Debian
/// would also enable the unit for the next boot, which is undone.
const INSTALL: &str = "\
set -eu
export DEBIAN_FRONTEND=noninteractive
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
  trap 'rm -f $policy' EXIT
  printf '#!/bin/sh\\nexit 101\\n' > $policy
  chmod 755 $policy
fi
apt-get update
apt-get install -y --no-install-recommends etcd-server etcd-client
if command -v systemctl > /dev/null; then systemctl disable --now etcd.service || true; fi
";

/// What a person runs to get the same.
const BY_HAND: &str = "apt-get update && apt-get install -y --no-install-recommends etcd-server etcd-client";

/// What to do on a machine without etcd.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum WhenMissing {
    /// Install Debian's packages, as root or through `sudo`.
    Install,
    /// Say what to run and fail.
    Fail,
}

/// The programs that tests start.
pub(crate) struct Etcd {
    server: PathBuf,
    client: PathBuf,
}

impl Etcd {
    /// Finds server and client, installing them first when need be.
    pub(crate) fn ensure(when_missing: WhenMissing) -> Result<Self> {
        if let Some(etcd) = Self::find()? {
            return Ok(etcd);
        }
        if when_missing == WhenMissing::Fail {
            bail!("etcd or etcdctl is missing; set SIROCCO_ETCD_BIN and SIROCCO_ETCDCTL_BIN or run: {BY_HAND}");
        }
        install()?;
        Self::find()?.context("etcd was installed but is neither on the path nor in /usr/bin")
    }

    /// Tells tests which programs to start.
    pub(crate) fn export(&self, command: &mut Command) {
        command.env("SIROCCO_ETCD_BIN", &self.server).env("SIROCCO_ETCDCTL_BIN", &self.client);
    }

    fn find() -> Result<Option<Self>> {
        let server = find_program("SIROCCO_ETCD_BIN", "etcd")?;
        let client = find_program("SIROCCO_ETCDCTL_BIN", "etcdctl")?;
        Ok(server.zip(client).map(|(server, client)| Self { server, client }))
    }
}

/// The file `variable` names, which must then exist; else `name` on the path; else in /usr/bin.
fn find_program(variable: &str, name: &str) -> Result<Option<PathBuf>> {
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

fn install() -> Result<()> {
    let mut command = if is_root()? {
        Command::new("sh")
    } else if can_sudo() {
        let mut sudo = Command::new("sudo");
        sudo.args(["-n", "sh"]);
        sudo
    } else {
        bail!("etcd is missing and installing it needs root; run as root: {BY_HAND}");
    };
    let status = command.args(["-c", INSTALL]).status().context("start apt-get")?;
    if !status.success() {
        bail!("installing etcd ended with {status}; install it with: {BY_HAND}");
    }
    Ok(())
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
