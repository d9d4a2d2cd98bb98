//! Every server tells a client without any .proto what it offers, in both versions of reflection, and how it is.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;

use futures::{StreamExt as _, stream};
use sirocco_proto::channel;
use sirocco_testkit::cluster::Cluster;
use sirocco_testkit::etcd::Etcd;
use sirocco_testkit::repository;
use tonic_reflection::pb::{v1, v1alpha};

/// The services a server lists, by reflection v1; and the file that describes `symbol`.
async fn reflect_v1(address: &str, symbol: &str) -> (BTreeSet<String>, usize) {
    use v1::server_reflection_request::MessageRequest;
    use v1::server_reflection_response::MessageResponse;
    let request = |message| v1::ServerReflectionRequest { host: String::new(), message_request: Some(message) };
    let requests =
        [MessageRequest::ListServices(String::new()), MessageRequest::FileContainingSymbol(symbol.into())].map(request);
    let mut client =
        v1::server_reflection_client::ServerReflectionClient::new(channel::connect(address).await.unwrap());
    let answers = client.server_reflection_info(stream::iter(requests)).await.unwrap().into_inner();
    let (mut names, mut files) = (BTreeSet::new(), 0);
    for answer in answers.collect::<Vec<_>>().await {
        match answer.unwrap().message_response {
            Some(MessageResponse::ListServicesResponse(list)) => names.extend(list.service.into_iter().map(|s| s.name)),
            Some(MessageResponse::FileDescriptorResponse(file)) => files += file.file_descriptor_proto.len(),
            other => panic!("{other:?}"),
        }
    }
    (names, files)
}

/// The services a server lists, by reflection v1alpha, as older clients ask.
async fn reflect_v1alpha(address: &str) -> BTreeSet<String> {
    use v1alpha::server_reflection_request::MessageRequest;
    use v1alpha::server_reflection_response::MessageResponse;
    let request = v1alpha::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut client =
        v1alpha::server_reflection_client::ServerReflectionClient::new(channel::connect(address).await.unwrap());
    let mut answers = client.server_reflection_info(stream::iter([request])).await.unwrap().into_inner();
    match answers.message().await.unwrap().unwrap().message_response {
        Some(MessageResponse::ListServicesResponse(list)) => list.service.into_iter().map(|s| s.name).collect(),
        other => panic!("{other:?}"),
    }
}

/// What an HTTP server answers to a GET.
fn get(address: &str, path: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[tokio::test(flavor = "multi_thread")]
async fn every_server_describes_itself_and_its_health() {
    let etcd = Etcd::start().unwrap();
    let demo = repository("models/demo");
    let cluster = Cluster::start(&etcd, "services", &demo, std::slice::from_ref(&demo)).unwrap();
    let nodes = [
        (&cluster.routers[0], "sirocco.inference.v1.InferenceService"),
        (&cluster.experts[0], "sirocco.expert.v1.ExpertService"),
        (&cluster.coordinators[0], "sirocco.cluster.v1.ClusterService"),
    ];
    for (node, service) in nodes {
        let (names, files) = reflect_v1(&node.grpc, service).await;
        let expected: BTreeSet<String> = [service, "grpc.health.v1.Health"].map(str::to_owned).into();
        assert!(names.is_superset(&expected), "{}: {names:?}", node.id);
        let others: Vec<&String> =
            names.iter().filter(|name| name.starts_with("sirocco.") && *name != service).collect();
        let reports = if node.id == "coordinator-0" { vec!["sirocco.cluster.v1.LoadService"] } else { vec![] };
        assert_eq!(others, reports, "{}", node.id);
        assert_eq!(files, 1);
        assert!(reflect_v1alpha(&node.grpc).await.is_superset(&expected));

        assert!(get(&node.http, "/live").starts_with("HTTP/1.1 200"));
        assert!(get(&node.http, "/ready").starts_with("HTTP/1.1 200"), "{}", get(&node.http, "/ready"));
        assert!(get(&node.http, "/health").contains(&format!("\"id\":\"{}\"", node.id)));
    }
}

/// A request whose stop string is raw bytes, as a careless client may send it.
#[derive(Clone, PartialEq, prost::Message)]
struct RawRequest {
    #[prost(string, tag = "2")]
    text: String,
    #[prost(bytes = "vec", repeated, tag = "6")]
    stop: Vec<Vec<u8>>,
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_string_that_is_not_utf8_is_refused_by_name() {
    let etcd = Etcd::start().unwrap();
    let demo = repository("models/demo");
    let cluster = Cluster::start(&etcd, "raw", &demo, std::slice::from_ref(&demo)).unwrap();
    let mut client = tonic::client::Grpc::new(channel::connect(&cluster.routers[0].grpc).await.unwrap());
    client.ready().await.unwrap();
    let request = RawRequest { text: "x".into(), stop: vec![vec![0xff, 0xfe]] };
    let path = "/sirocco.inference.v1.InferenceService/Generate".parse().unwrap();
    let codec = sirocco_proto::codec::Codec::<RawRequest, sirocco_proto::wire::inference::GenerateResponse>::default();
    let status = client.server_streaming(tonic::Request::new(request), path, codec).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::InvalidArgument);
    assert!(status.message().contains("stop") && status.message().contains("UTF-8"), "{status}");
}
