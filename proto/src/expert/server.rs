//! The ExpertService of an expert node, its Dispatch stream straight on the HTTP/2 body.
//!
//! The body of a stream's response is all there is to it: polled for answers, it reads the requests and runs them, so that
//! neither a task nor a queue stands between the connection and the node. While the router takes no answers, its next requests
//! are not read. Any gRPC client can talk to it; compression is refused.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt as _};
use http_body::{Body as _, Frame};
use sirocco_types::{ExpertHoldings, Fingerprint, NodeId};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::body::Body;
use tonic::codegen::{Service, http};
use tonic::server::{Grpc, NamedService, UnaryService};
use tonic::{Code, Status};

use super::message::Inbox;
use super::{DISPATCH_PATH, DispatchRequest, DispatchResponse, ExpertOutputs, Refusal, wire};
use crate::codec::Codec;

/// What a node holds now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// The node.
    pub id: NodeId,
    /// The checkpoint it serves.
    pub fingerprint: Fingerprint,
    /// Its experts.
    pub holdings: ExpertHoldings,
}

/// Who answers behind an [`ExpertServer`].
pub trait Node: Clone + Send + Sync + 'static {
    /// What it holds now.
    fn describe(&self) -> Description;

    /// Runs a request, or takes note of why it was not even a request, and says what to answer.
    fn answer(
        &self,
        request: Result<DispatchRequest, Refusal>,
    ) -> impl Future<Output = Result<ExpertOutputs, Refusal>> + Send + 'static;
}

/// The gRPC service `sirocco.expert.v1.ExpertService` of a node.
#[derive(Clone, Debug)]
pub struct ExpertServer<N> {
    node: N,
    leave: CancellationToken,
}

impl<N: Node> ExpertServer<N> {
    /// The service of `node`. After `leave` its streams take no more requests and end once what is under way is answered.
    pub fn new(node: N, leave: CancellationToken) -> Self {
        Self { node, leave }
    }
}

impl<N> NamedService for ExpertServer<N> {
    const NAME: &'static str = wire::expert_service_server::SERVICE_NAME;
}

impl<N: Node> Service<http::Request<Body>> for ExpertServer<N> {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        if request.uri().path() == DISPATCH_PATH {
            let response = dispatch(self.node.clone(), self.leave.clone(), request);
            return Box::pin(std::future::ready(Ok(response)));
        }
        let describe = Describe(self.node.clone());
        match request.uri().path().rsplit('/').next() {
            Some("Describe") => Box::pin(async { Ok(Grpc::new(Codec::default()).unary(describe, request).await) }),
            _ => Box::pin(std::future::ready(Ok(Status::unimplemented("no such method").into_http()))),
        }
    }
}

/// The method `Describe`.
struct Describe<N>(N);

impl<N: Node> UnaryService<wire::DescribeRequest> for Describe<N> {
    type Response = wire::DescribeResponse;
    type Future = std::future::Ready<Result<tonic::Response<wire::DescribeResponse>, Status>>;

    fn call(&mut self, _: tonic::Request<wire::DescribeRequest>) -> Self::Future {
        std::future::ready(Ok(tonic::Response::new(self.0.describe().into_wire())))
    }
}

impl Description {
    fn into_wire(self) -> wire::DescribeResponse {
        let layers = self.holdings.layers.into_iter().map(|(layer, experts)| wire::LayerExperts {
            layer: layer.0,
            experts: experts.into_iter().map(|expert| expert.0).collect(),
        });
        wire::DescribeResponse {
            id: self.id.to_string(),
            model_fingerprint: self.fingerprint.0.to_vec().into(),
            layers: layers.collect(),
            weight_bytes: self.holdings.weight_bytes,
        }
    }
}

