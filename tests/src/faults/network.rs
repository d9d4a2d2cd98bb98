//! An in-path TCP proxy between processes, and what can go wrong on the way: delay, jitter, lost packets, a narrow pipe, flipped
//! bits, silence, resets.
//!
//! Packets of a TCP connection cannot be lost above TCP. What their loss does to a connection can: the lost one comes after a
//! retransmission timeout, and all that were sent after it wait behind it. No byte is lost or reordered but by what says so.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result};
use tokio::net::TcpListener;
use tokio::runtime::{Builder, Handle};
use tokio::sync::{oneshot, watch};

use super::link::serve;

/// What happens to bytes that go one way. The default is nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Conditions {
    /// Every byte comes so much later.
    pub delay: Duration,
    /// And later again by a random time up to this.
    pub jitter: Duration,
    /// So many of a thousand packets come a retransmission timeout late, and what follows waits behind them.
    pub lost_per_mille: u32,
    /// Bytes that get through in a second, if not any number.
    pub bytes_per_s: Option<u64>,
    /// A random bit of every so many KiB comes flipped.
    pub corrupt_every_kib: Option<u64>,
    /// Nothing gets through, and connections stay open; it goes on where it stopped when this is over.
    pub silent: bool,
}

/// What happens on a link.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct State {
    /// To bytes from who connects.
    pub forth: Conditions,
    /// To bytes back to who connects.
    pub back: Conditions,
    /// Connections are reset as soon as they are there, and those that exist at once.
    pub refuses: bool,
}

/// A link's state, and how often all its connections were reset.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Now {
    pub(super) state: State,
    pub(super) resets: u64,
}

impl State {
    /// The same both ways.
    pub fn both(conditions: Conditions) -> Self {
        Self { forth: conditions, back: conditions, refuses: false }
    }

    /// No byte gets through, no connection ends.
    pub fn silent() -> Self {
        Self::both(Conditions { silent: true, ..Conditions::default() })
    }

    /// No connection is to be had.
    pub fn refusing() -> Self {
        Self { refuses: true, ..Self::default() }
    }
}

/// The links between the processes of a cluster. Dropping it closes all of them.
#[derive(Debug)]
pub struct Network {
    seed: u64,
    links: Mutex<BTreeMap<String, Arc<Link>>>,
    runtime: Handle,
    /// Its thread ends when this is dropped.
    _alive: oneshot::Sender<()>,
}

/// A way into which a process was put: addresses to connect to, each with one behind it.
#[derive(Debug)]
pub struct Link {
    now: watch::Sender<Now>,
    /// By what stands behind it, the address to connect to.
    ways: Mutex<BTreeMap<String, Way>>,
    seed: u64,
    runtime: Handle,
}

#[derive(Debug)]
struct Way {
    address: SocketAddr,
    target: watch::Sender<Option<SocketAddr>>,
}

impl Network {
    /// A network whose random bits and times follow `seed`, with a thread of its own, so that links go on whatever tests do.
    pub fn new(seed: u64) -> Result<Self> {
        let (alive, dropped) = oneshot::channel::<()>();
        let runtime = Builder::new_current_thread().enable_all().build().context("a runtime for links")?;
        let handle = runtime.handle().clone();
        let work = move || {
            // Ends with an error when the sender is dropped, which is how a network ends.
            let _ = runtime.block_on(dropped);
        };
        std::thread::Builder::new().name("network".into()).spawn(work).context("a thread for links")?;
        Ok(Self { seed, links: Mutex::default(), runtime: handle, _alive: alive })
    }

    /// The link called `name`, made when it is first asked for.
    pub fn link(&self, name: &str) -> Arc<Link> {
        let mut links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
        let seed = self.seed ^ (links.len() as u64) << 32;
        let new = || {
            let (now, _) = watch::channel(Now::default());
            Arc::new(Link { now, ways: Mutex::default(), seed, runtime: self.runtime.clone() })
        };
        Arc::clone(links.entry(name.to_owned()).or_insert_with(new))
    }

    /// Everything is well again.
    pub fn heal(&self) {
        for link in self.links.lock().unwrap_or_else(PoisonError::into_inner).values() {
            link.heal();
        }
    }
}

impl Link {
    /// An address that stands for `name`, the same whenever it is asked for. What connects to it waits for [`Link::lead`].
    pub fn way(&self, name: &str) -> Result<SocketAddr> {
        let mut ways = self.ways.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(way) = ways.get(name) {
            return Ok(way.address);
        }
        let listener = std::net::TcpListener::bind("127.0.0.1:0").context("a port for a link")?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let (target, behind) = watch::channel(None);
        let _guard = self.runtime.enter();
        let listener = TcpListener::from_std(listener)?;
        let seed = self.seed ^ (ways.len() as u64) << 16;
        self.runtime.spawn(serve(listener, behind, self.now.subscribe(), seed));
        ways.insert(name.to_owned(), Way { address, target });
        Ok(address)
    }

    /// What connects to the way called `name` comes to `target` from now on.
    pub fn lead(&self, name: &str, target: SocketAddr) -> Result<()> {
        let ways = self.ways.lock().unwrap_or_else(PoisonError::into_inner);
        let way = ways.get(name).with_context(|| format!("no way is called {name}"))?;
        way.target.send_replace(Some(target));
        Ok(())
    }

    /// Puts it into `state` at once, connections that exist included.
    pub fn put(&self, state: State) {
        self.now.send_modify(|now| now.state = state);
    }

    /// Everything is well again.
    pub fn heal(&self) {
        self.put(State::default());
    }

    /// Resets all connections that exist; new ones are welcome.
    pub fn reset(&self) {
        self.now.send_modify(|now| now.resets += 1);
    }
}
