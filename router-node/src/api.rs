//! `sirocco.inference.v1`: hands what clients ask to the intake and streams what comes back.

use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::{Stream, StreamExt as _};
use sirocco_proto::channel::MAX_MESSAGE_BYTES;
use sirocco_proto::inference::{Event, GenerateRequest, InferenceService, InferenceServiceServer, Started};
use sirocco_proto::tonic::metadata::MetadataValue;
use sirocco_proto::tonic::service::Interceptor;
use sirocco_proto::tonic::service::interceptor::InterceptedService;
use sirocco_proto::tonic::{Request, Response, Status};
use sirocco_proto::wire::inference as wire;
use sirocco_proto::{Invalid, deadline_exceeded, failed, unavailable};
use sirocco_types::ModelIdentity;

use crate::callers::Caller;
use crate::deadline::Deadline;
use crate::engine::{GenerateError, SubmitError};
use crate::events::Events;
use crate::intake::{Intake, Job, Refusal, RequestId, Terms};
use crate::metrics::{Front, Outcome, Tracked};
use crate::openai::whole_seconds;

const REQUEST_ID: &str = "x-request-id";
/// By how much a call's deadline is kept early: tonic's own timer, which starts a little before ours, would say CANCELLED.
const EARLY: Duration = Duration::from_millis(2);

/// The gRPC service of one router node, for known callers only.
pub(crate) fn service(intake: Arc<Intake>) -> InterceptedService<InferenceServiceServer<Api>, Gate> {
    let server = InferenceServiceServer::new(Api { intake: Arc::clone(&intake) })
        .max_encoding_message_size(MAX_MESSAGE_BYTES)
        .max_decoding_message_size(intake.policy.max_body_bytes);
    InterceptedService::new(server, Gate { intake })
}

/// Gives each call an id and its caller.
#[derive(Clone, Debug)]
pub(crate) struct Gate {
    intake: Arc<Intake>,
}

/// Who asks, and what the request is called.
#[derive(Clone, Debug)]
struct Call {
    id: RequestId,
    caller: Arc<Caller>,
}

impl Interceptor for Gate {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        let id = self.intake.request_id(request.metadata().get(REQUEST_ID).map(|id| id.as_bytes()));
        let authorization = request.metadata().get("authorization").map(|value| value.as_bytes());
        let caller = self.intake.callers.identify(authorization, request.remote_addr().map(|peer| peer.ip()));
        let name = caller.as_ref().map_or("unknown", |caller| caller.name.as_str());
        tracing::debug!(request = id.log, client_id = id.shown, caller = name, "over gRPC");
        match caller {
            Ok(caller) => {
                request.extensions_mut().insert(Call { id, caller });
                Ok(request)
            }
            Err(unidentified) => {
                self.intake.metrics.request(Front::Grpc).end(Outcome::Unidentified);
                let mut status = refused(unidentified.into());
                status.insert(REQUEST_ID, &id.shown);
                Err(status)
            }
        }
    }
}

impl Call {
    /// Of a request that came through the gate.
    fn of<T>(request: &mut Request<T>) -> Result<Self, Status> {
        request.extensions_mut().remove().ok_or_else(|| failed("the call came past the gate"))
    }
}