/// Opens a stream.
fn dispatch<N: Node>(node: N, leave: CancellationToken, request: http::Request<Body>) -> http::Response<Body> {
    let encoding = request.headers().get("grpc-encoding").filter(|encoding| *encoding != "identity");
    if let Some(encoding) = encoding {
        let status = format!("grpc-encoding: {encoding:?}, messages of this stream must not be compressed (identity)");
        let mut response = Status::unimplemented(status).into_http();
        response.headers_mut().insert("grpc-accept-encoding", http::HeaderValue::from_static("identity"));
        return response;
    }
    let exchange = Exchange {
        node,
        requests: Some(request.into_body()),
        inbox: Inbox::default(),
        running: FuturesUnordered::new(),
        outbox: VecDeque::new(),
        leave: Box::pin(leave.cancelled_owned()),
        end: Some(Status::new(Code::Ok, "")),
    };
    let mut response = http::Response::new(Body::new(exchange));
    response.headers_mut().insert(http::header::CONTENT_TYPE, tonic::metadata::GRPC_CONTENT_TYPE);
    response
}

/// One router's stream: requests in, answers out in order of completion.
struct Exchange<N> {
    node: N,
    /// None once no more requests are taken.
    requests: Option<Body>,
    inbox: Inbox,
    running: FuturesUnordered<BoxFuture<'static, DispatchResponse>>,
    /// Chunks of answers.
    outbox: VecDeque<Bytes>,
    leave: Pin<Box<WaitForCancellationFutureOwned>>,
    /// How the stream ends; none when it has ended.
    end: Option<Status>,
}

impl<N: Node> Exchange<N> {
    /// Starts what has been asked, until there is nothing more to read now.
    fn read(&mut self, cx: &mut Context<'_>) {
        while let Some(requests) = &mut self.requests {
            let frame = match Pin::new(requests).poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => frame,
                Poll::Ready(Some(Err(error))) => return self.stop(Err(error)),
                Poll::Ready(None) if self.inbox.is_empty() => return self.stop(Ok(())),
                Poll::Ready(None) => {
                    return self.stop(Err(Status::invalid_argument("the stream ends within a message")));
                }
                Poll::Pending => return,
            };
            let Ok(chunk) = frame.into_data() else { continue };
            self.inbox.push(chunk);
            loop {
                match self.inbox.next() {
                    Ok(Some(request)) => self.start(request),
                    Ok(None) => break,
                    Err(status) => return self.stop(Err(status)),
                }
            }
        }
    }

    fn start(&mut self, request: wire::DispatchRequest) {
        let id = request.id;
        let answer = self.node.answer(DispatchRequest::from_wire(request));
        self.running.push(Box::pin(async move { DispatchResponse { id, result: answer.await } }));
    }

    /// Takes no more requests. What a router that broke the protocol still waits for is dropped.
    fn stop(&mut self, outcome: Result<(), Status>) {
        self.requests = None;
        if let Err(status) = outcome {
            tracing::debug!(reason = status.message(), "a router's stream broke");
            self.running.clear();
            self.end = Some(status);
        }
    }
}

// Nothing in it is pinned but `leave`, which is boxed.
impl<N> Unpin for Exchange<N> {}

impl<N: Node> http_body::Body for Exchange<N> {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        loop {
            if let Some(chunk) = this.outbox.pop_front() {
                return Poll::Ready(Some(Ok(Frame::data(chunk))));
            }
            if this.requests.is_some() && this.leave.as_mut().poll(cx).is_ready() {
                this.stop(Ok(()));
            }
            this.read(cx);
            match this.running.poll_next_unpin(cx) {
                Poll::Ready(Some(answer)) => this.outbox.extend(answer.into_chunks()),
                Poll::Ready(None) if this.requests.is_none() => {
                    let Some(status) = this.end.take() else { return Poll::Ready(None) };
                    let mut trailers = http::HeaderMap::new();
                    status.add_header(&mut trailers)?;
                    return Poll::Ready(Some(Ok(Frame::trailers(trailers))));
                }
                Poll::Ready(None) | Poll::Pending => return Poll::Pending,
            }
        }
    }
}
