//! Where every expert is now: the serving placement and a connection to each node in it, as one immutable snapshot.

use std::collections::HashMap;
use std::sync::Arc;

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use sirocco_store::ClusterState;
use sirocco_types::{Epoch, ExpertKey, NodeId, Placement, Role};
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use crate::connection::Connection;
use crate::metrics::Metrics;
use crate::replicas::Replica;

/// The speed of a node that does not say.
const ORDINARY_SPEED: u32 = 100;

/// What dispatch goes by.
#[derive(Debug, Default)]
pub(crate) struct Topology {
    placement: Placement,
    nodes: HashMap<NodeId, Node>,
    /// Tells the follower once nothing goes by this topology any more.
    in_use: Option<DropGuard>,
}

/// An expert node whose address is known.
#[derive(Clone, Debug)]
struct Node {
    connection: Arc<Connection>,
    /// In percent of an ordinary node.
    speed: u32,
}

impl Topology {
    /// The placement's epoch; 0 while there is none.
    pub(crate) fn epoch(&self) -> Epoch {
        self.placement.epoch
    }

    /// The nodes that serve `key`, preferred first. One whose address is not known is left out.
    pub(crate) fn replicas(&self, key: ExpertKey) -> impl Iterator<Item = Replica<'_>> {
        let nodes = self.placement.replicas(key).iter();
        nodes.filter_map(|node| Some(Replica { node, speed: self.nodes.get(node)?.speed }))
    }

    /// The connection to `node`, one of those that [`Topology::replicas`] gave.
    pub(crate) fn connection(&self, node: &NodeId) -> &Arc<Connection> {
        &self.nodes[node].connection
    }

    /// The topology after `state`. Connections whose node still answers at the same address are kept; a node that has left
    /// the store but is still in the placement is kept as it was, because serving outlives the control plane.
    fn next(&self, state: &ClusterState, metrics: &Metrics, tasks: &TaskTracker) -> Self {
        let Some(placement) = state.serving() else {
            return Self { placement: self.placement.clone(), nodes: self.nodes.clone(), in_use: None };
        };
        let mut nodes = HashMap::new();
        for node in placement.iter().flat_map(|(_, replicas)| replicas) {
            if nodes.contains_key(node) {
                continue;
            }
            let known = self.nodes.get(node);
            let next = match (state.member(Role::Expert, node), known) {
                (Some(member), known) => {
                    let same = known.filter(|known| known.connection.address() == member.grpc);
                    let connection = same.map_or_else(
                        || Arc::new(Connection::open(node.clone(), member.grpc.clone(), metrics.hop(node), tasks)),
                        |known| Arc::clone(&known.connection),
                    );
                    Node { connection, speed: member.speed.unwrap_or(ORDINARY_SPEED).max(1) }
                }
                (None, Some(known)) => known.clone(),
                (None, None) => continue,
            };
            nodes.insert(node.clone(), next);
        }
        Self { placement: placement.clone(), nodes, in_use: None }
    }
}

