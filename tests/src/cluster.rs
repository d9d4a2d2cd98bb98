//! A cluster of processes on a real etcd.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, Result};

use crate::etcd::Etcd;
use crate::faults::Rig;
use crate::faults::network::Link;
use crate::process::Process;

/// The name of the way to a node's gRPC services.
const GRPC: &str = "grpc";

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

/// What a cluster starts with.
#[derive(Clone, Debug)]
pub struct Setup<'a> {
    /// The cluster's name.
    pub name: &'a str,
    /// The routers' checkpoint folder.
    pub router_model: &'a Path,
    /// One expert node for each, with this checkpoint folder.
    pub models: &'a [PathBuf],
    /// How many coordinators.
    pub coordinators: usize,
    /// How many routers.
    pub routers: usize,
    /// Environment variables of every process, those that are started later included.
    pub envs: &'a [(&'a str, &'a str)],
}

/// Coordinators, routers and expert nodes, each a process, called `coordinator-0`, `router-0`, `expert-0` and so on. Dropping it
/// kills them all.
#[derive(Debug)]
pub struct Cluster {
    /// Place the experts.
    pub coordinators: Vec<Node>,
    /// Serve clients.
    pub routers: Vec<Node>,
    /// Hold the experts.
    pub experts: Vec<Node>,
    launcher: Launcher,
}

impl Cluster {
    /// Starts a cluster called `name` with one coordinator, one router on `router_model` and one expert node for each of
    /// `models`, a checkpoint folder each; returns when the router is ready.
    pub fn start(etcd: &Etcd, name: &str, router_model: &Path, models: &[PathBuf]) -> Result<Self> {
        let setup = Setup { name, router_model, models, coordinators: 1, routers: 1, envs: &[] };
        Self::start_with(&etcd.endpoint(), &setup)
    }

    /// Starts a cluster on the etcd that listens at `etcd`, with commas between its members; returns when all coordinators
    /// listen and all routers are ready.
    pub fn start_with(etcd: &str, setup: &Setup<'_>) -> Result<Self> {
        Self::start_rigged(etcd, setup, None)
    }

    /// The same with all nodes' ways to etcd and to each other through links of `rig`, and with its clocks.
    pub fn start_rigged(etcd: &str, setup: &Setup<'_>, rig: Option<Arc<Rig>>) -> Result<Self> {
        let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        let envs = setup.envs.iter().map(owned).collect();
        let launcher = Launcher { cluster: setup.name.to_owned(), etcd: etcd.to_owned(), envs, rig };
        let experts = setup.models.iter().enumerate();
        let experts = listening(experts.map(|(index, model)| launcher.expert(index, model)))?;
        let routers = listening((0..setup.routers).map(|index| launcher.router(index, setup.router_model)))?;
        // The coordinators come last, so that the first placement is for all the nodes.
        let coordinators = listening((0..setup.coordinators).map(|index| launcher.coordinator(index)))?;
        let mut cluster = Self { coordinators, routers, experts, launcher };
        for router in &mut cluster.routers {
            router.process.wait_for_line("ready")?;
        }
        Ok(cluster)
    }

    /// Starts expert node `index` again, under the id it had.
    pub fn restart_expert(&mut self, index: usize, model: &Path) -> Result<()> {
        self.experts[index] = self.begin_expert(index, model)?.listening()?;
        Ok(())
    }

    /// Starts `count` expert nodes more, with more variables of environment; returns when they listen.
    pub fn add_experts(&mut self, count: usize, model: &Path, envs: &[(&str, &str)]) -> Result<()> {
        let first = self.experts.len();
        let launcher = self.launcher.with(envs);
        let new = listening((first..first + count).map(|index| launcher.expert(index, model)))?;
        self.experts.extend(new);
        Ok(())
    }

    /// Starts a router more, with more variables of environment; returns when it is ready.
    pub fn add_router(&mut self, model: &Path, envs: &[(&str, &str)]) -> Result<()> {
        let mut router = self.launcher.with(envs).router(self.routers.len(), model)?.listening()?;
        router.process.wait_for_line("ready")?;
        self.routers.push(router);
        Ok(())
    }

    /// Begins to start expert node `index` again, under the id it had. Its predecessor's lease may have to end first.
    pub fn begin_expert(&self, index: usize, model: &Path) -> Result<Starting> {
        self.launcher.expert(index, model)
    }

    /// The same for router `index`.
    pub fn begin_router(&self, index: usize, model: &Path) -> Result<Starting> {
        self.launcher.router(index, model)
    }

    /// The same for coordinator `index`.
    pub fn begin_coordinator(&self, index: usize) -> Result<Starting> {
        self.launcher.coordinator(index)
    }
}

/// Starts nodes of one cluster.
#[derive(Clone, Debug)]
struct Launcher {
    cluster: String,
    etcd: String,
    envs: Vec<(String, String)>,
    rig: Option<Arc<Rig>>,
}

impl Launcher {
    /// The same with more variables of environment.
    fn with(&self, envs: &[(&str, &str)]) -> Self {
        let mut launcher = self.clone();
        launcher.envs.extend(envs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        launcher
    }

    fn coordinator(&self, index: usize) -> Result<Starting> {
        self.begin("coordinator", &format!("coordinator-{index}"), None)
    }

    fn router(&self, index: usize, model: &Path) -> Result<Starting> {
        self.begin("router-node", &format!("router-{index}"), Some(model))
    }

    fn expert(&self, index: usize, model: &Path) -> Result<Starting> {
        self.begin("expert-node", &format!("expert-{index}"), Some(model))
    }

    fn begin(&self, program: &str, id: &str, model: Option<&Path>) -> Result<Starting> {
        let (mut etcd, mut envs, mut link) = (self.etcd.clone(), self.envs.clone(), None);
        let mut args = vec!["--id", id, "--cluster", &self.cluster, "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0"];
        if let Some(rig) = &self.rig {
            etcd = rig.etcd(id, &etcd)?;
            let inward = rig.network.link(id);
            envs.push(("SIROCCO_ADVERTISE".into(), inward.way(GRPC)?.to_string()));
            envs.extend(rig.clock(id)?);
            link = Some(inward);
        }
        args.extend(["--etcd", &etcd]);
        if let Some(model) = model {
            args.extend(["--model", model.to_str().context("test paths are UTF-8")?]);
        }
        let envs: Vec<(&str, &str)> = envs.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        Ok(Starting { id: id.to_owned(), process: Process::start(program, &args, &envs)?, link })
    }
}

/// Starts all before it waits for the first.
fn listening(nodes: impl Iterator<Item = Result<Starting>>) -> Result<Vec<Node>> {
    let nodes: Vec<Starting> = nodes.collect::<Result<_>>()?;
    nodes.into_iter().map(Starting::listening).collect()
}

/// A node that may not listen yet.
#[derive(Debug)]
pub struct Starting {
    id: String,
    process: Process,
    link: Option<Arc<Link>>,
}

impl Starting {
    /// Waits until it listens.
    pub fn listening(self) -> Result<Node> {
        let Self { id, mut process, link } = self;
        let line = process.wait_for_line("listening ")?;
        let field = |name: &str| line.split(' ').find_map(|field| field.strip_prefix(name)).map(str::to_owned);
        let (grpc, http) = field("grpc=").zip(field("http=")).with_context(|| format!("{id} prints {line:?}"))?;
        if let Some(link) = link {
            link.lead(GRPC, grpc.parse()?)?;
        }
        Ok(Node { id, process, grpc, http })
    }
}
