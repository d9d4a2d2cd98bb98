//! The Dispatch stream between our own ends and those that are generated from the `.proto`, over real sockets.

use std::net::SocketAddr;
use std::time::Duration;

use futures::{StreamExt as _, stream};
use sirocco_proto::channel::{self, MAX_MESSAGE_BYTES};
use sirocco_proto::codec::Codec;
use sirocco_proto::expert::{
    Checked, Description, DispatchRequest, ExpertOutputs, ExpertRows, ExpertServer, ExpertServiceClient, Node, Refusal,
    RefusalReason, Stream,
};
use sirocco_proto::server::Services;
use sirocco_proto::wire::expert::expert_service_server::{ExpertService, ExpertServiceServer};
use sirocco_proto::wire::expert::{
    DescribeRequest, DescribeResponse, DispatchResponse, ExpertResult, Status as WireStatus, Tensor,
};
use sirocco_proto::{Rows, wire};
use sirocco_types::{ExpertHoldings, ExpertId, ExpertKey, Fingerprint, LayerId, NodeId};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tonic::{Code, Request, Response, Status, Streaming};

const FINGERPRINT: Fingerprint = Fingerprint([7; 32]);
const PATH: &str = "/sirocco.expert.v1.ExpertService/Dispatch";

/// A node that answers with the rows it was sent, later when it is asked for layer 9.
#[derive(Clone)]
struct Echo {
    /// Told of each request, and of each that is dropped unanswered.
    seen: mpsc::UnboundedSender<&'static str>,
    hold: CancellationToken,
}

/// Tells that it was dropped.
struct Watched(Option<mpsc::UnboundedSender<&'static str>>);

impl Watched {
    fn answered(&mut self) {
        self.0 = None;
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        if let Some(seen) = self.0.take() {
            let _ = seen.send("dropped");
        }
    }
}

impl Node for Echo {
    fn describe(&self) -> Description {
        let held = ExpertKey { layer: LayerId(1), expert: ExpertId(2) };
        let id = NodeId::new("echo").unwrap();
        Description { id, fingerprint: FINGERPRINT, holdings: ExpertHoldings::new([held], 64) }
    }

    fn answer(
        &self,
        request: Result<DispatchRequest, Refusal>,
    ) -> impl Future<Output = Result<ExpertOutputs, Refusal>> + Send + 'static {
        let (hold, mut watched) = (self.hold.clone(), Watched(Some(self.seen.clone())));
        let _ = self.seen.send("asked");
        async move {
            let request = request?;
            if request.layer == LayerId(9) {
                hold.cancelled().await;
            }
            watched.answered();
            let experts = request.experts.into_iter().map(|part| (part.expert, Ok(()))).collect();
            Ok(ExpertOutputs { experts, rows: request.hidden_states })
        }
    }
}

/// The same from generated code.
#[derive(Clone)]
struct GeneratedEcho;

#[tonic::async_trait]
impl ExpertService for GeneratedEcho {
    type DispatchStream = stream::BoxStream<'static, Result<DispatchResponse, Status>>;

    async fn dispatch(
        &self,
        request: Request<Streaming<wire::expert::DispatchRequest>>,
    ) -> Result<Response<Self::DispatchStream>, Status> {
        let answers = request.into_inner().map(|request| {
            let request = request?;
            if request.layer == 9 {
                return Err(Status::data_loss("layer 9 is lost"));
            }
            let result = |part: wire::expert::ExpertRows| ExpertResult {
                expert: part.expert,
                status: WireStatus::Ok.into(),
                ..Default::default()
            };
            let mut response = DispatchResponse {
                id: request.id,
                status: WireStatus::Ok.into(),
                experts: request.experts.into_iter().map(result).collect(),
                rows: request.hidden_states,
                ..Default::default()
            };
            response.crc32c = response.checksum();
            Ok(response)
        });
        Ok(Response::new(answers.boxed()))
    }

    async fn describe(&self, _: Request<DescribeRequest>) -> Result<Response<DescribeResponse>, Status> {
        Err(Status::unimplemented("not asked here"))
    }
}

/// A server under test.
struct Server {
    address: String,
    seen: mpsc::UnboundedReceiver<&'static str>,
    leave: CancellationToken,
    hold: CancellationToken,
    _serving: AbortOnDropHandle<()>,
}

impl Server {
    async fn ours() -> Self {
        let (seen, told) = mpsc::unbounded_channel();
        let (leave, hold) = (CancellationToken::new(), CancellationToken::new());
        let node = Echo { seen, hold: hold.clone() };
        let services = Services::default().with(ExpertServer::new(node, leave.clone()));
        Self::serve(services, told, leave, hold).await
    }

