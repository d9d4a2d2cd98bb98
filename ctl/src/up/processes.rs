//! A cluster of processes on etcd: each node a program of its own, started and stopped from here.

use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};

use super::{Addresses, Args, Cluster, explain_wait, listener};

/// Running processes, in the order in which they were started.
pub(super) struct Processes {
    nodes: Vec<Node>,
    /// Longest wait for one to stop.
    grace: Duration,
}

/// One process.
struct Node {
    id: String,
    child: Child,
    /// Where it listens, gRPC and HTTP, once it has said so.
    listens: Option<(String, String)>,
    stdout: Lines<BufReader<ChildStdout>>,
}

impl Processes {
    /// A cluster without processes.
    pub(super) fn new(args: &Args) -> Self {
        Self { nodes: Vec::new(), grace: Duration::from_secs(2 * args.drain_s + 5) }
    }

    /// Starts the programs: the coordinator, the routers, the expert nodes. These share what routers leave of a GPU.
    async fn spawn_all(&mut self, args: &Args, model: &Path) -> Result<()> {
        const ANY: &str = "127.0.0.1:0";
        let device = args.device.flags();
        let spec = sirocco_model::read_spec(model)?;
        let kv_bytes = args.kv_bytes().await?.map(|bytes| format!("--kv-bytes={bytes}"));
        let model = model.to_str().context("the model folder's path is not UTF-8")?;
        let grpc = listener(args, args.coordinator_grpc, 7400).to_string();
        let http = listener(args, args.coordinator_http, 7401).to_string();
        self.spawn(args, "coordinator", "coordinator-0".into(), &["--grpc", &grpc, "--http", &http])?;
        for index in 0..args.routers {
            let grpc = if index == 0 { listener(args, args.grpc, 8001).to_string() } else { ANY.to_owned() };
            let http = if index == 0 { listener(args, args.http, 8000).to_string() } else { ANY.to_owned() };
            let policy = args.policy.flags();
            let mut flags = vec!["--model", model, "--grpc", &grpc, "--http", &http];
            flags.extend(policy.iter().chain(&device).chain(&kv_bytes).map(String::as_str));
            self.spawn(args, "router-node", format!("router-{index}"), &flags)?;
        }
        let dtype = args.expert_dtype.as_str();
        if args.device.device.ordinal().is_some() {
            for router in &mut self.nodes[1..] {
                router.listening().await?;
            }
        }
        let capacity = args.capacity_bytes(&spec).await?.to_string();
        for index in 0..args.expert_nodes {
            let mut flags = vec!["--model", model, "--grpc", ANY, "--http", ANY, "--no-progress"];
            flags.extend(["--expert-dtype", dtype, "--capacity-bytes", &capacity]);
            flags.extend(device.iter().map(String::as_str));
            self.spawn(args, "expert-node", format!("expert-{index}"), &flags)?;
        }
        Ok(())
    }

    /// Starts the program beside this one.
    fn spawn(&mut self, args: &Args, program: &str, id: String, flags: &[&str]) -> Result<()> {
        let path = std::env::current_exe()?.with_file_name(program);
        let mut command = Command::new(&path);
        command.args(["--id", &id, "--cluster", &args.cluster, "--drain-s", &args.drain_s.to_string()]).args(flags);
        if program != "coordinator" {
            command.args(["--threads", &args.threads.to_string()]);
        }
        // What this process was told is not meant for its children, but for the store's settings. Those go through the
        // environment, because command lines can be read by everybody.
        let own = std::env::vars_os().map(|(name, _)| name);
        own.filter(|name| name.as_encoded_bytes().starts_with(b"SIROCCO_")).for_each(|name| {
            command.env_remove(name);
        });
        let etcd = &args.etcd;
        command
            .env("SIROCCO_ETCD", etcd.etcd.join(","))
            .env("SIROCCO_ETCD_TIMEOUT_MS", etcd.etcd_timeout_ms.to_string());
        let optional = [
            ("SIROCCO_ETCD_USER", etcd.etcd_user.as_ref().map(Into::into)),
            ("SIROCCO_ETCD_PASSWORD", etcd.etcd_password.as_ref().map(Into::into)),
            ("SIROCCO_ETCD_CA", etcd.etcd_ca.as_ref().map(|path| path.as_os_str().to_owned())),
            ("SIROCCO_ETCD_CERT", etcd.etcd_cert.as_ref().map(|path| path.as_os_str().to_owned())),
            ("SIROCCO_ETCD_KEY", etcd.etcd_key.as_ref().map(|path| path.as_os_str().to_owned())),
            ("SIROCCO_ETCD_DOMAIN", etcd.etcd_domain.as_ref().map(Into::into)),
        ];
        command.envs(optional.into_iter().filter_map(|(name, value)| Some((name, value?))));
        // A group of its own, so that Ctrl-C reaches it only through us; and it dies with us.
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).process_group(0).kill_on_drop(true).spawn();
        let mut child = child.with_context(|| format!("cannot start {}", path.display()))?;
        let stdout = child.stdout.take().context("standard output is piped")?;
        self.nodes.push(Node { id, child, listens: None, stdout: BufReader::new(stdout).lines() });
        Ok(())
    }
}

