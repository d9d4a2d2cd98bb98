//! `sirocco.expert.v1`: checks requests, hands them to the compute thread, answers in order of completion.

use std::sync::Arc;

use arc_swap::ArcSwap;
use futures::stream::FuturesUnordered;
use sirocco_proto::expert::{DispatchRequest, DispatchResponse, ExpertService, Refusal, RefusalReason};
use sirocco_proto::tonic::{Request, Response, Status, Streaming};
use sirocco_proto::wire::expert as wire;
use sirocco_types::{ExpertHoldings, ModelIdentity, NodeId};
use tokio::sync::mpsc;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::batch::{Batcher, Held};
use crate::metrics::Metrics;

/// Answers that may wait for a slow router; its next requests are not read meanwhile.
const ANSWERS: usize = 64;

/// The gRPC service of one expert node.
#[derive(Clone, Debug)]
pub(crate) struct Service {
    pub(crate) id: NodeId,
    pub(crate) model: Arc<ModelIdentity>,
    pub(crate) held: Arc<ArcSwap<Held>>,
    pub(crate) batcher: Batcher,
    pub(crate) metrics: Arc<Metrics>,
    /// Owns the tasks of open streams.
    pub(crate) tasks: TaskTracker,
    /// Ends open streams.
    pub(crate) leave: CancellationToken,
}

#[sirocco_proto::tonic::async_trait]
impl ExpertService for Service {
    type DispatchStream = ReceiverStream<Result<wire::DispatchResponse, Status>>;

    async fn dispatch(
        &self,
        request: Request<Streaming<wire::DispatchRequest>>,
    ) -> Result<Response<Self::DispatchStream>, Status> {
        let (answers, stream) = mpsc::channel(ANSWERS);
        self.tasks.spawn(self.clone().serve(request.into_inner(), answers));
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn describe(&self, _: Request<wire::DescribeRequest>) -> Result<Response<wire::DescribeResponse>, Status> {
        let held = self.held.load();
        let bytes = held.values().map(|weights| weights.bytes() as u64).sum();
        let holdings = ExpertHoldings::new(held.keys().copied(), bytes);
        let layers = holdings.layers.into_iter().map(|(layer, experts)| wire::LayerExperts {
            layer: layer.0,
            experts: experts.into_iter().map(|expert| expert.0).collect(),
        });
        Ok(Response::new(wire::DescribeResponse {
            id: self.id.to_string(),
            model_fingerprint: self.model.fingerprint.0.to_vec().into(),
            layers: layers.collect(),
            weight_bytes: holdings.weight_bytes,
        }))
    }
}

impl Service {
    /// Carries one router's stream until the router or this node leaves; what is under way is answered first.
    async fn serve(
        self,
        mut requests: Streaming<wire::DispatchRequest>,
        answers: mpsc::Sender<Result<wire::DispatchResponse, Status>>,
    ) {
        let mut running = FuturesUnordered::new();
        let mut open = true;
        while open || !running.is_empty() {
            tokio::select! {
                request = requests.next(), if open => match request {
                    Some(Ok(request)) => running.push(self.answer(request)),
                    Some(Err(status)) => {
                        tracing::debug!(reason = status.message(), "a router's stream broke");
                        return;
                    }
                    None => open = false,
                },
                Some(answer) = running.next() => {
                    if answers.send(Ok(answer)).await.is_err() {
                        return;
                    }
                }
                () = self.leave.cancelled(), if open => open = false,
            }
        }
    }

    async fn answer(&self, request: wire::DispatchRequest) -> wire::DispatchResponse {
        let answer = match DispatchRequest::from_wire(request) {
            Ok(request) => {
                let id = request.id;
                let result = match self.check(&request) {
                    Ok(()) => self.batcher.run(request).await,
                    Err(refusal) => Err(refusal),
                };
                DispatchResponse { id, result }
            }
            Err(answer) => answer,
        };
        match &answer.result {
            Ok(outputs) => {
                let refusals = outputs.experts.iter().filter_map(|(_, result)| result.as_ref().err());
                refusals.for_each(|refusal| self.metrics.refused(refusal.reason));
            }
            Err(refusal) => self.metrics.refused(refusal.reason),
        }
        answer.into_wire()
    }

    /// Whether `request` is for this model and fits its shapes.
    fn check(&self, request: &DispatchRequest) -> Result<(), Refusal> {
        let ModelIdentity { fingerprint, spec, .. } = &*self.model;
        if request.fingerprint != *fingerprint {
            return Err(Refusal::new(
                RefusalReason::WrongModel,
                format!("model_fingerprint: {}, this node serves {}", request.fingerprint.short(), fingerprint.short()),
            ));
        }
        let invalid = |message: String| Err(Refusal::new(RefusalReason::Invalid, message));
        if request.layer.index() >= spec.num_hidden_layers {
            return invalid(format!("layer: {}, the model has {}", request.layer, spec.num_hidden_layers));
        }
        if request.hidden_states.width() != spec.hidden_size {
            let width = request.hidden_states.width();
            return invalid(format!("hidden_states: {width} wide, the model's hidden_size is {}", spec.hidden_size));
        }
        match request.experts.iter().find(|part| part.expert.index() >= spec.num_local_experts) {
            Some(part) => invalid(format!("experts: {}, a layer has {}", part.expert, spec.num_local_experts)),
            None => Ok(()),
        }
    }
}