/// Keeps `topology` in step with the cluster's state until `shutdown`, and `epoch` at what everything under way goes by: a
/// placement counts once no layer that was sent by an older one is still waited for, because nodes leave by what is said.
pub(crate) async fn follow(
    mut state: watch::Receiver<Arc<ClusterState>>,
    topology: watch::Sender<Arc<Topology>>,
    epoch: watch::Sender<Epoch>,
    metrics: Arc<Metrics>,
    tasks: TaskTracker,
    shutdown: CancellationToken,
) {
    let mut older = FuturesUnordered::new();
    let mut dropped = CancellationToken::new();
    loop {
        let mut next = topology.borrow().next(&state.borrow_and_update(), &metrics, &tasks);
        let next_epoch = next.epoch();
        if next_epoch != topology.borrow().epoch() {
            tracing::info!(epoch = %next_epoch, nodes = next.nodes.len(), "dispatching by a new placement");
        }
        metrics.forget_hops(|node| next.nodes.contains_key(node));
        let replaced = std::mem::take(&mut dropped);
        next.in_use = Some(dropped.clone().drop_guard());
        if topology.send_replace(Arc::new(next)).in_use.is_some() {
            older.push(replaced.cancelled_owned());
        }
        loop {
            if older.is_empty() {
                epoch.send_if_modified(|told| std::mem::replace(told, next_epoch) != next_epoch);
            }
            tokio::select! {
                () = shutdown.cancelled() => return,
                changed = state.changed() => match changed {
                    Ok(()) => break,
                    Err(_) => return,
                },
                Some(()) = older.next() => {}
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use sirocco_store::{Keys, to_json};
    use sirocco_types::{
        EpochRef, ExpertDtype, ExpertId, Fingerprint, LayerId, LayerPlacement, Member, MemberState, ModelIdentity,
        PlacementKind,
    };

    use super::*;
    use crate::load::tests::spec;
    use crate::metrics::tests::metrics;

    /// A state in which every expert of [`spec`] is served by each of `nodes`, given with their speeds.
    pub(crate) fn state(nodes: &[(&str, Option<u32>)]) -> ClusterState {
        placed(Epoch(1), nodes)
    }

    /// [`state`] by another placement.
    fn placed(epoch: Epoch, nodes: &[(&str, Option<u32>)]) -> ClusterState {
        let keys = Keys::new("demo").unwrap();
        let ids: Vec<NodeId> = nodes.iter().map(|(name, _)| NodeId::new(name).unwrap()).collect();
        let model = ModelIdentity {
            name: "tiny".into(),
            fingerprint: Fingerprint([7; 32]),
            spec: spec(),
            expert_dtype: ExpertDtype::Bf16,
        };
        let layer = to_json(&LayerPlacement { experts: vec![ids.clone(); model.spec.num_local_experts] });
        let mut entries = vec![
            (keys.model(), to_json(&model)),
            (keys.layer(epoch, LayerId(0)), layer.clone()),
            (keys.layer(epoch, LayerId(1)), layer),
            (keys.placement(PlacementKind::Serving), to_json(&EpochRef { epoch, leader: "c".into() })),
        ];
        entries.extend(ids.into_iter().zip(nodes).map(|(id, (name, speed))| {
            let member = Member {
                id: id.clone(),
                role: Role::Expert,
                state: MemberState::Ready,
                grpc: format!("{name}:1"),
                http: format!("{name}:2"),
                version: "0.1.0".into(),
                incarnation: 1,
                zone: None,
                device: None,
                capacity_bytes: None,
                speed: *speed,
                max_experts_per_layer: None,
                serving_epoch: None,
                model: None,
            };
            (keys.member(Role::Expert, &id), to_json(&member))
        }));
        let prefix = keys.prefix().len();
        ClusterState::read(entries.iter().map(|(key, value)| (&key[prefix..], value.as_str(), 1)))
    }

    /// The topology of [`state`].
    pub(crate) fn topology(nodes: &[(&str, Option<u32>)], tasks: &TaskTracker) -> Topology {
        Topology::default().next(&state(nodes), &metrics().0, tasks)
    }

    #[tokio::test]
    async fn a_node_that_changes_its_speed_keeps_its_connection_and_one_that_has_left_stays_as_it_was() {
        let key = ExpertKey { layer: LayerId(1), expert: ExpertId(3) };
        let tasks = TaskTracker::new();
        let speeds = |topology: &Topology| topology.replicas(key).map(|replica| replica.speed).collect::<Vec<_>>();
        let first = topology(&[("a", Some(100)), ("b", None)], &tasks);
        assert_eq!(speeds(&first), [100, ORDINARY_SPEED]);
        let faster = first.next(&state(&[("a", Some(250)), ("b", Some(0))]), &metrics().0, &tasks);
        assert_eq!(speeds(&faster), [250, 1]);
        let a = NodeId::new("a").unwrap();
        assert!(Arc::ptr_eq(first.connection(&a), faster.connection(&a)));
        let headless = faster.next(&ClusterState::default(), &metrics().0, &tasks);
        assert_eq!(speeds(&headless), [250, 1]);
    }
    #[tokio::test]
    async fn a_placement_counts_once_nothing_goes_by_an_older_one() {
        let (states, state_of) = watch::channel(Arc::new(state(&[("a", None)])));
        let (topologies, mut topology) = watch::channel(Arc::new(Topology::default()));
        let (epochs, mut epoch) = watch::channel(Epoch::default());
        let (tasks, shutdown) = (TaskTracker::new(), CancellationToken::new());
        let follower = follow(state_of, topologies, epochs, metrics().0, tasks.clone(), shutdown.clone());
        let follower = tokio::spawn(follower);
        epoch.wait_for(|epoch| *epoch == Epoch(1)).await.unwrap();
        let first = Arc::clone(&topology.borrow_and_update());

        states.send_replace(Arc::new(state(&[("a", Some(50))])));
        topology.changed().await.unwrap();
        states.send_replace(Arc::new(placed(Epoch(2), &[("a", None)])));
        topology.wait_for(|topology| topology.epoch() == Epoch(2)).await.unwrap();
        assert_eq!(*epoch.borrow(), Epoch(1), "a layer still goes by the first placement");
        drop(first);
        epoch.wait_for(|epoch| *epoch == Epoch(2)).await.unwrap();
        shutdown.cancel();
        follower.await.unwrap();
    }
}
