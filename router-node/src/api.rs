//! `sirocco.inference.v1`: validates, tokenises, hands to the engine, streams what comes back.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use futures::{Stream, StreamExt as _};
use sirocco_model::{Tokenizer, TokenizerError};
use sirocco_proto::inference::{Event, GenerateRequest, InferenceService, Prompt, Started};
use sirocco_proto::tonic::{Request, Response, Status};
use sirocco_proto::wire::inference as wire;
use sirocco_proto::{Invalid, failed, unavailable};
use sirocco_types::ModelIdentity;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use crate::engine::{self, Engine, GenerateError, SubmitError};

/// The gRPC service of one router node.
#[derive(Debug)]
pub(crate) struct Api {
    model: Arc<ModelIdentity>,
    tokenizer: Arc<Tokenizer>,
    engine: Engine,
    /// Differs between processes, so that request ids do.
    incarnation: u64,
    requests: AtomicU64,
}

impl Api {
    pub(crate) fn new(model: Arc<ModelIdentity>, tokenizer: Arc<Tokenizer>, engine: Engine) -> Self {
        Self { model, tokenizer, engine, incarnation: sirocco_process::incarnation(), requests: AtomicU64::new(0) }
    }

    fn check_model(&self, name: &str) -> Result<(), Status> {
        if name.is_empty() || name == self.model.name {
            return Ok(());
        }
        Err(Status::not_found(format!("model: {name:?} is not served here, {:?} is", self.model.name)))
    }

    fn tokens(&self, prompt: Prompt) -> Result<Vec<u32>, Invalid> {
        let ids = match prompt {
            Prompt::Text(text) => self.tokenizer.encode(&text, true).map_err(|error| invalid("text", &error))?,
            Prompt::Ids(ids) => {
                self.tokenizer.check(&ids).map_err(|error| invalid("token_ids", &error))?;
                ids
            }
        };
        let context = self.model.spec.max_position_embeddings;
        if ids.is_empty() {
            return Err(Invalid::new("prompt", "it has no tokens, it must have at least 1"));
        }
        if ids.len() >= context {
            return Err(Invalid::new(
                "prompt",
                format!(
                    "it is {} tokens long, the model's context is {context} with at least 1 left to generate",
                    ids.len()
                ),
            ));
        }
        Ok(ids)
    }

    fn request_id(&self) -> String {
        format!("{:x}-{}", self.incarnation, self.requests.fetch_add(1, Ordering::Relaxed))
    }
}

fn invalid(field: &str, error: &TokenizerError) -> Invalid {
    Invalid::new(field, error.to_string())
}

#[sirocco_proto::tonic::async_trait]
impl InferenceService for Api {
    type GenerateStream = Pin<Box<dyn Stream<Item = Result<wire::GenerateResponse, Status>> + Send>>;

    async fn generate(
        &self,
        request: Request<wire::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let arrived = Instant::now();
        let request = GenerateRequest::try_from(request.into_inner())?;
        self.check_model(request.model.as_deref().unwrap_or_default())?;
        let prompt = self.tokens(request.prompt)?;
        let mut sampling = request.sampling;
        let room = self.model.spec.max_position_embeddings - prompt.len();
        sampling.max_tokens = sampling.max_tokens.min(room as u32);
        let id = self.request_id();
        if !request.seeded {
            sampling.seed = sirocco_process::incarnation();
        }
        let started = Started {
            request_id: id.clone(),
            model: self.model.name.clone(),
            prompt_tokens: prompt.len() as u32,
            seed: sampling.seed,
        };
        tracing::debug!(request = id, prompt_tokens = prompt.len(), max_tokens = sampling.max_tokens, "accepted");
        // Room for every token and the end, so that the engine never waits for a slow client.
        let (events, stream) = mpsc::channel(sampling.max_tokens as usize + 2);
        let request = engine::Request { id, prompt, sampling, trace: request.trace, arrived, events };
        self.engine.submit(request).map_err(|error| match error {
            SubmitError::Full(_) => Status::resource_exhausted(error.to_string()),
            SubmitError::Stopped => unavailable(error),
        })?;
        let first = futures::stream::iter([Ok(Event::Started(started))]);
        let events = first.chain(ReceiverStream::new(stream)).map(|event| match event {
            Ok(event) => Ok(event.into()),
            Err(error) => Err(status(&error)),
        });
        Ok(Response::new(Box::pin(events)))
    }

    async fn tokenize(
        &self,
        request: Request<wire::TokenizeRequest>,
    ) -> Result<Response<wire::TokenizeResponse>, Status> {
        let request = request.into_inner();
        self.check_model(&request.model)?;
        let ids = self.tokenizer.encode(&request.text, !request.no_special_tokens);
        Ok(Response::new(wire::TokenizeResponse { ids: ids.map_err(|error| invalid("text", &error))? }))
    }

    async fn detokenize(
        &self,
        request: Request<wire::DetokenizeRequest>,
    ) -> Result<Response<wire::DetokenizeResponse>, Status> {
        let request = request.into_inner();
        self.check_model(&request.model)?;
        self.tokenizer.check(&request.ids).map_err(|error| invalid("ids", &error))?;
        Ok(Response::new(wire::DetokenizeResponse { text: self.tokenizer.decode(&request.ids) }))
    }

    async fn list_models(
        &self,
        _: Request<wire::ListModelsRequest>,
    ) -> Result<Response<wire::ListModelsResponse>, Status> {
        let ModelIdentity { name, fingerprint, spec } = &*self.model;
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

fn status(error: &GenerateError) -> Status {
    match error {
        GenerateError::TooLarge(_) => Status::invalid_argument(format!("max_tokens: {error}")),
        GenerateError::Unavailable(_) => unavailable(error),
        GenerateError::Internal(_) => failed(error),
    }
}
