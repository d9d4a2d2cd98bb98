//! One expert node as a router sees it: a long-lived dispatch stream, owned by a task that matches answers to requests.
//!
//! The task lives on the engine's own runtime, so that a request and its answer change threads nowhere on the router: the engine
//! polls the sockets itself while it waits for experts. The task connects when there is something to send. When the stream
//! breaks, whatever waits on it is refused as unavailable at once; trying again is the dispatcher's decision, never this module's.
//! A call that nobody waits for any more is forgotten at once. When a call is late, the node is asked whether it lives, so that a
//! connection that is dead is noticed soon and not by the keepalive.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use sirocco_proto::expert::{DispatchRequest, DispatchResponse, ExpertOutputs, Refusal, RefusalReason, Stream};
use sirocco_types::NodeId;
use tokio::runtime::Handle;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio_util::task::TaskTracker;

use crate::metrics::Hop;
use crate::standing::Standing;

/// Requests that may wait for one node before callers wait to hand over theirs.
const QUEUE: usize = 64;

/// How long a node that is late may take to say that it lives. Whoever serves its connections does not compute.
const LIVES: Duration = Duration::from_secs(2);

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
    signals: Arc<Signals>,
}

/// What a connection's task is told beside its calls.
#[derive(Debug, Default)]
struct Signals {
    /// That something is to be looked at.
    look: Notify,
    /// That a call is late.
    late: AtomicBool,
}

/// Has the task look for calls that nobody waits for, unless it is answered first.
struct Leaving<'a>(Option<&'a Signals>);

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        if let Some(signals) = self.0 {
            signals.look.notify_one();
        }
    }
}

impl Connection {
    /// Starts the stream's task at `home`; it connects with the first call.
    pub(crate) fn open(node: NodeId, address: String, hop: Arc<Hop>, home: &Home) -> Self {
        let (calls, queue) = mpsc::channel(QUEUE);
        let signals = Arc::<Signals>::default();
        let task = Task { node: node.clone(), address: address.clone(), signals: Arc::clone(&signals) };
        home.tasks.spawn_on(task.run(queue), &home.runtime);
        Self { node, address, hop, standing: Standing::default(), calls, signals }
    }

    /// A connection whose calls go to `calls` and nowhere else.
    #[cfg(test)]
    pub(crate) fn over(node: NodeId, hop: Arc<Hop>, calls: mpsc::Sender<(DispatchRequest, Answer)>) -> Self {
        Self { address: node.to_string(), node, hop, standing: Standing::default(), calls, signals: Arc::default() }
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
        let mut leaving = Leaving(Some(&self.signals));
        let result = answered.await;
        leaving.0 = None;
        result.map_err(|_| gone())?
    }

    /// A call is late: asks the node whether it lives. If it does not say so, the stream breaks.
    pub(crate) fn probe(&self) {
        self.signals.late.store(true, Ordering::Relaxed);
        self.signals.look.notify_one();
    }
}

/// The task of a connection.
struct Task {
    node: NodeId,
    address: String,
    signals: Arc<Signals>,
}

impl Task {
    async fn run(self, mut calls: mpsc::Receiver<(DispatchRequest, Answer)>) {
        let Self { node, address, .. } = &self;
        let mut waiting = Waiting::default();
        while let Some(call) = calls.recv().await {
            if call.1.is_closed() {
                continue;
            }
            let broken = match Stream::open(address).await {
                Ok(stream) => {
                    tracing::debug!(%node, address, "connected");
                    let Some(reason) = self.drive(stream, call, &mut calls, &mut waiting).await else { continue };
                    tracing::warn!(%node, address, reason, "the stream to an expert node broke");
                    reason
                }
                Err(reason) => {
                    tracing::debug!(%node, address, %reason, "cannot connect to an expert node");
                    waiting.note(call.1);
                    // They would wait one after the other.
                    while let Ok((_, answer)) = calls.try_recv() {
                        waiting.note(answer);
                    }
                    reason.to_string()
                }
            };
            waiting.refuse(&unavailable(node, address, broken));
        }
    }

