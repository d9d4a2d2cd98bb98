//! One expert node as a router sees it: a long-lived dispatch stream, owned by a task that matches answers to requests.
//!
//! The task lives on the engine's own runtime, so that a request and its answer change threads nowhere on the router: the engine
//! polls the sockets itself while it waits for experts. The task connects when there is something to send. When the stream
//! breaks, whatever waits on it is refused as unavailable at once; trying again is the dispatcher's decision, never this module's.

use std::collections::HashMap;
use std::sync::Arc;

use sirocco_proto::expert::{DispatchRequest, ExpertOutputs, Refusal, RefusalReason, Stream};
use sirocco_types::NodeId;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};
use tokio_util::task::TaskTracker;

use crate::metrics::Hop;
use crate::standing::Standing;

/// Requests that may wait for one node before callers wait to hand over theirs.
const QUEUE: usize = 64;

type Answer = oneshot::Sender<Result<ExpertOutputs, Refusal>>;

/// Where the tasks of connections live.
#[derive(Clone, Debug)]
pub(crate) struct Home {
    /// Of the thread that waits for the answers.
    pub(crate) runtime: Handle,
    /// Owns the tasks.
    pub(crate) tasks: TaskTracker,
}

/// A handle to one node's stream. The stream closes when the last handle is dropped.
#[derive(Debug)]
pub(crate) struct Connection {
    node: NodeId,
    address: String,
    /// What is counted of its calls.
    pub(crate) hop: Arc<Hop>,
    /// How the node has answered lately.
    pub(crate) standing: Standing,
    calls: mpsc::Sender<(DispatchRequest, Answer)>,
}

impl Connection {
    /// Starts the stream's task at `home`; it connects with the first call.
    pub(crate) fn open(node: NodeId, address: String, hop: Arc<Hop>, home: &Home) -> Self {
        let (calls, queue) = mpsc::channel(QUEUE);
        home.tasks.spawn_on(run(node.clone(), address.clone(), queue), &home.runtime);
        Self { node, address, hop, standing: Standing::default(), calls }
    }

    /// A connection whose calls go to `calls` and nowhere else.
    #[cfg(test)]
    pub(crate) fn over(node: NodeId, hop: Arc<Hop>, calls: mpsc::Sender<(DispatchRequest, Answer)>) -> Self {
        Self { address: node.to_string(), node, hop, standing: Standing::default(), calls }
    }

    /// Where the node answers.
    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    /// Sends `request`, whose id this sets, and waits for its answer.
    pub(crate) async fn call(&self, request: DispatchRequest) -> Result<ExpertOutputs, Refusal> {
        let (answer, answered) = oneshot::channel();
        let gone = || unavailable(&self.node, &self.address, "its connection is closed");
        self.calls.send((request, answer)).await.map_err(|_| gone())?;
        answered.await.map_err(|_| gone())?
    }
}

async fn run(node: NodeId, address: String, mut calls: mpsc::Receiver<(DispatchRequest, Answer)>) {
    let mut next_id = 0;
    while let Some(call) = calls.recv().await {
        if call.1.is_closed() {
            continue;
        }
        match Stream::open(&address).await {
            Ok(stream) => {
                tracing::debug!(%node, address, "connected");
                if let Some(reason) = drive(stream, call, &mut calls, &mut next_id, &node, &address).await {
                    tracing::warn!(%node, address, reason, "the stream to an expert node broke");
                }
            }
            Err(reason) => {
                tracing::debug!(%node, address, %reason, "cannot connect to an expert node");
                let _ = call.1.send(Err(unavailable(&node, &address, &reason)));
            }
        }
    }
}

/// Carries calls over `stream`, `first` foremost, until no handle is left, the node leaves with everything answered, or the
/// stream breaks. Returns why it broke.
async fn drive(
    mut stream: Stream,
    first: (DispatchRequest, Answer),
    calls: &mut mpsc::Receiver<(DispatchRequest, Answer)>,
    next_id: &mut u64,
    node: &NodeId,
    address: &str,
) -> Option<String> {
    let mut waiting = HashMap::<u64, Answer>::new();
    let mut call = Some(first);
    let reason = loop {
        if let Some((mut request, answer)) = call.take() {
            request.id = *next_id;
            *next_id += 1;
            let id = request.id;
            match stream.send(request) {
                Ok(()) => drop(waiting.insert(id, answer)),
                Err(refusal) => drop(answer.send(Err(refusal))),
            }
        }
        tokio::select! {
            biased;
            response = stream.next() => match response {
                Some(Ok(response)) => {
                    // An answer nobody waits for is late or a duplicate.
                    if let Some(answer) = waiting.remove(&response.id) {
                        let _ = answer.send(response.result);
                    }
                }
                Some(Err(broken)) => break broken.to_string(),
                None if waiting.is_empty() => return None,
                None => break "the node closed it".to_owned(),
            },
            next = calls.recv() => {
                call = next;
                if call.is_none() {
                    stream.close().await;
                    return None;
                }
            }
        }
    };
    for (_, answer) in waiting.drain() {
        let _ = answer.send(Err(unavailable(node, address, &reason)));
    }
    Some(reason)
}

fn unavailable(node: &NodeId, address: &str, reason: impl std::fmt::Display) -> Refusal {
    Refusal::new(RefusalReason::Unavailable, format!("expert node {node} at {address}: {reason}"))
}
