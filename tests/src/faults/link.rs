//! The tasks of a link: one for each address, one for each connection, which moves bytes both ways as the link's state says.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::pin::pin;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use super::network::{Conditions, Now, State};
use crate::random::Random;

/// The bytes of a packet on an Ethernet.
const PACKET: usize = 1448;

/// What a lost packet costs a connection that sends little at once: Linux's least retransmission timeout.
const RETRANSMISSION: Duration = Duration::from_millis(200);

/// Bytes on their way in one direction; who sends more waits, as for a TCP window.
const WINDOW: usize = 4 << 20;

/// Most bytes moved at once.
const CHUNK: usize = 64 << 10;

/// Takes connections of `listener` to what stands `behind`, until the link is dropped.
pub(super) async fn serve(
    listener: TcpListener,
    behind: watch::Receiver<Option<SocketAddr>>,
    now: watch::Receiver<Now>,
    seed: u64,
) {
    let mut connections = JoinSet::new();
    let (mut number, mut dropped) = (0, behind.clone());
    loop {
        tokio::select! {
            accepted = listener.accept() => if let Ok((stream, _)) = accepted {
                number += 1;
                connections.spawn(connect(stream, behind.clone(), now.clone(), seed ^ number));
            },
            Some(_) = connections.join_next() => {}
            () = async { while dropped.changed().await.is_ok() {} } => return,
        }
    }
}

/// One connection from its first to its last byte. An error at either end, and the link's state, reset both ends.
async fn connect(near: TcpStream, behind: watch::Receiver<Option<SocketAddr>>, now: watch::Receiver<Now>, seed: u64) {
    let (resets, mut ends) = (now.borrow().resets, now.clone());
    let end = async {
        // An error is the network's end.
        let _ = ends.wait_for(|now| now.state.refuses || now.resets != resets).await;
    };
    let mut end = pin!(end);
    let far = tokio::select! {
        far = reach(behind, now.clone()) => far,
        () = &mut end => None,
    };
    let Some(mut far) = far else { return reset(&near) };
    let mut near = near;
    for socket in [&near, &far] {
        // A packet goes on when it comes: what two processes without a link between them would see.
        let _ = socket.set_nodelay(true);
    }
    let done = {
        let ((from_near, to_near), (from_far, to_far)) = (near.split(), far.split());
        let forth = Direction::new(|state| state.forth, Random::new(seed));
        let back = Direction::new(|state| state.back, Random::new(!seed));
        let both = async {
            tokio::try_join!(forth.carry(from_near, to_far, now.clone()), back.carry(from_far, to_near, now.clone()))
        };
        tokio::select! {
            done = both => done.is_ok(),
            () = &mut end => false,
        }
    };
    if !done {
        reset(&near);
        reset(&far);
    }
}

/// A connection to what stands behind the link, once something does. Silence holds up new connections as it does bytes.
async fn reach(mut behind: watch::Receiver<Option<SocketAddr>>, mut now: watch::Receiver<Now>) -> Option<TcpStream> {
    now.wait_for(|now| !now.state.forth.silent).await.ok()?;
    let target = (*behind.wait_for(Option::is_some).await.ok()?)?;
    TcpStream::connect(target).await.ok()
}

/// Has the peer see a reset, not an end, when `stream` is dropped.
fn reset(stream: &TcpStream) {
    // A connection that has ended already cannot be told.
    let _ = stream.set_zero_linger();
}

/// Bytes that go one way.
struct Direction {
    conditions: fn(&State) -> Conditions,
    random: Random,
    /// Chunks with the time at which they arrive.
    under_way: VecDeque<(Instant, Vec<u8>)>,
    bytes_under_way: usize,
    /// When the last chunk is through the pipe, and when it arrives.
    sent: Instant,
    arrived: Instant,
    /// Bytes since the last flipped bit.
    unflipped: u64,
}

impl Direction {
    fn new(conditions: fn(&State) -> Conditions, random: Random) -> Self {
        let (now, under_way) = (Instant::now(), VecDeque::new());
        Self { conditions, random, under_way, bytes_under_way: 0, sent: now, arrived: now, unflipped: 0 }
    }

    /// Moves bytes until there are no more.
    async fn carry(
        mut self,
        mut from: ReadHalf<'_>,
        mut to: WriteHalf<'_>,
        mut now: watch::Receiver<Now>,
    ) -> std::io::Result<()> {
        let (mut buffer, mut ended) = (vec![0; CHUNK], false);
        loop {
            let conditions = (self.conditions)(&now.borrow_and_update().state);
            let due = self.under_way.front().map(|(due, _)| *due).filter(|_| !conditions.silent);
            if due.is_some_and(|due| due <= Instant::now()) {
                if let Some((_, chunk)) = self.under_way.pop_front() {
                    self.bytes_under_way -= chunk.len();
                    to.write_all(&chunk).await?;
                }
                continue;
            }
            if ended && self.under_way.is_empty() {
                return to.shutdown().await;
            }
            tokio::select! {
                read = from.read(&mut buffer), if !ended && self.bytes_under_way < WINDOW => match read? {
                    0 => ended = true,
                    len => self.take(&buffer[..len], &conditions),
                },
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {}
                changed = now.changed() => if changed.is_err() {
                    return Ok(());
                },
            }
        }
    }

    /// Decides what becomes of `bytes` and when they arrive.
    fn take(&mut self, bytes: &[u8], conditions: &Conditions) {
        let mut chunk = bytes.to_vec();
        self.flip(&mut chunk, conditions);
        let pace = conditions.bytes_per_s.map_or(0.0, |rate| chunk.len() as f64 / rate.max(1) as f64);
        self.sent = self.sent.max(Instant::now()) + Duration::from_secs_f64(pace);
        let mut late = conditions.delay;
        if !conditions.jitter.is_zero() {
            late += conditions.jitter.mul_f64(self.random.below(1001) as f64 / 1000.0);
        }
        let packets = chunk.len().div_ceil(PACKET);
        if conditions.lost_per_mille > 0
            && (0..packets).any(|_| self.random.below(1000) < u64::from(conditions.lost_per_mille))
        {
            late += RETRANSMISSION;
        }
        self.arrived = self.arrived.max(self.sent + late);
        self.bytes_under_way += chunk.len();
        self.under_way.push_back((self.arrived, chunk));
    }

    fn flip(&mut self, chunk: &mut [u8], conditions: &Conditions) {
        let Some(every) = conditions.corrupt_every_kib else { return };
        self.unflipped += chunk.len() as u64;
        if self.unflipped >= every * 1024 && !chunk.is_empty() {
            self.unflipped = 0;
            let bit = self.random.below(chunk.len() as u64 * 8) as usize;
            chunk[bit / 8] ^= 1 << (bit % 8);
        }
    }
}
