//! A plain HTTP client: one connection for each request, whole answers and server-sent events.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;

use serde_json::Value;
use sirocco_testkit::cluster::Node;
use sirocco_testkit::process::Process;
use sirocco_testkit::{PATIENCE, wait_for};

use crate::commands::up;

/// A cluster in one process: the process, the router's gRPC and HTTP addresses.
pub(crate) fn cluster(args: &[&str]) -> (Process, String, String) {
    let (process, grpc, _) = up(&[&["--expert-nodes", "2"], args].concat());
    let stdout = process.stdout();
    let line = stdout.lines().find_map(|line| line.strip_prefix("curl http://")).unwrap();
    let http = line.split('/').next().unwrap().to_owned();
    (process, grpc, http)
}

/// An answer whose head has been read.
pub(crate) struct Answer {
    pub(crate) status: u16,
    head: String,
    stream: BufReader<TcpStream>,
}

/// Sends `body` to `path`; `headers` are whole lines.
pub(crate) fn send(address: &str, method: &str, path: &str, headers: &str, body: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let length = body.len();
    write!(stream, "{method} {path} HTTP/1.0\r\nhost: {address}\r\ncontent-length: {length}\r\n{headers}\r\n").unwrap();
    stream.write_all(body).unwrap();
    stream
}

/// Posts JSON.
pub(crate) fn post(address: &str, path: &str, body: &Value) -> Answer {
    Answer::of(send(address, "POST", path, "content-type: application/json\r\n", body.to_string().as_bytes()))
}

/// Posts JSON and takes the JSON of an answer that must be good.
pub(crate) fn ask(address: &str, path: &str, body: &Value) -> Value {
    let answer = post(address, path, body);
    let (status, text) = (answer.status, answer.text());
    assert_eq!(status, 200, "{text}");
    serde_json::from_str(&text).unwrap()
}

impl Answer {
    /// Reads the head of the answer that comes on `stream`.
    pub(crate) fn of(stream: TcpStream) -> Self {
        let mut stream = BufReader::new(stream);
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            assert_ne!(stream.read_line(&mut head).unwrap(), 0, "no answer: {head:?}");
        }
        Self { status: head["HTTP/1.0 ".len()..][..3].parse().unwrap(), head, stream }
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let values = self.head.lines().filter_map(|line| line.split_once(": "));
        values.into_iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    }

    /// The rest of the answer.
    pub(crate) fn text(mut self) -> String {
        let mut text = String::new();
        self.stream.read_to_string(&mut text).unwrap();
        text
    }

    pub(crate) fn json(self) -> Value {
        let text = self.text();
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
    }

    /// The data of the next event; none at the end.
    pub(crate) fn event(&mut self) -> Option<String> {
        loop {
            let mut line = String::new();
            if self.stream.read_line(&mut line).unwrap() == 0 {
                return None;
            }
            if let Some(data) = line.strip_prefix("data: ") {
                return Some(data.trim_end_matches('\n').to_owned());
            }
        }
    }

    /// All pieces of a stream that must end well.
    pub(crate) fn pieces(mut self) -> Vec<Value> {
        assert_eq!(self.header("content-type"), Some("text/event-stream"));
        let mut events: Vec<String> = std::iter::from_fn(|| self.event()).collect();
        assert_eq!(events.pop().as_deref(), Some("[DONE]"));
        events.iter().map(|event| serde_json::from_str(event).unwrap()).collect()
    }
}

/// The value of `metric`, as its name and labels stand on the page.
pub(crate) fn metric(http: &str, metric: &str) -> f64 {
    let page = Answer::of(send(http, "GET", "/metrics", "", b"")).text();
    let value = page.lines().find_map(|line| line.strip_prefix(metric)?.strip_prefix(' '));
    value.unwrap_or_else(|| panic!("{metric} is missing:\n{page}")).parse().unwrap()
}

/// Waits until `router` computes nothing and holds no block of its KV cache.
pub(crate) fn until_idle(router: &Node) {
    let busy = [
        "sirocco_router_sequences_running",
        "sirocco_router_sequences_waiting",
        r#"sirocco_router_kv_blocks{state="used"}"#,
    ];
    wait_for("the router to be idle", || Ok(busy.iter().all(|name| metric(&router.http, name) == 0.0).then_some(())))
        .unwrap();
}
