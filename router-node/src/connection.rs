//! One expert node as a router sees it: a long-lived dispatch stream, owned by a task that matches answers to requests.
//!
//! The task connects when there is something to send. When the stream breaks, whatever waits on it is refused as
//! unavailable at once; trying again is the dispatcher's decision, never this module's.

use std::collections::HashMap;
use std::sync::Arc;

use sirocco_process::chain;
use sirocco_proto::channel::{self, MAX_MESSAGE_BYTES};
use sirocco_proto::expert::{
    DispatchRequest, DispatchResponse, ExpertOutputs, ExpertServiceClient, Refusal, RefusalReason,
};
use sirocco_proto::tonic::Streaming;
use sirocco_proto::wire::expert as wire;
use sirocco_types::NodeId;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::TaskTracker;

use crate::metrics::Hop;
use crate::standing::Standing;

/// Requests that may wait for one node before callers wait to hand over theirs.
const QUEUE: usize = 64;

type Answer = oneshot::Sender<Result<ExpertOutputs, Refusal>>;

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
    /// Starts the stream's task among `tasks`; it connects with the first call.
    pub(crate) fn open(node: NodeId, address: String, hop: Arc<Hop>, tasks: &TaskTracker) -> Self {
        let (calls, queue) = mpsc::channel(QUEUE);
        tasks.spawn(run(node.clone(), address.clone(), queue));
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

/// An open stream and the calls that wait on it.
struct Stream {
    requests: mpsc::Sender<wire::DispatchRequest>,
    responses: Streaming<wire::DispatchResponse>,
    waiting: HashMap<u64, Answer>,
}

async fn run(node: NodeId, address: String, mut calls: mpsc::Receiver<(DispatchRequest, Answer)>) {
    let mut next_id = 0;
    while let Some(call) = calls.recv().await {
        if call.1.is_closed() {
            continue;
        }
        match open_stream(&address).await {
            Ok(stream) => {
                tracing::debug!(%node, address, "connected");
                if let Some(reason) = drive(stream, call, &mut calls, &mut next_id, &node, &address).await {
                    tracing::warn!(%node, address, reason, "the stream to an expert node broke");
                }
            }
            Err(reason) => {
                tracing::debug!(%node, address, reason, "cannot connect to an expert node");
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
    let mut call = Some(first);
    let reason = loop {
        if let Some((mut request, answer)) = call.take() {
            request.id = *next_id;
            *next_id += 1;
            stream.waiting.insert(request.id, answer);
            if stream.requests.send(request.into_wire()).await.is_err() {
                break "the node closed it".to_owned();
            }
        }
        tokio::select! {
            next = calls.recv() => match next {
                Some(next) => call = Some(next),
                None => return None,
            },
            response = stream.responses.next() => match response {
                Some(Ok(response)) => {
                    let response = DispatchResponse::from_wire(response);
                    // An answer nobody waits for is late or a duplicate.
                    if let Some(answer) = stream.waiting.remove(&response.id) {
                        let _ = answer.send(response.result);
                    }
                }
                Some(Err(status)) => break status.message().to_owned(),
                None if stream.waiting.is_empty() => return None,
                None => break "the node closed it".to_owned(),
            },
        }
    };
    for (_, answer) in stream.waiting.drain() {
        let _ = answer.send(Err(unavailable(node, address, &reason)));
    }
    Some(reason)
}

async fn open_stream(address: &str) -> Result<Stream, String> {
    let channel = channel::connect(address).await.map_err(|error| chain(&error))?;
    let mut client = ExpertServiceClient::new(channel)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    let (requests, outgoing) = mpsc::channel(QUEUE);
    let responses =
        client.dispatch(ReceiverStream::new(outgoing)).await.map_err(|status| status.message().to_owned())?;
    Ok(Stream { requests, responses: responses.into_inner(), waiting: HashMap::new() })
}

fn unavailable(node: &NodeId, address: &str, reason: &str) -> Refusal {
    Refusal::new(RefusalReason::Unavailable, format!("expert node {node} at {address}: {reason}"))
}
