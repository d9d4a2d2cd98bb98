//! An etcd of several members, of which a test may kill some.

use anyhow::{Result, bail};

use super::{Etcd, EtcdSetup, Ports, START_TRIES};

/// Several etcd processes that are one store.
#[derive(Debug)]
pub struct EtcdCluster {
    /// Its members; any may be killed and started again.
    pub members: Vec<Etcd>,
}

impl EtcdCluster {
    /// Starts an etcd of `count` members and waits until each is healthy.
    pub fn start(count: usize) -> Result<Self> {
        for _ in 0..START_TRIES {
            let mut cluster = Self::new(count)?;
            match cluster.run() {
                Err(_) if cluster.members.iter().any(Etcd::found_a_port_taken) => {}
                started => return started.map(|()| cluster),
            }
        }
        bail!("etcd found its ports taken {START_TRIES} times")
    }

    fn new(count: usize) -> Result<Self> {
        let ports = (0..count).map(|_| Ports::free()).collect::<Result<Vec<_>>>()?;
        let name = |index: usize| format!("test-{index}");
        let members: Vec<String> =
            ports.iter().enumerate().map(|(index, ports)| format!("{}={}", name(index), ports.peer())).collect();
        let members = members.join(",");
        let member = |(index, ports)| Etcd::new(&name(index), ports, members.clone(), &EtcdSetup::default());
        Ok(Self { members: ports.into_iter().enumerate().map(member).collect::<Result<_>>()? })
    }

    /// Starts those that do not run again, and waits until all are healthy.
    pub fn restart(&mut self) -> Result<()> {
        self.members.iter_mut().filter(|member| member.child.is_none()).try_for_each(Etcd::spawn)?;
        self.members.iter_mut().try_for_each(Etcd::wait_until_healthy)
    }

    /// None is healthy before most of them run.
    fn run(&mut self) -> Result<()> {
        self.members.iter_mut().try_for_each(Etcd::spawn)?;
        self.members.iter_mut().try_for_each(Etcd::wait_until_healthy)
    }

    /// Where clients connect: all members' endpoints, with commas between.
    pub fn endpoints(&self) -> String {
        self.members.iter().map(Etcd::endpoint).collect::<Vec<_>>().join(",")
    }
}
