//! What a hop costs: round trips of a Dispatch stream between processes, over those of the same bytes on bare TCP.
//!
//! Prints a line of JSON for each figure, `{"name", "measured", "floor", "unit"}`, both p50 in microseconds, from rows that are
//! ready to rows that have come back. The floor is tokio's TCP with one thread on each side, written in chunks, without
//! checksums; bursts of both alternate. The node answers with the rows it was sent and never computes; what another thread
//! between its streams and its answers adds is measured by itself.
//!
//! Of two processes each has a core of its own, as they would on two machines; otherwise the system may choose to run both
//! on one, where waking each other costs next to nothing, for one kind and not for the other. Where a node is one of eight,
//! all of them share all cores.

use std::io::Write as _;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use futures::TryStreamExt as _;
use futures::future::try_join_all;
use futures::stream::FuturesUnordered;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use sirocco_proto::Rows;
use sirocco_proto::expert::{
    Description, DispatchRequest, ExpertOutputs, ExpertRows, ExpertServer, Node, Refusal, RefusalReason, Stream,
};
use sirocco_proto::server::Services;
use sirocco_types::{ExpertHoldings, ExpertId, Fingerprint, LayerId, NodeId};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Width of a row, in elements.
const HIDDEN: usize = 1024;

/// Bytes the floor writes at once.
const CHUNK: usize = 64 << 10;

/// Bytes of a message's rows, with round trips in a burst.
const SIZES: [(&str, usize, usize); 4] =
    [("8 KiB", 8 << 10, 300), ("64 KiB", 64 << 10, 200), ("512 KiB", 512 << 10, 60), ("4 MiB", 4 << 20, 12)];

/// Nodes that are asked at once, and the bytes of all their rows together.
const FAN_OUT: (usize, usize) = (8, 512 << 10);

/// Bursts of each kind, after one that warms up.
const BURSTS: usize = 12;

/// What is measured, in the order of [`Kind::ALL`].
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    /// Bare TCP.
    Floor,
    /// A Dispatch stream whose node answers at once.
    Hop,
    /// One whose node answers from another thread.
    Handed,
}

impl Kind {
    /// With the names by which servers are started.
    const ALL: [(&'static str, Self); 3] = [("floor", Self::Floor), ("hop", Self::Hop), ("handed", Self::Handed)];
}

fn main() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut args = std::env::args().skip(1);
    let Some(name) = args.next() else { return runtime.block_on(measure()) };
    let (_, kind) = Kind::ALL.into_iter().find(|(known, _)| *known == name).ok_or("no such kind of server")?;
    if let Some(core) = args.next() {
        run_on([core.parse()?])?;
    }
    runtime.block_on(serve(kind))
}

/// Keeps this process on `cores`.
fn run_on(cores: impl IntoIterator<Item = usize>) -> Result<()> {
    let mut set = CpuSet::new();
    cores.into_iter().for_each(|core| set.set(core));
    Ok(sched_setaffinity(None, &set)?)
}

/// Serves until killed; says where on standard output.
async fn serve(kind: Kind) -> Result<()> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
    println!("{}", listener.local_addr()?);
    std::io::stdout().flush()?;
    let leave = CancellationToken::new();
    let node = match kind {
        Kind::Floor => return echo(listener).await,
        Kind::Hop => Echo { elsewhere: None },
        Kind::Handed => Echo { elsewhere: Some(compute_thread()) },
    };
    let services = Services::default().with(ExpertServer::new(node, leave.clone()));
    Ok(services.serve_apart("streams", listener, leave, Duration::ZERO).await?)
}

type Job = (DispatchRequest, oneshot::Sender<DispatchRequest>);

/// A thread that hands back what it is handed.
fn compute_thread() -> mpsc::Sender<Job> {
    let (jobs, mut queue) = mpsc::channel::<Job>(16);
    std::thread::spawn(move || {
        while let Some((request, answer)) = queue.blocking_recv() {
            let _ = answer.send(request);
        }
    });
    jobs
}

/// A node that answers with the rows it was sent.
#[derive(Clone)]
struct Echo {
    elsewhere: Option<mpsc::Sender<Job>>,
}

impl Node for Echo {
    fn describe(&self) -> Description {
        let id = NodeId::new("echo").expect("a valid name");
        Description { id, fingerprint: Fingerprint([7; 32]), holdings: ExpertHoldings::default() }
    }

    fn answer(
        &self,
        request: std::result::Result<DispatchRequest, Refusal>,
    ) -> impl Future<Output = std::result::Result<ExpertOutputs, Refusal>> + Send + 'static {
        let gone = || Refusal::new(RefusalReason::Internal, "the thread has ended");
        let handed = self.elsewhere.clone();
        async move {
            let mut request = request?;
            if let Some(jobs) = handed {
                let (answer, answered) = oneshot::channel();
                jobs.send((request, answer)).await.map_err(|_| gone())?;
                request = answered.await.map_err(|_| gone())?;
            }
            let experts = request.experts.into_iter().map(|part| (part.expert, Ok(()))).collect();
            Ok(ExpertOutputs { experts, rows: request.hidden_states })
        }
    }
}

/// The floor's side of [`serve`]: messages of a length and as many bytes.
async fn echo(listener: TcpListener) -> Result<()> {
    let (mut socket, _) = listener.accept().await?;
    socket.set_nodelay(true)?;
    let mut message = Vec::new();
    loop {
        read_message(&mut socket, &mut message).await?;
        write_message(&mut socket, &message).await?;
    }
}

async fn write_message(socket: &mut TcpStream, message: &[u8]) -> Result<()> {
    for chunk in message.chunks(CHUNK) {
        socket.write_all(chunk).await?;
    }
    Ok(())
}