    async fn generated() -> Self {
        let service = ExpertServiceServer::new(GeneratedEcho)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        let services = Services::default().with(service);
        Self::serve(services, mpsc::unbounded_channel().1, CancellationToken::new(), CancellationToken::new()).await
    }

    async fn serve(
        services: Services,
        seen: mpsc::UnboundedReceiver<&'static str>,
        leave: CancellationToken,
        hold: CancellationToken,
    ) -> Self {
        let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let serving = services.serve_apart("streams", listener, leave.clone(), Duration::from_mins(1));
        let serving = tokio::spawn(async { serving.await.unwrap() });
        Self { address, seen, leave, hold, _serving: AbortOnDropHandle::new(serving) }
    }
}

/// A request of `rows` rows of 1024, each value another one.
fn request(id: u64, layer: u32, rows: usize) -> DispatchRequest {
    DispatchRequest {
        id,
        fingerprint: FINGERPRINT,
        layer: LayerId(layer),
        deadline: Some(Duration::from_mins(1)),
        hidden_states: Rows::new((0..rows * 1024).map(|value| value as f32).collect(), 1024),
        experts: vec![ExpertRows { expert: ExpertId(3), rows: (0..rows as u32).collect() }],
    }
}

/// What a node answers to [`request`].
fn echoed(rows: usize) -> ExpertOutputs {
    ExpertOutputs { experts: vec![(ExpertId(3), Ok(()))], rows: request(0, 0, rows).hidden_states }
}

/// Sends messages of many sizes, beyond a frame and beyond a window, and compares what comes back.
async fn talk(address: &str) {
    let mut stream = Stream::open(address).await.unwrap();
    for (id, rows) in [(1, 1), (2, 16), (3, 1024), (4, 6 * 1024), (5, 1)] {
        stream.send(request(id, 1, rows)).unwrap();
        let answer = stream.next().await.unwrap().unwrap();
        assert_eq!(answer.id, id);
        assert!(answer.result == Ok(echoed(rows)), "{rows} rows");
    }
    for id in 6..40 {
        stream.send(request(id, 1, 64)).unwrap();
    }
    for _ in 6..40 {
        assert!(stream.next().await.unwrap().unwrap().result == Ok(echoed(64)));
    }
    stream.close().await;
}

#[tokio::test]
async fn our_stream_talks_to_our_node() {
    talk(&Server::ours().await.address).await;
}

#[tokio::test]
async fn our_stream_talks_to_a_generated_server() {
    let server = Server::generated().await;
    talk(&server.address).await;
    let mut stream = Stream::open(&server.address).await.unwrap();
    stream.send(request(1, 9, 1)).unwrap();
    let broken = stream.next().await.unwrap().unwrap_err();
    assert_eq!(broken.to_string(), "DataLoss: layer 9 is lost");
}

fn wire_request(id: u64, tensor: Option<Tensor>) -> wire::expert::DispatchRequest {
    let mut request = wire::expert::DispatchRequest {
        id,
        model_fingerprint: FINGERPRINT.0.to_vec().into(),
        hidden_states: tensor,
        ..Default::default()
    };
    request.crc32c = request.checksum();
    request
}

#[tokio::test]
async fn a_generated_client_talks_to_our_node() {
    let server = Server::ours().await;
    let mut client = ExpertServiceClient::new(channel::connect(&server.address).await.unwrap());
    let description = client.describe(DescribeRequest {}).await.unwrap().into_inner();
    assert_eq!((description.id.as_str(), description.weight_bytes, description.layers.len()), ("echo", 64, 1));

    let data: Vec<u8> = (0..3 << 20).map(|index| (index % 251) as u8).collect();
    let tensor = Tensor { dtype: 1, shape: vec![3, 1 << 18], crc32c: crc_fast::crc32_iscsi(&data), data: data.into() };
    let requests =
        [wire_request(1, Some(tensor.clone())), wire_request(2, None), wire_request(3, Some(tensor.clone()))];
    let answers = client.dispatch(stream::iter(requests)).await.unwrap().into_inner();
    let answers: Vec<DispatchResponse> = answers.map(Result::unwrap).collect().await;
    let of = |id| answers.iter().find(|answer| answer.id == id).unwrap();
    assert_eq!((answers.len(), of(1).rows.as_ref(), of(3).rows.as_ref()), (3, Some(&tensor), Some(&tensor)));
    assert_eq!(of(2).status(), WireStatus::Invalid);
    assert!(of(2).message.contains("hidden_states: absent"), "{}", of(2).message);
}

