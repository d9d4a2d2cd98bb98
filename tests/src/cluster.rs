//! A cluster of processes on a real etcd.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::etcd::Etcd;
use crate::process::Process;

/// One node: its process and where it answers.
#[derive(Debug)]
pub struct Node {
    /// Its id in the cluster.
    pub id: String,
    /// Its process.
    pub process: Process,
    /// Its gRPC address.
    pub grpc: String,
    /// Its HTTP address.
    pub http: String,
}

/// A coordinator, a router and expert nodes, each a process. Dropping it kills them all.
#[derive(Debug)]
pub struct Cluster {
    /// Places the experts.
    pub coordinator: Node,
    /// Serves clients.
    pub router: Node,
    /// Hold the experts.
    pub experts: Vec<Node>,
    name: String,
    etcd: String,
}

impl Cluster {
    /// Starts a cluster called `name` with one expert node for each of `models`, a checkpoint folder each, and a router on
    /// `router_model`; returns when the router is ready.
    pub fn start(etcd: &Etcd, name: &str, router_model: &Path, models: &[PathBuf]) -> Result<Self> {
        Self::start_with(etcd, name, router_model, models, &[])
    }

    /// As [`Cluster::start`], with environment variables for every process.
    pub fn start_with(
        etcd: &Etcd,
        name: &str,
        router_model: &Path,
        models: &[PathBuf],
        envs: &[(&str, &str)],
    ) -> Result<Self> {
        let etcd = etcd.endpoint();
        let node = |program: &str, id: &str, model: Option<&Path>| Node::start(program, id, name, &etcd, model, envs);
        let experts = models.iter().enumerate();
        let experts = experts.map(|(index, model)| node("expert-node", &format!("expert-{index}"), Some(model)));
        // The coordinator comes last, so that its first placement is for all the nodes.
        let experts = experts.collect::<Result<_>>()?;
        let router = node("router-node", "router-0", Some(router_model))?;
        let coordinator = node("coordinator", "coordinator-0", None)?;
        let mut cluster = Self { coordinator, router, experts, name: name.to_owned(), etcd: etcd.clone() };
        cluster.router.process.wait_for_line("ready")?;
        Ok(cluster)
    }

    /// Starts expert node `index` again, under the id it had.
    pub fn restart_expert(&mut self, index: usize, model: &Path) -> Result<()> {
        let id = format!("expert-{index}");
        self.experts[index] = Node::start("expert-node", &id, &self.name, &self.etcd, Some(model), &[])?;
        Ok(())
    }
}

impl Node {
    /// Starts a node of a cluster and waits until it listens.
    pub fn start(
        program: &str,
        id: &str,
        cluster: &str,
        etcd: &str,
        model: Option<&Path>,
        envs: &[(&str, &str)],
    ) -> Result<Self> {
        let mut args = vec!["--id", id, "--cluster", cluster, "--etcd", etcd];
        args.extend(["--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0"]);
        if let Some(model) = model {
            args.extend(["--model", model.to_str().context("test paths are UTF-8")?]);
        }
        let mut process = Process::start(program, &args, envs)?;
        let line = process.wait_for_line("listening ")?;
        let field = |name: &str| line.split(' ').find_map(|field| field.strip_prefix(name)).map(str::to_owned);
        let (grpc, http) = field("grpc=").zip(field("http=")).with_context(|| format!("{program} prints {line:?}"))?;
        Ok(Self { id: id.to_owned(), process, grpc, http })
    }
}
