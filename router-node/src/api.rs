//! `sirocco.inference.v1`: hands what clients ask to the intake and streams what comes back.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use futures::{Stream, StreamExt as _};
use sirocco_proto::inference::{Event, GenerateRequest, InferenceService, Started};
use sirocco_proto::tonic::{Request, Response, Status};
use sirocco_proto::wire::inference as wire;
use sirocco_proto::{Invalid, failed, unavailable};
use sirocco_types::ModelIdentity;
use tokio_stream::wrappers::ReceiverStream;

use crate::engine::{GenerateError, SubmitError};
use crate::intake::{Events, Intake, Job, Refusal};
use crate::metrics::{Front, Metrics, Outcome};
use crate::scheduler::Flow;

/// The gRPC service of one router node.
#[derive(Debug)]
pub(crate) struct Api {
    intake: Arc<Intake>,
    metrics: Arc<Metrics>,
}

impl Api {
    pub(crate) fn new(intake: Arc<Intake>, metrics: Arc<Metrics>) -> Self {
        Self { intake, metrics }
    }
}

#[sirocco_proto::tonic::async_trait]
impl InferenceService for Api {
    type GenerateStream = Pin<Box<dyn Stream<Item = Result<wire::GenerateResponse, Status>> + Send>>;

    async fn generate(
        &self,
        request: Request<wire::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let tracked = self.metrics.request(Front::Grpc);
        let begun = self.begin(request.into_inner()).await.inspect_err(|refusal| tracked.end(refusal.into()));
        let (started, stream) = begun.map_err(refused)?;
        let first = futures::stream::iter([Ok(Event::Started(started))]);
        let events = first.chain(ReceiverStream::new(stream)).map(move |event| match event {
            Ok(event) => {
                if matches!(event, Event::Finished(_)) {
                    tracked.end(Outcome::Ok);
                }
                Ok(event.into())
            }
            Err(error) => {
                tracked.end((&error).into());
                Err(status(&error))
            }
        });
        Ok(Response::new(Box::pin(events)))
    }

    async fn tokenize(
        &self,
        request: Request<wire::TokenizeRequest>,
    ) -> Result<Response<wire::TokenizeResponse>, Status> {
        let request = request.into_inner();
        self.intake.check_model(&request.model).map_err(refused)?;
        let ids = self.intake.encode(request.text, !request.no_special_tokens).await.map_err(refused)?;
        Ok(Response::new(wire::TokenizeResponse { ids }))
    }

    async fn detokenize(
        &self,
        request: Request<wire::DetokenizeRequest>,
    ) -> Result<Response<wire::DetokenizeResponse>, Status> {
        let request = request.into_inner();
        self.intake.check_model(&request.model).map_err(refused)?;
        let tokenizer = &self.intake.tokenizer;
        tokenizer.check(&request.ids).map_err(|error| Invalid::new("ids", error.to_string()))?;
        Ok(Response::new(wire::DetokenizeResponse { text: tokenizer.decode(&request.ids) }))
    }

    async fn list_models(
        &self,
        _: Request<wire::ListModelsRequest>,
    ) -> Result<Response<wire::ListModelsResponse>, Status> {
        let ModelIdentity { name, fingerprint, spec } = &*self.intake.model;
        let model = wire::Model {
            name: name.clone(),
            fingerprint: fingerprint.to_string(),
            model_type: spec.model_type.clone(),
            context_tokens: spec.max_position_embeddings as u32,
            vocab_size: spec.vocab_size as u32,
        };
        Ok(Response::new(wire::ListModelsResponse { models: vec![model] }))
    }
}

impl Api {
    /// Hands `request` to the engine.
    async fn begin(&self, request: wire::GenerateRequest) -> Result<(Started, Events), Refusal> {
        let arrived = Instant::now();
        let request = GenerateRequest::try_from(request)?;
        self.intake.check_model(request.model.as_deref().unwrap_or_default())?;
        let prompt = self.intake.tokens(request.prompt).await?;
        let mut sampling = request.sampling;
        if !request.seeded {
            sampling.seed = sirocco_process::incarnation();
        }
        let id = self.intake.request_id();
        let started = Started {
            request_id: id.clone(),
            model: self.intake.model.name.clone(),
            prompt_tokens: prompt.len() as u32,
            seed: sampling.seed,
        };
        let GenerateRequest { trace, generated, .. } = request;
        let job = Job { id, flow: Flow::default(), prompt, generated, sampling, trace };
        let stream = self.intake.submit(vec![job], arrived)?.swap_remove(0);
        Ok((started, stream))
    }
}

/// Why nothing was started, as a status.
fn refused(refusal: Refusal) -> Status {
    match refusal {
        Refusal::UnknownModel { .. } => Status::not_found(refusal.to_string()),
        Refusal::Invalid(error) => error.into(),
        Refusal::Submit(SubmitError::Full(_) | SubmitError::TooMany { .. }) => {
            Status::resource_exhausted(refusal.to_string())
        }
        Refusal::NotReady(_) | Refusal::Submit(SubmitError::Stopped) => unavailable(refusal),
        Refusal::Internal(_) => failed(refusal),
    }
}

/// Why what was started failed, as a status.
fn status(error: &GenerateError) -> Status {
    match error {
        GenerateError::TooLarge(_) => Status::invalid_argument(format!("max_tokens: {error}")),
        GenerateError::Unavailable(_) => unavailable(error),
        GenerateError::Internal(_) => failed(error),
    }
}
