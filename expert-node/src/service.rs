//! What a node answers: checks requests and hands them to the compute thread. [`ExpertServer`](sirocco_proto::expert::ExpertServer)
//! carries them.

use std::sync::Arc;

use arc_swap::ArcSwap;
use sirocco_proto::expert::{Description, DispatchRequest, ExpertOutputs, Node, Refusal, RefusalReason};
use sirocco_types::{ExpertHoldings, ModelIdentity, NodeId};

use crate::batch::{Batcher, Held};
use crate::metrics::Metrics;

/// What one expert node answers.
#[derive(Clone, Debug)]
pub(crate) struct Service {
    pub(crate) id: NodeId,
    pub(crate) model: Arc<ModelIdentity>,
    pub(crate) held: Arc<ArcSwap<Held>>,
    pub(crate) batcher: Batcher,
    pub(crate) metrics: Arc<Metrics>,
}

impl Node for Service {
    fn describe(&self) -> Description {
        let held = self.held.load();
        let bytes = held.values().map(|weights| weights.bytes() as u64).sum();
        let holdings = ExpertHoldings::new(held.keys().copied(), bytes);
        Description { id: self.id.clone(), fingerprint: self.model.fingerprint, holdings }
    }

    fn answer(
        &self,
        request: Result<DispatchRequest, Refusal>,
    ) -> impl Future<Output = Result<ExpertOutputs, Refusal>> + Send + 'static {
        let handed = request.and_then(|request| {
            self.check(&request)?;
            self.batcher.run(request)
        });
        let metrics = Arc::clone(&self.metrics);
        async move {
            let result = match handed {
                Ok(answer) => answer.await,
                Err(refusal) => Err(refusal),
            };
            match &result {
                Ok(outputs) => {
                    let refusals = outputs.experts.iter().filter_map(|(_, result)| result.as_ref().err());
                    refusals.for_each(|refusal| metrics.refused(refusal.reason));
                }
                Err(refusal) => metrics.refused(refusal.reason),
            }
            result
        }
    }
}

impl Service {
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