/// What carries metadata back to a client.
trait Metadata {
    fn insert(&mut self, key: &'static str, value: &str);
}

impl<T> Metadata for Response<T> {
    fn insert(&mut self, key: &'static str, value: &str) {
        if let Ok(value) = MetadataValue::try_from(value) {
            self.metadata_mut().insert(key, value);
        }
    }
}

impl Metadata for Status {
    fn insert(&mut self, key: &'static str, value: &str) {
        if let Ok(value) = MetadataValue::try_from(value) {
            self.metadata_mut().insert(key, value);
        }
    }
}

impl RequestId {
    /// Adds the id to an answer, good or bad.
    fn answer<T: Metadata>(&self, mut result: Result<T, Status>) -> Result<T, Status> {
        match &mut result {
            Ok(response) => response.insert(REQUEST_ID, &self.shown),
            Err(status) => status.insert(REQUEST_ID, &self.shown),
        }
        result
    }
}

/// The gRPC service behind the gate.
#[derive(Debug)]
pub(crate) struct Api {
    intake: Arc<Intake>,
}

type GenerateStream = Pin<Box<dyn Stream<Item = Result<wire::GenerateResponse, Status>> + Send>>;

impl Api {
    /// Checks and submits a completion.
    async fn begin(
        &self,
        request: GenerateRequest,
        id: &RequestId,
        terms: &Terms,
    ) -> Result<(Started, Events), Refusal> {
        self.intake.check_model(request.model.as_deref().unwrap_or_default())?;
        let prompt = self.intake.tokens(request.prompt).await?;
        let mut sampling = request.sampling;
        if !request.seeded {
            sampling.seed = sirocco_process::incarnation();
        }
        let constraint = match request.constraint {
            Some((field, grammar)) => {
                let constraint = self.intake.constrain(grammar, request.generated.clone()).await;
                Some(constraint.map_err(|refusal| match refusal {
                    Refusal::Grammar(error) => Invalid::new(field, error.to_string()).into(),
                    refusal => refusal,
                })?)
            }
            None => None,
        };
        let started = Started {
            request_id: id.shown.clone(),
            model: self.intake.model.name.clone(),
            prompt_tokens: prompt.len() as u32,
            seed: sampling.seed,
        };
        let GenerateRequest { trace, generated, .. } = request;
        let job = Job { id: id.log.clone(), prompt, generated, sampling, constraint, trace };
        Ok((started, self.intake.submit(vec![job], terms)?.swap_remove(0)))
    }

    /// Lets a completion in and begins it; `tracked` is told how it ends.
    async fn stream(
        &self,
        request: Request<wire::GenerateRequest>,
        call: &Call,
        tracked: Tracked,
    ) -> Result<GenerateStream, Refusal> {
        let arrived = Instant::now();
        let admission = call.caller.admit(arrived)?;
        let call_timeout = grpc_timeout(&request);
        let request = GenerateRequest::try_from(request.into_inner())?;
        let asks = [request.timeout, call_timeout].into_iter().flatten();
        let deadline = Deadline::new(arrived, self.intake.policy.request_timeout(), asks);
        let terms = Terms { arrived, deadline, priority: request.priority, admission };
        let (started, events) = deadline.within(self.begin(request, &call.id, &terms)).await?;
        let first = futures::stream::iter([Ok(Event::Started(started))]);
        Ok(Box::pin(first.chain(events).map(move |event| match event {
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
        })))
    }
}

#[sirocco_proto::tonic::async_trait]
impl InferenceService for Api {
    type GenerateStream = GenerateStream;

    async fn generate(
        &self,
        mut request: Request<wire::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let call = Call::of(&mut request)?;
        let tracked = self.intake.metrics.request(Front::Grpc);
        let stream = self.stream(request, &call, tracked.clone()).await;
        let stream = stream.inspect_err(|refusal| tracked.end(refusal.into())).map_err(refused);
        call.id.answer(stream.map(Response::new))
    }

    async fn tokenize(
        &self,
        mut request: Request<wire::TokenizeRequest>,
    ) -> Result<Response<wire::TokenizeResponse>, Status> {
        let Call { id, caller } = Call::of(&mut request)?;
        let request = request.into_inner();
        let ids = async {
            let _admission = caller.admit(Instant::now())?;
            self.intake.check_model(&request.model)?;
            self.intake.encode(request.text, !request.no_special_tokens).await
        };
        id.answer(ids.await.map(|ids| Response::new(wire::TokenizeResponse { ids })).map_err(refused))
    }

    async fn detokenize(
        &self,
        mut request: Request<wire::DetokenizeRequest>,
    ) -> Result<Response<wire::DetokenizeResponse>, Status> {
        let Call { id, caller } = Call::of(&mut request)?;
        let request = request.into_inner();
        let text = || {
            let _admission = caller.admit(Instant::now())?;
            self.intake.check_model(&request.model)?;
            let tokenizer = &self.intake.tokenizer;
            tokenizer.check(&request.ids).map_err(|error| Invalid::new("ids", error.to_string()))?;
            Ok(tokenizer.decode(&request.ids))
        };
        id.answer(text().map(|text| Response::new(wire::DetokenizeResponse { text })).map_err(refused))
    }

