//! Where every expert is now: the serving placement and a connection to each node in it, as one immutable snapshot.

use std::collections::HashMap;
use std::sync::Arc;

use sirocco_store::ClusterState;
use sirocco_types::{Epoch, ExpertKey, NodeId, Placement, Role};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::connection::Connection;

/// What dispatch goes by.
#[derive(Debug, Default)]
pub(crate) struct Topology {
    placement: Placement,
    nodes: HashMap<NodeId, Arc<Connection>>,
}

impl Topology {
    /// The placement's epoch; 0 while there is none.
    pub(crate) fn epoch(&self) -> Epoch {
        self.placement.epoch
    }

    /// The nodes that serve `key`, preferred first. One whose address is not known is left out.
    pub(crate) fn replicas(&self, key: ExpertKey) -> impl Iterator<Item = (&NodeId, &Arc<Connection>)> {
        self.placement.replicas(key).iter().filter_map(|node| Some((node, self.nodes.get(node)?)))
    }

    /// The topology after `state`. Connections whose node still answers at the same address are kept; a node that has left
    /// the store but is still in the placement keeps its last one, because serving outlives the control plane.
    fn next(&self, state: &ClusterState, tasks: &TaskTracker) -> Self {
        let Some(placement) = state.serving() else {
            return Self { placement: self.placement.clone(), nodes: self.nodes.clone() };
        };
        let mut nodes = HashMap::new();
        for node in placement.iter().flat_map(|(_, replicas)| replicas) {
            if nodes.contains_key(node) {
                continue;
            }
            let known = self.nodes.get(node);
            let connection = match (state.member(Role::Expert, node), known) {
                (Some(member), Some(known)) if member.grpc == known.address() => Arc::clone(known),
                (Some(member), _) => Arc::new(Connection::open(node.clone(), member.grpc.clone(), tasks)),
                (None, Some(known)) => Arc::clone(known),
                (None, None) => continue,
            };
            nodes.insert(node.clone(), connection);
        }
        Self { placement: placement.clone(), nodes }
    }
}

/// Keeps `topology` in step with the cluster's state until `shutdown`.
pub(crate) async fn follow(
    mut state: watch::Receiver<Arc<ClusterState>>,
    topology: watch::Sender<Arc<Topology>>,
    tasks: TaskTracker,
    shutdown: CancellationToken,
) {
    loop {
        let next = topology.borrow().next(&state.borrow_and_update(), &tasks);
        if next.epoch() != topology.borrow().epoch() {
            tracing::info!(epoch = %next.epoch(), nodes = next.nodes.len(), "dispatching by a new placement");
        }
        topology.send_replace(Arc::new(next));
        tokio::select! {
            () = shutdown.cancelled() => return,
            changed = state.changed() => if changed.is_err() { return },
        }
    }
}