    /// Carries calls over `stream`, `first` foremost, until no handle is left, the node leaves with everything answered, or the
    /// stream breaks. Returns why it broke; what waits then is still in `waiting`.
    async fn drive(
        &self,
        mut stream: Stream,
        first: (DispatchRequest, Answer),
        calls: &mut mpsc::Receiver<(DispatchRequest, Answer)>,
        waiting: &mut Waiting,
    ) -> Option<String> {
        let mut call = Some(first);
        loop {
            if let Some((mut request, answer)) = call.take().filter(|(_, answer)| !answer.is_closed()) {
                request.id = waiting.note(answer);
                let id = request.id;
                if let Err(refusal) = stream.send(request) {
                    waiting.answered(DispatchResponse { id, result: Err(refusal) });
                }
            }
            tokio::select! {
                biased;
                response = stream.next() => match response {
                    Some(Ok(response)) => waiting.answered(response),
                    Some(Err(broken)) => return Some(broken.to_string()),
                    None if waiting.answers.is_empty() => return None,
                    None => return Some("the node closed it".to_owned()),
                },
                () = self.signals.look.notified() => {
                    waiting.forget();
                    if self.signals.late.swap(false, Ordering::Relaxed) {
                        stream.probe(LIVES);
                    }
                }
                next = calls.recv() => {
                    call = next;
                    if call.is_none() {
                        stream.close().await;
                        return None;
                    }
                }
            }
        }
    }
}

/// The calls of a connection that are not answered yet.
#[derive(Debug, Default)]
struct Waiting {
    /// By id.
    answers: HashMap<u64, Answer>,
    /// No two calls have the same id, whichever stream they go over.
    next_id: u64,
}

impl Waiting {
    /// Takes in a call and gives it an id.
    fn note(&mut self, answer: Answer) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        self.answers.insert(id, answer);
        id
    }

    /// Hands an answer to whoever waits for it. One that nobody waits for is late or a duplicate.
    fn answered(&mut self, response: DispatchResponse) {
        if let Some(answer) = self.answers.remove(&response.id) {
            let _ = answer.send(response.result);
        }
    }

    /// Forgets those that nobody waits for any more.
    fn forget(&mut self) {
        self.answers.retain(|_, answer| !answer.is_closed());
    }

    /// Refuses all.
    fn refuse(&mut self, refusal: &Refusal) {
        for (_, answer) in self.answers.drain() {
            let _ = answer.send(Err(refusal.clone()));
        }
    }
}

fn unavailable(node: &NodeId, address: &str, reason: impl std::fmt::Display) -> Refusal {
    Refusal::new(RefusalReason::Unavailable, format!("expert node {node} at {address}: {reason}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(id: u64, expert: u32) -> DispatchResponse {
        let experts = vec![(sirocco_types::ExpertId(expert), Ok(()))];
        DispatchResponse { id, result: Ok(ExpertOutputs { experts, ..ExpertOutputs::default() }) }
    }

    #[test]
    fn late_and_duplicate_answers_are_discarded_by_their_id() {
        let mut waiting = Waiting::default();
        let mut calls: Vec<_> = (0..4).map(|_| oneshot::channel()).collect();
        let (answers, mut answered): (Vec<_>, Vec<_>) = calls.drain(..).unzip();
        let ids: Vec<u64> = answers.into_iter().map(|answer| waiting.note(answer)).collect();
        assert_eq!(ids, [0, 1, 2, 3]);
        drop(answered.remove(3));
        waiting.forget();
        assert_eq!(waiting.answers.len(), 3, "nobody waits for the last one");

        for (id, expert) in [(2, 7), (2, 8), (3, 9), (4, 9), (u64::MAX, 9), (0, 5)] {
            waiting.answered(answer(id, expert));
        }
        assert_eq!(answered[2].try_recv().unwrap(), answer(2, 7).result, "the first answer counts");
        assert_eq!(answered[0].try_recv().unwrap(), answer(0, 5).result);
        assert!(answered[1].try_recv().is_err(), "what was for others is not taken");

        let refusal = Refusal::new(RefusalReason::Unavailable, "broken");
        waiting.refuse(&refusal);
        assert_eq!((answered[1].try_recv().unwrap(), waiting.answers.len()), (Err(refusal), 0));
        let (again, _answered) = oneshot::channel();
        assert_eq!(
            waiting.note(again),
            4,
            "an id is never used again, so that an answer of the old stream finds nobody"
        );
    }
}
