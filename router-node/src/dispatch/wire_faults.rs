//! Dispatch over real sockets to real servers through lines that damage bytes, by seeds: whatever HTTP/2 makes of that, no bit of a
//! layer is wrong, none is lost while one line is well, and nothing stays behind.

use std::net::SocketAddr;
use std::sync::Mutex;

use sirocco_proto::expert::{Description, ExpertServer, Node};
use sirocco_proto::server::{ServeError, Services};
use sirocco_types::{Epoch, ExpertHoldings, LayerPlacement, NodeId, Placement};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Handle;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::simulation::{Random, experts, layer, right_answer};
use super::*;
use crate::connection::{Connection, Home};
use crate::metrics::tests::metrics;

/// A node that runs what it is asked, each answer counted while it is under way.
#[derive(Clone, Debug, Default)]
struct Honest(Arc<()>);

impl Node for Honest {
    fn describe(&self) -> Description {
        let id = NodeId::new("honest").expect("a name");
        Description { id, fingerprint: Fingerprint([7; 32]), holdings: ExpertHoldings::default() }
    }

    fn answer(
        &self,
        request: Result<DispatchRequest, Refusal>,
    ) -> impl Future<Output = Result<ExpertOutputs, Refusal>> + Send + 'static {
        let under_way = Arc::clone(&self.0);
        async move {
            tokio::time::sleep(Duration::from_millis(1)).await;
            drop(under_way);
            Ok(right_answer(&request?))
        }
    }
}

/// Copies bytes and now and then damages what it copies: after `until` bytes, then after twice as many, and so on.
async fn line(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut random: Random) {
    let mut buffer = vec![0; 4096];
    let (mut passed, mut until) = (0, random.below(600) as usize);
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        let mut bytes = buffer[..count].to_vec();
        passed += count;
        if passed > until {
            until = passed * 2;
            let place = random.below(count as u64) as usize;
            match random.below(6) {
                0 | 1 => bytes[place] ^= 1 << random.below(8),
                2 => bytes.truncate(place),
                3 => drop(bytes.drain(..place)),
                4 => bytes.extend_from_within(place..),
                _ => return,
            }
        }
        if to.write_all(&bytes).await.is_err() {
            return;
        }
    }
}

/// A bad line to `server`. Returns its own address.
async fn bad_line(server: SocketAddr, seeds: Arc<Mutex<Random>>, tasks: &mut JoinSet<()>) -> SocketAddr {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    tasks.spawn(async move {
        let mut lines = JoinSet::new();
        while let Ok((client, _)) = listener.accept().await {
            let Ok(server) = TcpStream::connect(server).await else { continue };
            let seed = || Random(seeds.lock().unwrap().below(u64::MAX));
            let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
            lines.spawn(line(from_client, to_server, seed()));
            lines.spawn(line(from_server, to_client, seed()));
        }
    });
    address
}

/// A node that serves.
struct Server {
    node: Honest,
    address: SocketAddr,
    leave: CancellationToken,
    serving: tokio::task::JoinHandle<Result<(), ServeError>>,
}

impl Server {
    async fn start() -> Self {
        let (node, leave) = (Honest::default(), CancellationToken::new());
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let services = Services::default().with(ExpertServer::new(node.clone(), leave.clone()));
        let serving = tokio::spawn(services.serve_apart("honest", listener, leave.clone(), Duration::from_mins(1)));
        Self { node, address, leave, serving }
    }
}

/// Every expert is on every node.
fn topology(nodes: Vec<(NodeId, Arc<Connection>)>) -> Topology {
    let layer = LayerPlacement { experts: vec![nodes.iter().map(|(id, _)| id.clone()).collect(); 8] };
    Topology::over(Placement { epoch: Epoch(1), layers: vec![layer.clone(), layer] }, nodes.into_iter())
}

/// Dispatch that knows already what is usual.
fn seasoned(topology: Topology) -> RemoteExperts {
    let experts = experts(Arc::new(topology));
    for rows in [1, 4, 16, 64] {
        experts.usual.took(rows, 100, Duration::from_millis(2));
    }
    experts
}

