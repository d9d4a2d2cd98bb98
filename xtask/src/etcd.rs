//! A real etcd for the tests: the one that is there, or Debian's.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

/// What to do when it can be done in no other way.
const BY_HAND: &str = "install it with `apt-get install etcd-server etcd-client`, or set SIROCCO_ETCD_BIN to an etcd";

/// Where etcd's programs are.
pub(crate) struct Etcd {
    pub(crate) server: PathBuf,
    /// etcdctl.
    pub(crate) client: PathBuf,
}

/// Finds etcd, or installs it when this process may.
pub(crate) fn find_or_install() -> Result<Etcd> {
    if let Some(etcd) = find()? {
        return Ok(etcd);
    }
    eprintln!("xtask: no etcd here, installing Debian's etcd-server and etcd-client");
    install()?;
    find()?.with_context(|| format!("etcd is not there after its installation; {BY_HAND}"))
}

fn find() -> Result<Option<Etcd>> {
    let server = match std::env::var_os("SIROCCO_ETCD_BIN").map(PathBuf::from) {
        Some(path) if path.is_file() => Some(path),
        Some(path) => bail!("SIROCCO_ETCD_BIN is {}, where there is no file", path.display()),
        None => on_path("etcd"),
    };
    let Some(server) = server else { return Ok(None) };
    let beside = server.with_file_name("etcdctl");
    let client = std::env::var_os("SIROCCO_ETCDCTL_BIN").map(PathBuf::from);
    let client = client.or_else(|| on_path("etcdctl")).or_else(|| beside.is_file().then_some(beside));
    Ok(client.map(|client| Etcd { server, client }))
}

fn on_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain([PathBuf::from("/usr/bin")]);
    folders.map(|folder| folder.join(program)).find(|path| path.is_file())
}

fn install() -> Result<()> {
    if on_path("apt-get").is_none() {
        bail!("no etcd and no apt-get; {BY_HAND}");
    }
    apt(&["update"])?;
    apt(&["install", "-y", "--no-install-recommends", "etcd-server", "etcd-client"])
}

/// Runs apt-get as root. Packages may not start services: the tests start their own.
fn apt(args: &[&str]) -> Result<()> {
    let root = Command::new("id").arg("-u").output().is_ok_and(|output| output.stdout == b"0\n");
    let mut command = Command::new(if root { Path::new("env") } else { Path::new("sudo") });
    if !root {
        command.args(["-n", "env"]);
    }
    command.args(["DEBIAN_FRONTEND=noninteractive", "RUNLEVEL=1", "apt-get", "-q"]).args(args);
    // What it says belongs to the steps of this program, not to its results.
    let status = command.stdin(Stdio::null()).stdout(std::io::stderr()).status();
    match status {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => bail!("`apt-get {}` failed ({status}); {BY_HAND}", args.join(" ")),
        Err(error) => bail!("`apt-get {}`: {error}; {BY_HAND}", args.join(" ")),
    }
}