/// A request with text where its layer should be.
#[derive(Clone, PartialEq, prost::Message)]
struct Careless {
    #[prost(string, tag = "3")]
    layer: String,
}

/// How a stream of one [`Careless`] request with this encoding ends.
async fn refused(address: &str, encoding: Option<&'static str>) -> Status {
    let mut client = tonic::client::Grpc::new(channel::connect(address).await.unwrap());
    client.ready().await.unwrap();
    let careless = stream::once(async { Careless { layer: "first".into() } });
    let mut request = Request::new(careless.chain(stream::pending()));
    if let Some(encoding) = encoding {
        request.metadata_mut().insert("grpc-encoding", encoding.parse().unwrap());
    }
    let codec = Codec::<Careless, DispatchResponse>::default();
    match client.streaming(request, PATH.parse().unwrap(), codec).await {
        Ok(answers) => answers.into_inner().message().await.unwrap_err(),
        Err(status) => status,
    }
}

#[tokio::test]
async fn bytes_that_are_no_request_are_refused_by_the_fields_name() {
    let status = refused(&Server::ours().await.address, None).await;
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().contains("DispatchRequest.layer"), "{status}");
}

#[tokio::test]
async fn compression_is_refused() {
    let status = refused(&Server::ours().await.address, Some("gzip")).await;
    assert_eq!(status.code(), Code::Unimplemented);
    assert!(status.message().contains("grpc-encoding: \"gzip\""), "{status}");
    assert_eq!(status.metadata().get("grpc-accept-encoding").unwrap(), "identity");
}

#[tokio::test]
async fn a_server_without_the_service_says_so() {
    let (leave, hold) = (CancellationToken::new(), CancellationToken::new());
    let server = Server::serve(Services::default(), mpsc::unbounded_channel().1, leave, hold).await;
    let mut stream = Stream::open(&server.address).await.unwrap();
    let broken = stream.next().await.unwrap().unwrap_err();
    assert!(broken.to_string().starts_with("Unimplemented"), "{broken}");
}

#[tokio::test]
async fn a_node_that_leaves_answers_what_is_under_way_and_takes_nothing_more() {
    let mut server = Server::ours().await;
    let mut stream = Stream::open(&server.address).await.unwrap();
    stream.send(request(1, 9, 1)).unwrap();
    stream.send(request(2, 1, 1)).unwrap();
    assert_eq!(stream.next().await.unwrap().unwrap().id, 2, "in order of completion");
    assert_eq!((server.seen.recv().await, server.seen.recv().await), (Some("asked"), Some("asked")));
    server.leave.cancel();
    let answered = async {
        let answer = stream.next().await.unwrap().unwrap();
        (answer.id, stream.next().await.is_none())
    };
    server.hold.cancel();
    assert_eq!(answered.await, (1, true));
    assert!(server.seen.try_recv().is_err(), "nothing was dropped");
}

#[tokio::test]
async fn a_router_that_leaves_takes_its_requests_back() {
    let mut server = Server::ours().await;
    let mut stream = Stream::open(&server.address).await.unwrap();
    stream.send(request(1, 9, 1)).unwrap();
    let asked = tokio::select! {
        asked = server.seen.recv() => asked,
        _ = stream.next() => None,
    };
    assert_eq!(asked, Some("asked"));
    drop(stream);
    assert_eq!(server.seen.recv().await, Some("dropped"));
}

#[tokio::test]
async fn a_broken_connection_is_noticed_at_once() {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let mut stream = Stream::open(&listener.local_addr().unwrap().to_string()).await.unwrap();
    stream.send(request(1, 1, 1)).unwrap();
    drop(listener.accept().await.unwrap());
    assert!(stream.next().await.unwrap().is_err());
}

#[tokio::test]
async fn a_request_over_the_limit_is_refused_and_the_stream_goes_on() {
    let mut stream = Stream::open(&Server::ours().await.address).await.unwrap();
    let refusal = stream.send(request(1, 1, MAX_MESSAGE_BYTES / 4096)).unwrap_err();
    assert_eq!(refusal.reason, RefusalReason::Invalid);
    assert!(refusal.message.contains("hidden_states") && refusal.message.contains("536870912"), "{refusal}");
    stream.send(request(2, 1, 1)).unwrap();
    assert_eq!(stream.next().await.unwrap().unwrap().id, 2);
}