/// Reads a message with its length into `message`.
async fn read_message(socket: &mut TcpStream, message: &mut Vec<u8>) -> Result<()> {
    let len = socket.read_u32_le().await? as usize;
    message.resize(len, 0);
    message[..4].copy_from_slice(&(len as u32).to_le_bytes());
    socket.read_exact(&mut message[4..]).await?;
    Ok(())
}

/// A process that serves, and its address.
struct Server {
    process: Child,
    address: String,
}

impl Server {
    async fn start(kind: &str, core: Option<usize>) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg(kind).args(core.map(|core| core.to_string())).stdout(Stdio::piped());
        let mut process = command.spawn()?;
        let output = process.stdout.take().ok_or("no standard output")?;
        let output = tokio::process::ChildStdout::from_std(output)?;
        let address = BufReader::new(output).lines().next_line().await?.ok_or("the server ended")?;
        Ok(Self { process, address })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The client's side of one connection.
enum Client {
    Floor(TcpStream, Vec<u8>),
    Hop(Box<Stream>),
}

impl Client {
    async fn connect(kind: Kind, address: &str) -> Result<Self> {
        if kind == Kind::Floor {
            let socket = TcpStream::connect(address).await?;
            socket.set_nodelay(true)?;
            return Ok(Self::Floor(socket, Vec::new()));
        }
        Ok(Self::Hop(Box::new(Stream::open(address).await?)))
    }

    /// There and back again with `rows`.
    async fn round_trip(&mut self, rows: &Rows) -> Result<()> {
        match self {
            Self::Floor(socket, message) => {
                let bytes = rows.len() * rows.width() * size_of::<f32>();
                message.resize(bytes, 1);
                message[..4].copy_from_slice(&(bytes as u32).to_le_bytes());
                write_message(socket, message).await?;
                read_message(socket, message).await
            }
            Self::Hop(stream) => {
                stream.send(DispatchRequest {
                    id: 1,
                    fingerprint: Fingerprint([7; 32]),
                    layer: LayerId(3),
                    deadline: Some(Duration::from_mins(1)),
                    hidden_states: rows.clone(),
                    experts: vec![ExpertRows { expert: ExpertId(0), rows: (0..rows.len() as u32).collect() }],
                })?;
                let answer = stream.next().await.ok_or("the stream ended")??;
                assert_eq!(answer.result?.rows.len(), rows.len());
                Ok(())
            }
        }
    }
}

/// Servers of one kind and a connection to each.
struct Setup {
    clients: Vec<Client>,
    _servers: Vec<Server>,
}

impl Setup {
    async fn start(kind: Kind, count: usize, core: Option<usize>) -> Result<Self> {
        let (name, _) = Kind::ALL[kind as usize];
        let servers = try_join_all((0..count).map(|_| Server::start(name, core))).await?;
        let clients = try_join_all(servers.iter().map(|server| Client::connect(kind, &server.address))).await?;
        Ok(Self { clients, _servers: servers })
    }

    /// How long `count` round trips take, each over all connections at once.
    async fn burst(&mut self, bytes: usize, count: usize) -> Result<Vec<Duration>> {
        let rows = bytes / HIDDEN / size_of::<f32>();
        let rows = Rows::new(vec![1.0; rows * HIDDEN], HIDDEN);
        let mut times = Vec::with_capacity(count);
        for _ in 0..count {
            let began = Instant::now();
            let all: FuturesUnordered<_> = self.clients.iter_mut().map(|client| client.round_trip(&rows)).collect();
            all.try_collect::<()>().await?;
            times.push(began.elapsed());
        }
        Ok(times)
    }
}

async fn measure() -> Result<()> {
    let allowed = sched_getaffinity(None)?;
    let cores: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|core| allowed.is_set(*core)).collect();
    let own = cores.get(1).copied();
    let start = |kind| Setup::start(kind, 1, own);
    let mut setups = [start(Kind::Floor).await?, start(Kind::Hop).await?, start(Kind::Handed).await?];
    run_on(cores.first().copied())?;
    for (size, bytes, count) in SIZES {
        let [floor, hop, handed] = alternate(&mut setups, bytes, count).await?;
        report(&format!("hop {size}"), hop, floor);
        report(&format!("hop {size}, answered by another thread"), handed, floor);
    }
    drop(setups);
    run_on(cores)?;
    let (nodes, bytes) = FAN_OUT;
    let mut setups = [Setup::start(Kind::Floor, nodes, None).await?, Setup::start(Kind::Hop, nodes, None).await?];
    let [floor, hop] = alternate(&mut setups, bytes / nodes, SIZES[2].2).await?;
    report(&format!("hop to {nodes} nodes, 512 KiB in all"), hop, floor);
    Ok(())
}

/// The median of each setup's round trips, in bursts that take turns.
async fn alternate<const N: usize>(setups: &mut [Setup; N], bytes: usize, count: usize) -> Result<[Duration; N]> {
    let mut times = [const { Vec::new() }; N];
    for burst in 0..=BURSTS {
        for (setup, times) in setups.iter_mut().zip(&mut times) {
            let new = setup.burst(bytes, count).await?;
            if burst > 0 {
                times.extend(new);
            }
        }
    }
    Ok(times.map(|mut times| {
        times.sort();
        times[times.len() / 2]
    }))
}

fn report(name: &str, measured: Duration, floor: Duration) {
    let us = |time: Duration| time.as_secs_f64() * 1e6;
    println!(r#"{{"name": "{name}", "measured": {:.1}, "floor": {:.1}, "unit": "us"}}"#, us(measured), us(floor));
}