impl Cluster for Processes {
    async fn start(&mut self, args: &Args, model: &Path) -> Result<Addresses> {
        self.spawn_all(args, model).await?;
        let (coordinator, others) = self.nodes.split_first_mut().context("a coordinator was started")?;
        let (coordinator, _) = coordinator.listening().await?;
        let routers = usize::from(args.routers);
        let ready = async {
            let mut listening = Vec::new();
            for node in &mut *others {
                listening.push(node.listening().await?);
            }
            for router in &mut others[..routers] {
                router.line("ready").await?;
            }
            anyhow::Ok(listening.swap_remove(0))
        };
        let (router, router_http) = tokio::select! {
            router = ready => router?,
            result = explain_wait(&coordinator) => return result.and(Err(anyhow!("it was not ready"))),
        };
        Ok(Addresses { coordinator, router, router_http })
    }

    async fn any_ended(&mut self) -> Result<()> {
        let mut ends: FuturesUnordered<_> =
            self.nodes.iter_mut().map(|node| async { (node.id.clone(), node.child.wait().await) }).collect();
        match ends.next().await {
            Some((id, status)) => bail!("{id} ended by itself: {}", status?),
            None => bail!("there are no nodes"),
        }
    }

    /// Routers first, so that nothing is cut off under them; a process that takes too long is killed.
    async fn stop(mut self) -> Result<()> {
        let mut result = Ok(());
        for group in ["router-", "expert-", "coordinator-"] {
            let mut nodes: Vec<&mut Node> = self.nodes.iter_mut().filter(|node| node.id.starts_with(group)).collect();
            for node in &mut nodes {
                node.terminate();
            }
            for node in nodes {
                let stopped = match tokio::time::timeout(self.grace, node.child.wait()).await {
                    Ok(Ok(status)) if status.success() => Ok(()),
                    Ok(status) => Err(anyhow!("{} did not stop cleanly: {}", node.id, describe(status))),
                    Err(_) => {
                        node.child.kill().await?;
                        Err(anyhow!("{} did not stop in time and was killed", node.id))
                    }
                };
                result = result.and(stopped);
            }
        }
        result
    }
}

fn describe(status: std::io::Result<ExitStatus>) -> String {
    status.map_or_else(|error| error.to_string(), |status| status.to_string())
}

impl Node {
    /// Its gRPC and HTTP addresses, once it listens.
    async fn listening(&mut self) -> Result<(String, String)> {
        if let Some(listens) = &self.listens {
            return Ok(listens.clone());
        }
        let line = self.line("listening ").await?;
        let field = |name: &str| line.split(' ').find_map(|field| field.strip_prefix(name)).map(str::to_owned);
        let listens = field("grpc=").zip(field("http=")).with_context(|| format!("{} says {line:?}", self.id))?;
        Ok(self.listens.insert(listens).clone())
    }

    /// The next line of its output that starts with `start`.
    async fn line(&mut self, start: &str) -> Result<String> {
        while let Some(line) = self.stdout.next_line().await? {
            if line.starts_with(start) {
                return Ok(line);
            }
        }
        let status = self.child.wait().await;
        bail!("{} did not start: {}", self.id, describe(status))
    }

    fn terminate(&mut self) {
        let pid = self.child.id().and_then(|pid| Pid::from_raw(pid.cast_signed()));
        if let Some(pid) = pid {
            // A process that has just ended by itself needs no signal.
            let _ = kill_process(pid, Signal::TERM);
        }
    }
}