    async fn list_models(
        &self,
        mut request: Request<wire::ListModelsRequest>,
    ) -> Result<Response<wire::ListModelsResponse>, Status> {
        let call = Call::of(&mut request)?;
        let ModelIdentity { name, fingerprint, spec, .. } = &*self.intake.model;
        let model = wire::Model {
            name: name.clone(),
            fingerprint: fingerprint.to_string(),
            model_type: spec.model_type.clone(),
            context_tokens: spec.max_position_embeddings as u32,
            vocab_size: spec.vocab_size as u32,
        };
        call.id.answer(Ok(Response::new(wire::ListModelsResponse { models: vec![model] })))
    }
}

/// How long the call may take by its `grpc-timeout`: at most eight digits and a unit. One that cannot be read counts for nothing, as
/// tonic has it too.
fn grpc_timeout<T>(request: &Request<T>) -> Option<Duration> {
    let text = request.metadata().get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let count = u64::from(digits.parse::<u32>().ok().filter(|_| digits.len() <= 8)?);
    let timeout = match unit {
        "H" => Duration::from_secs(count * 3600),
        "M" => Duration::from_secs(count * 60),
        "S" => Duration::from_secs(count),
        "m" => Duration::from_millis(count),
        "u" => Duration::from_micros(count),
        "n" => Duration::from_nanos(count),
        _ => return None,
    };
    Some(timeout.saturating_sub(EARLY))
}

/// Why nothing was started, as a status.
fn refused(refusal: Refusal) -> Status {
    let retry_after = refusal.retry_after();
    let mut status = match refusal {
        Refusal::Unidentified(_) => Status::unauthenticated(refusal.to_string()),
        Refusal::Limited(_) => Status::resource_exhausted(refusal.to_string()),
        Refusal::Overdue(_) => deadline_exceeded(refusal),
        Refusal::UnknownModel { .. } => Status::not_found(refusal.to_string()),
        Refusal::Invalid(error) => error.into(),
        Refusal::Grammar(_) => Status::invalid_argument(refusal.to_string()),
        Refusal::Submit(SubmitError::Full(_) | SubmitError::TooMany { .. }) => {
            Status::resource_exhausted(refusal.to_string())
        }
        Refusal::NotReady(_) | Refusal::Submit(SubmitError::Stopped) => unavailable(refusal),
        Refusal::Internal(_) => failed(refusal),
    };
    if let Some(retry_after) = retry_after {
        status.insert("retry-after", &whole_seconds(retry_after).to_string());
    }
    status
}

/// Why what was started failed, as a status.
fn status(error: &GenerateError) -> Status {
    match error {
        GenerateError::Grammar(_) => Status::invalid_argument(error.to_string()),
        GenerateError::TooLarge(_) => Status::invalid_argument(format!("max_tokens: {error}")),
        GenerateError::Overdue(_) => deadline_exceeded(error),
        GenerateError::Unavailable(_) => unavailable(error),
        GenerateError::Internal(_) => failed(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_calls_timeout_is_read_in_every_unit() {
        let cases = [
            ("1H", Some(3_600_000)),
            ("2M", Some(120_000)),
            ("3S", Some(3000)),
            ("400m", Some(400)),
            ("500000u", Some(500)),
            ("99999999n", Some(99)),
            ("123456789n", None),
            ("5", None),
            ("S", None),
            ("-1S", None),
            ("5x", None),
        ];
        for (given, expected_ms) in cases {
            let mut request = Request::new(());
            request.metadata_mut().insert("grpc-timeout", given.parse().unwrap());
            let ms = grpc_timeout(&request).map(|timeout| (timeout + EARLY).as_millis());
            assert_eq!(ms, expected_ms, "{given}");
        }
    }
}
