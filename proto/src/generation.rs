//! A client's side of one completion: follows its stream, and goes on at another router node when one is lost. What the caller
//! sees is one stream with the bytes that an undisturbed one has.

use std::time::{Duration, Instant};

use tonic::metadata::{Ascii, MetadataValue};
use tonic::{Code, Request, Status, Streaming};

use crate::channel::{self, MAX_MESSAGE_BYTES};
use crate::inference::InferenceServiceClient;
use crate::wire::inference::generate_response::Event;
use crate::wire::inference::{GenerateRequest, GenerateResponse};

/// Wait before a router is asked when all were just asked in vain.
const PAUSE: Duration = Duration::from_millis(200);

/// How a router was lost.
type Reason = Box<dyn std::error::Error + Send + Sync>;

/// One completion under way.
#[derive(Debug)]
pub struct Generation {
    /// gRPC addresses; the one in use is first.
    routers: Vec<String>,
    /// What is asked for, the tokens received so far included.
    request: GenerateRequest,
    authorization: Option<MetadataValue<Ascii>>,
    deadline: Option<Instant>,
    stream: Option<Streaming<GenerateResponse>>,
    started: bool,
    /// Routers lost since the last event.
    lost: usize,
}

/// Why a completion does not go on.
#[derive(Debug, thiserror::Error)]
pub enum GenerationError {
    /// No router can be reached; the last one's address and what happened there.
    #[error("router node {0}")]
    Unreachable(String, #[source] Reason),
    /// A router refuses it: its address and its answer.
    #[error("router node {0}: {1}")]
    Refused(String, Status),
}

impl Generation {
    /// Will ask the first of `routers` for `request`, and the others in turn when it is lost. Panics when there is none.
    pub fn new(routers: Vec<String>, request: GenerateRequest) -> Self {
        assert!(!routers.is_empty(), "a completion needs a router");
        Self { routers, request, authorization: None, deadline: None, stream: None, started: false, lost: 0 }
    }

    /// Sends `authorization` with every call.
    #[must_use]
    pub fn authorized(mut self, authorization: MetadataValue<Ascii>) -> Self {
        self.authorization = Some(authorization);
        self
    }

    /// Gives up at `deadline`, whatever router is asked then.
    #[must_use]
    pub fn until(mut self, deadline: Instant) -> Self {
        self.deadline = Some(deadline);
        self
    }

    /// The address of the router in use.
    pub fn router(&self) -> &str {
        &self.routers[0]
    }

    /// The next event: `started` once, then each token once, then `finished`, after which this must not be called.
    pub async fn event(&mut self) -> Result<Event, GenerationError> {
        loop {
            let event = match self.advance().await {
                Ok(event) => event,
                Err(Loss::Final(status)) => {
                    return Err(GenerationError::Refused(self.router().to_owned(), status));
                }
                Err(Loss::Router(reason)) => {
                    self.give_up_router(reason).await?;
                    continue;
                }
            };
            self.lost = 0;
            match &event {
                Event::Started(_) if self.started => continue,
                Event::Started(started) => {
                    self.started = true;
                    self.request.sampling.get_or_insert_default().seed = Some(started.seed);
                }
                Event::Token(token) => self.request.generated_token_ids.push(token.id),
                Event::Finished(_) => {}
            }
            return Ok(event);
        }
    }

    /// The next event of the router in use, which is asked first when there is no stream yet.
    async fn advance(&mut self) -> Result<Event, Loss> {
        let stream = match self.stream.take() {
            Some(stream) => stream,
            None => open(&self.routers[0], self.call()?).await?,
        };
        let stream = self.stream.insert(stream);
        loop {
            match stream.message().await? {
                Some(GenerateResponse { event: Some(event) }) => return Ok(event),
                // An event of a later version.
                Some(GenerateResponse { event: None }) => {}
                None => return Err(Loss::Router("the stream ended before the completion did".into())),
            }
        }
    }

    fn call(&self) -> Result<Request<GenerateRequest>, Loss> {
        let mut call = Request::new(self.request.clone());
        if let Some(authorization) = &self.authorization {
            call.metadata_mut().insert("authorization", authorization.clone());
        }
        if let Some(deadline) = self.deadline {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Loss::Final(Status::deadline_exceeded("the time for the completion is up")));
            }
            call.set_timeout(left);
        }
        Ok(call)
    }

    /// Turns to the next router; an error when all were lost since the last event, and the one in use once more.
    async fn give_up_router(&mut self, reason: Reason) -> Result<(), GenerationError> {
        self.stream = None;
        self.lost += 1;
        if self.lost > self.routers.len() {
            return Err(GenerationError::Unreachable(self.router().to_owned(), reason));
        }
        self.routers.rotate_left(1);
        if self.lost == self.routers.len() {
            tokio::time::sleep(PAUSE).await;
        }
        Ok(())
    }
}

/// What ends a stream early.
enum Loss {
    /// The router or the way to it, which another can make good.
    Router(Reason),
    /// No router would answer otherwise.
    Final(Status),
}

impl From<Status> for Loss {
    /// A status that no router sent has a source: the connection's failure.
    fn from(status: Status) -> Self {
        let sent = std::error::Error::source(&status).is_none();
        match status.code() {
            Code::Unavailable => Self::Router(status.message().into()),
            Code::DeadlineExceeded => Self::Final(status),
            _ if sent => Self::Final(status),
            _ => Self::Router(status.message().into()),
        }
    }
}

async fn open(router: &str, call: Request<GenerateRequest>) -> Result<Streaming<GenerateResponse>, Loss> {
    let channel = channel::connect(router).await.map_err(|error| Loss::Router(error.into()))?;
    let mut client = InferenceServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES);
    Ok(client.generate(call).await?.into_inner())
}
