//! Processes of a later version, which send fields that ours do not know: a client, an expert node, and records in the store.
//!
//! The later node is ours behind a relay that adds a field to every message, both ways, as gRPC carries them.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use futures::StreamExt as _;
use futures::stream::BoxStream;
use prost::Message as _;
use prost::bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use prost::encoding::{WireType, encode_key, encode_varint};
use sirocco_proto::channel::{self, MAX_MESSAGE_BYTES};
use sirocco_proto::wire::inference::generate_response::Event;
use sirocco_proto::wire::inference::{GenerateRequest, GenerateResponse};
use sirocco_testkit::etcd::ctl;
use tokio::task::JoinSet;
use tonic::body::Body;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::codegen::Service;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::codegen::http::{Request as HttpRequest, Response as HttpResponse};
use tonic::server::{NamedService, StreamingService};
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status, Streaming};

use super::figure::Figure;
use super::rows::{Form, unharmed};
use super::scene::Scene;
use crate::support::{goldens, greedy};

/// A field that no message of ours has.
const UNKNOWN: u32 = 15_000;

type Future<T> = Pin<Box<dyn std::future::Future<Output = T> + Send>>;

/// A client, an expert node and a node's record of a later version.
pub(super) async fn mixed(scene: &mut Scene, index: usize, form: Form) -> Vec<Figure> {
    let fault = "mixed versions";
    let node = &scene.cluster.experts[index];
    let relayed = Arc::<AtomicUsize>::default();
    let mut relay = JoinSet::new();
    let incoming = TcpIncoming::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = incoming.local_addr().unwrap();
    let later = Later { node: node.grpc.clone(), relayed: Arc::clone(&relayed) };
    relay.spawn(tonic::transport::Server::builder().add_service(later).serve_with_incoming(incoming));
    let link = scene.rig.network.link(&node.id);
    let (ours, id) = (node.grpc.parse().unwrap(), node.id.clone());

    let change = async |scene: &mut Scene| {
        link.lead("grpc", address).unwrap();
        link.reset();
        for kind in ["members/expert", "holdings"] {
            add_unknown_key(&scene.etcd.endpoints(), &format!("/sirocco/{}/{kind}/{id}", scene.name));
        }
        for golden in goldens() {
            let request = greedy(&golden.prompt, golden.greedy_ids.len() as u32);
            let router = &scene.cluster.routers[0].grpc;
            assert_eq!(generate_with_unknown(router, &request).await, golden.greedy_ids);
        }
        scene.rest().await;
    };
    let seen = scene.suffer(form.watch, change).await;
    link.lead("grpc", ours).unwrap();
    link.reset();
    let mut figures = unharmed(fault, &seen);
    let relayed = relayed.load(Ordering::Relaxed) as f64;
    figures.push(Figure::new(&format!("{fault}: with unknown fields"), relayed, "messages").at_least(1.0));
    figures
}

/// Adds a key to the record under `key`, as a later version would have written it, and leaves its lease.
fn add_unknown_key(endpoints: &str, key: &str) {
    let value = ctl::etcdctl(endpoints, &["get", "--print-value-only", key]).unwrap();
    let mut record: serde_json::Value = serde_json::from_str(value.trim()).unwrap();
    record["of_a_later_version"] = serde_json::json!({"any": ["thing"]});
    ctl::etcdctl(endpoints, &["put", "--ignore-lease", key, &record.to_string()]).unwrap();
}

/// The ids of `router`'s completion of `request`, which is sent with a field that it does not know.
async fn generate_with_unknown(router: &str, request: &GenerateRequest) -> Vec<u32> {
    let mut client = tonic::client::Grpc::new(channel::connect(router).await.unwrap());
    client.ready().await.unwrap();
    let message = with_unknown(&request.encode_to_vec());
    let path = PathAndQuery::from_static("/sirocco.inference.v1.InferenceService/Generate");
    let mut events = client.server_streaming(Request::new(message), path, Raw).await.unwrap().into_inner();
    let mut ids = Vec::new();
    while let Some(event) = events.message().await.unwrap() {
        if let Some(Event::Token(token)) = GenerateResponse::decode(event).unwrap().event {
            ids.push(token.id);
        }
    }
    ids
}

/// `message` and a field that nobody knows.
fn with_unknown(message: &[u8]) -> Bytes {
    let mut longer = BytesMut::from(message);
    encode_key(UNKNOWN, WireType::Varint, &mut longer);
    encode_varint(7, &mut longer);
    longer.freeze()
}

/// Relays calls to an expert node.
#[derive(Clone)]
struct Later {
    node: String,
    /// Messages, both ways.
    relayed: Arc<AtomicUsize>,
}

impl NamedService for Later {
    const NAME: &'static str = "sirocco.expert.v1.ExpertService";
}

impl Service<HttpRequest<Body>> for Later {
    type Response = HttpResponse<Body>;
    type Error = Infallible;
    type Future = Future<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: HttpRequest<Body>) -> Self::Future {
        let path = request.uri().path_and_query().cloned().unwrap();
        let call = Call { later: self.clone(), path };
        Box::pin(async move {
            let server = tonic::server::Grpc::new(Raw);
            let mut server = server.max_decoding_message_size(MAX_MESSAGE_BYTES);
            Ok(server.streaming(call, request).await)
        })
    }
}

/// One call that is relayed.
struct Call {
    later: Later,
    path: PathAndQuery,
}

impl StreamingService<Bytes> for Call {
    type Response = Bytes;
    type ResponseStream = BoxStream<'static, Result<Bytes, Status>>;
    type Future = Future<Result<Response<Self::ResponseStream>, Status>>;

    fn call(&mut self, request: Request<Streaming<Bytes>>) -> Self::Future {
        let (Later { node, relayed }, path) = (self.later.clone(), self.path.clone());
        Box::pin(async move {
            let channel = channel::connect(&node).await.map_err(|error| Status::unavailable(error.to_string()))?;
            let client = tonic::client::Grpc::new(channel);
            let mut client = client.max_decoding_message_size(MAX_MESSAGE_BYTES);
            client.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
            let note = move |message: Bytes| {
                relayed.fetch_add(1, Ordering::Relaxed);
                with_unknown(&message)
            };
            let noted = note.clone();
            // A router that goes away ends its stream with an error, which ends the relayed one.
            let forth = request.into_inner().take_while(|message| std::future::ready(message.is_ok()));
            let forth = forth.filter_map(move |message| std::future::ready(message.ok().map(&noted)));
            let back = client.streaming(Request::new(forth), path, Raw).await?.into_inner();
            Ok(Response::new(back.map(move |message| message.map(&note)).boxed()))
        })
    }
}

/// Messages as the bytes that they are.
#[derive(Clone, Copy)]
struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        *self
    }

    fn decoder(&mut self) -> Self {
        *self
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, message: Bytes, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put(message);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(buffer.copy_to_bytes(buffer.remaining())))
    }
}
