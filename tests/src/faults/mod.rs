//! Faults as tools: what can happen to the links between processes, to a checkpoint on disk, and to a process's clock.
//!
//! A process itself is killed, stopped and limited through [`crate::process::Process`], an etcd through [`crate::etcd::Etcd`].

pub mod clock;
pub mod disk;
mod link;
pub mod network;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, Result};

use clock::Clock;
use network::{Link, Network};

/// What a cluster is started with so that faults can be put into it while it runs.
///
/// The link called as a node is leads to its gRPC services; [`Rig::to_etcd`] is its own way to etcd.
#[derive(Debug)]
pub struct Rig {
    /// The links.
    pub network: Network,
    /// By node, the clocks, when nodes have clocks of their own.
    clocks: Option<Mutex<BTreeMap<String, Arc<Clock>>>>,
}

impl Rig {
    /// Links only: clocks take time to read.
    pub fn links(seed: u64) -> Result<Self> {
        Ok(Self { network: Network::new(seed)?, clocks: None })
    }

    /// Links, and a clock for each node.
    pub fn links_and_clocks(seed: u64) -> Result<Self> {
        Ok(Self { network: Network::new(seed)?, clocks: Some(Mutex::default()) })
    }

    /// The link on which node `id` reaches etcd, all its members.
    pub fn to_etcd(&self, id: &str) -> Arc<Link> {
        self.network.link(&format!("{id} to etcd"))
    }

    /// The endpoints at which node `id` reaches etcd's `endpoints`, with commas between.
    pub(crate) fn etcd(&self, id: &str, endpoints: &str) -> Result<String> {
        let link = self.to_etcd(id);
        let through = |endpoint: &str| {
            let address = endpoint.strip_prefix("http://").context("links lead to an etcd without TLS")?;
            let way = link.way(endpoint)?;
            link.lead(endpoint, address.parse()?)?;
            Ok(format!("http://{way}"))
        };
        Ok(endpoints.split(',').map(through).collect::<Result<Vec<_>>>()?.join(","))
    }

    /// Puts the clock of node `id` `seconds` before or after the right time.
    pub fn jump(&self, id: &str, seconds: i64) -> Result<()> {
        self.clock_of(id)?.context("the cluster was started without clocks")?.jump(seconds)
    }

    /// What sets node `id`'s clock.
    pub(crate) fn clock(&self, id: &str) -> Result<Vec<(String, String)>> {
        let Some(clock) = self.clock_of(id)? else { return Ok(Vec::new()) };
        Ok(clock.envs()?.into_iter().map(|(name, value)| (name.to_owned(), value)).collect())
    }

    fn clock_of(&self, id: &str) -> Result<Option<Arc<Clock>>> {
        let Some(clocks) = &self.clocks else { return Ok(None) };
        let mut clocks = clocks.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(clock) = clocks.get(id) {
            return Ok(Some(Arc::clone(clock)));
        }
        let clock = Arc::new(Clock::new()?);
        clocks.insert(id.to_owned(), Arc::clone(&clock));
        Ok(Some(clock))
    }
}