#[tokio::test]
async fn whatever_a_line_makes_of_bytes_no_bit_is_wrong_and_nothing_stays_behind() {
    let Server { node, address: server, leave, serving } = Server::start().await;
    let mut lines = JoinSet::new();
    let tasks = TaskTracker::new();
    let home = Home { runtime: Handle::current(), tasks: tasks.clone() };
    let ids = ["bad", "worse", "good"].map(|name| NodeId::new(name).unwrap());
    let mut broken = 0;
    for seed in 0..60 {
        let mut random = Random(seed);
        let seeds = Arc::new(Mutex::new(Random(random.below(u64::MAX))));
        let metrics = metrics().0;
        let mut connections = Vec::new();
        for (id, bad) in ids.iter().zip([true, true, false]) {
            let address = if bad { bad_line(server, Arc::clone(&seeds), &mut lines).await } else { server };
            let connection = Connection::open(id.clone(), address.to_string(), metrics.hop(id), &home);
            connections.push((id.clone(), Arc::new(connection)));
        }
        let experts = seasoned(topology(connections));
        for _ in 0..8 {
            layer(&experts, &mut random).await;
        }
        broken += metrics.hop(&ids[0]).refusals() + metrics.hop(&ids[1]).refusals();
        lines.abort_all();
        while lines.join_next().await.is_some() {}
    }
    assert!(broken > 60, "{broken} calls were lost on bad lines");

    tasks.close();
    tasks.wait().await;
    let rests = async {
        while Arc::strong_count(&node.0) > 2 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), rests)
        .await
        .expect("every answer under way has ended with its stream");
    leave.cancel();
    serving.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_node_that_leaves_in_the_middle_loses_no_layer_and_goes_at_once() {
    let tasks = TaskTracker::new();
    let home = Home { runtime: Handle::current(), tasks: tasks.clone() };
    let metrics = metrics().0;
    let servers = [Server::start().await, Server::start().await];
    let ids = ["first", "second"].map(|name| NodeId::new(name).unwrap());
    let connect = |(id, server): (&NodeId, &Server)| {
        (id.clone(), Arc::new(Connection::open(id.clone(), server.address.to_string(), metrics.hop(id), &home)))
    };
    let experts = seasoned(topology(ids.iter().zip(&servers).map(connect).collect()));
    let mut random = Random(8);
    let [first, second] = servers;
    for _ in 0..20 {
        layer(&experts, &mut random).await;
    }
    let left = async {
        first.leave.cancel();
        tokio::time::timeout(Duration::from_secs(20), first.serving).await.unwrap().unwrap().unwrap();
    };
    let layers = async {
        for _ in 0..20 {
            layer(&experts, &mut random).await;
        }
    };
    tokio::join!(layers, left);
    assert_eq!(Arc::strong_count(&first.node.0), 1, "nothing of it is left");
    drop(experts);
    tasks.close();
    tasks.wait().await;
    second.leave.cancel();
    second.serving.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_connection_that_is_dead_is_noticed_soon_after_a_call_is_late() {
    let tasks = TaskTracker::new();
    let home = Home { runtime: Handle::current(), tasks: tasks.clone() };
    // It takes connections, as the system does for a frozen process, and no more.
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let (id, address) = (NodeId::new("frozen").unwrap(), listener.local_addr().unwrap().to_string());
    let connection = Connection::open(id.clone(), address, metrics().0.hop(&id), &home);
    let experts =
        RemoteExperts { timeout: Duration::from_secs(4), ..seasoned(topology(vec![(id, Arc::new(connection))])) };
    let routing = Routing { top_k: 1, experts: vec![ExpertId(1)], weights: vec![1.0] };
    let result = experts.forward(LayerId(1), &[1.0; 2], &routing, None).await;
    let Err(ExpertsError::Unavailable(text)) = result else { panic!("{result:?}") };
    let refusals = experts.topology.borrow().connection(&NodeId::new("frozen").unwrap()).hop.refusals();
    assert!(refusals > 0, "the only node's connection was not given up: {text}");
    drop(experts);
    tasks.close();
    tasks.wait().await;
}
