//! A real etcd for a test: started on free ports with its own data, killed and reaped when dropped; and one of several members.
//!
//! A missing etcd is a failure that says how to install it, never a skip.

mod cluster;
pub mod ctl;

use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

pub use cluster::EtcdCluster;

/// How long etcd may take to become healthy.
const START_TIMEOUT: Duration = Duration::from_secs(30);
const START_TRIES: usize = 5;

/// Files that make etcd speak TLS and ask its clients for a certificate.
#[derive(Clone, Debug)]
pub struct EtcdTls {
    /// PEM certificate for 127.0.0.1, valid for servers and clients.
    pub cert: PathBuf,
    /// PEM private key of `cert`.
    pub key: PathBuf,
    /// PEM certificate of the authority that signed it and those of the clients.
    pub ca: PathBuf,
}

/// How an etcd differs from a plain one.
#[derive(Clone, Debug, Default)]
pub struct EtcdSetup {
    /// Speak TLS, and accept only clients with a certificate of its `ca`.
    pub tls: Option<EtcdTls>,
    /// More arguments for the command line.
    pub args: Vec<String>,
}

/// An etcd process.
#[derive(Debug)]
pub struct Etcd {
    child: Option<Child>,
    ports: Ports,
    setup: EtcdSetup,
    name: String,
    /// All members of its cluster, as `--initial-cluster` takes them.
    members: String,
    folder: TempDir,
}

#[derive(Clone, Copy, Debug)]
struct Ports {
    client: u16,
    peer: u16,
    health: u16,
}

impl Etcd {
    /// Starts a plain etcd and waits until it is healthy.
    pub fn start() -> Result<Self> {
        Self::start_with(&EtcdSetup::default())
    }

    /// Starts etcd as `setup` says and waits until it is healthy.
    pub fn start_with(setup: &EtcdSetup) -> Result<Self> {
        for _ in 0..START_TRIES {
            let ports = Ports::free()?;
            let mut etcd = Self::new("test", ports, format!("test={}", ports.peer()), setup)?;
            match etcd.restart() {
                Err(_) if etcd.found_a_port_taken() => {}
                started => return started.map(|()| etcd),
            }
        }
        bail!("etcd found its ports taken {START_TRIES} times")
    }

    /// An etcd that does not run yet.
    fn new(name: &str, ports: Ports, members: String, setup: &EtcdSetup) -> Result<Self> {
        let folder = tempfile::tempdir().context("a folder for etcd's data")?;
        Ok(Self { child: None, ports, setup: setup.clone(), name: name.to_owned(), members, folder })
    }

    /// Where clients connect.
    pub fn endpoint(&self) -> String {
        let scheme = if self.setup.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://127.0.0.1:{}", self.ports.client)
    }

    /// Kills the process as `kill -9` does. Its data stays.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Stops the process where it is (`kill -STOP`): connections stay open and soon nothing answers. [`Etcd::restart`] ends it.
    pub fn hang(&self) -> Result<()> {
        let child = self.child.as_ref().context("etcd is not running")?;
        let status = Command::new("kill").args(["-STOP", &child.id().to_string()]).status()?;
        anyhow::ensure!(status.success(), "kill -STOP ended with {status}");
        Ok(())
    }

    /// Starts it again on the same data and ports, killing it first if it runs, and waits until it is healthy.
    pub fn restart(&mut self) -> Result<()> {
        self.spawn()?;
        self.wait_until_healthy()
    }

    /// Starts it, killing it first if it runs.
    fn spawn(&mut self) -> Result<()> {
        self.kill();
        let log = File::options().create(true).append(true).open(self.log_path())?;
        let mut command = self.command();
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let child = command
            .spawn()
            .with_context(|| format!("start {}: is it installed? (apt-get install etcd-server)", binary().display()))?;
        self.child = Some(child);
        Ok(())
    }

    fn command(&self) -> Command {
        let (peer, health) = (self.ports.peer(), self.ports.health);
        let mut command = Command::new(binary());
        command
            .args(["--name", &self.name, "--data-dir"])
            .arg(self.folder.path().join("data"))
            .args(["--listen-client-urls", &self.endpoint(), "--advertise-client-urls", &self.endpoint()])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &self.members])
            .args(["--listen-metrics-urls", &format!("http://127.0.0.1:{health}")])
            // Half the default: it starts sooner and grants leases down to one second.
            .args(["--heartbeat-interval", "50", "--election-timeout", "500"])
            .args(&self.setup.args);
        if let Some(tls) = &self.setup.tls {
            command.arg("--client-cert-auth").arg("--cert-file").arg(&tls.cert);
            command.arg("--key-file").arg(&tls.key).arg("--trusted-ca-file").arg(&tls.ca);
        }
        command
    }

    fn wait_until_healthy(&mut self) -> Result<()> {
        self.healthy().with_context(|| format!("etcd did not start; its log:\n{}", self.log()))
    }

    /// Another process took a port between our finding it free and etcd's listening on it.
    fn found_a_port_taken(&self) -> bool {
        self.log().contains("address already in use")
    }

    fn healthy(&mut self) -> Result<()> {
        let deadline = Instant::now() + START_TIMEOUT;
        while Instant::now() < deadline {
            if let Some(status) = self.child.as_mut().and_then(|child| child.try_wait().ok().flatten()) {
                bail!("it ended with {status}");
            }
            if is_healthy(self.ports.health) {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        bail!("it was not healthy after {START_TIMEOUT:?}")
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.log_path()).unwrap_or_else(|error| format!("(no log: {error})"))
    }

    fn log_path(&self) -> PathBuf {
        self.folder.path().join("stderr")
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Ports {
    /// Three ports that were free a moment ago.
    fn free() -> Result<Self> {
        let listeners = [(); 3].map(|()| TcpListener::bind("127.0.0.1:0"));
        let mut ports = [0; 3];
        for (port, listener) in ports.iter_mut().zip(listeners) {
            *port = listener?.local_addr()?.port();
        }
        let [client, peer, health] = ports;
        Ok(Self { client, peer, health })
    }

    /// Where other members connect.
    fn peer(self) -> String {
        format!("http://127.0.0.1:{}", self.peer)
    }
}

/// `SIROCCO_ETCD_BIN`, or `etcd` from the path.
fn binary() -> PathBuf {
    std::env::var_os("SIROCCO_ETCD_BIN").map_or_else(|| Path::new("etcd").to_owned(), PathBuf::from)
}

fn is_healthy(port: u16) -> bool {
    let ask = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_read_timeout(Some(Duration::from_secs(2)))?;
        stream.write_all(b"GET /health HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    ask().is_ok_and(|answer| answer.contains(r#""health":"true""#))
}
