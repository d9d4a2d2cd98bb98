//! The router's side of a Dispatch stream: an HTTP/2 connection of its own, without a task of its own.
//!
//! Whoever polls [`Stream::next`] drives all of it: it writes what was sent, reads what has come and keeps the connection
//! alive. So a stream costs no wake-up but the socket's. It never connects again by itself.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use h2::client::{Connection, ResponseFuture};
use h2::{Ping, PingPong, RecvStream, SendStream};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, timeout};
use tonic::codegen::http;
use tonic::{Code, Status};

use super::message::Inbox;
use super::{DISPATCH_PATH, DispatchRequest, DispatchResponse, Refusal, wire};
use crate::channel::{CONNECT_TIMEOUT, KEEPALIVE, MAX_ROWS_FRAME_BYTES, WINDOW_BYTES};
use crate::socket::Socket;

/// Why a stream cannot be used, or not any more.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Broken(String);

/// An open Dispatch stream.
pub struct Stream {
    connection: Connection<Socket, Bytes>,
    requests: SendStream<Bytes>,
    responses: Responses,
    inbox: Inbox,
    keepalive: Keepalive,
}

/// What the node has said so far.
enum Responses {
    /// Nothing.
    Awaited(ResponseFuture),
    /// That it takes requests.
    Open(RecvStream),
}

/// Asks a connection now and then whether it lives.
struct Keepalive {
    pings: PingPong,
    /// How long to wait before the next question, and for its answer.
    waits: (Duration, Duration),
    /// Until the next question, or for its answer.
    timer: Pin<Box<Sleep>>,
    /// How long the answer to the question that was asked may take.
    asked: Option<Duration>,
}

impl std::fmt::Debug for Stream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stream").finish_non_exhaustive()
    }
}

impl Stream {
    /// Connects to the node at `address` (`host:port` or an `http://` URL) and asks for a stream.
    ///
    /// Errors when `address` is no address or nothing that speaks HTTP/2 answers there in time.
    pub async fn open(address: &str) -> Result<Self, Broken> {
        let authority = address.strip_prefix("http://").unwrap_or(address).trim_end_matches('/');
        match timeout(CONNECT_TIMEOUT, Self::connect(authority, KEEPALIVE)).await {
            Ok(stream) => stream,
            Err(_) => Err(Broken(format!("no connection within {} s", CONNECT_TIMEOUT.as_secs()))),
        }
    }

    async fn connect(authority: &str, waits: (Duration, Duration)) -> Result<Self, Broken> {
        let refused = |error: std::io::Error| Broken(format!("tcp connect error: {error}"));
        let broken = |error: h2::Error| Broken(error.to_string());
        let socket = TcpStream::connect(authority).await.and_then(Socket::of_client).map_err(refused)?;
        let mut builder = h2::client::Builder::new();
        builder
            .initial_window_size(WINDOW_BYTES)
            .initial_connection_window_size(WINDOW_BYTES)
            .max_frame_size(MAX_ROWS_FRAME_BYTES)
            .enable_push(false);
        let (mut client, mut connection) = builder.handshake(socket).await.map_err(broken)?;
        let request = http::Request::post(format!("http://{authority}{DISPATCH_PATH}"))
            .version(http::Version::HTTP_2)
            .header(http::header::CONTENT_TYPE, tonic::metadata::GRPC_CONTENT_TYPE)
            .header(http::header::TE, "trailers")
            .header(http::header::USER_AGENT, concat!("sirocco/", env!("CARGO_PKG_VERSION")))
            .body(())
            .map_err(|error| Broken(format!("address {authority:?}: {error}")))?;
        let (response, requests) = client.send_request(request, false).map_err(broken)?;
        let pings = connection.ping_pong().expect("asked for once");
        let keepalive = Keepalive { pings, waits, timer: Box::pin(tokio::time::sleep(waits.0)), asked: None };
        Ok(Self { connection, requests, responses: Responses::Awaited(response), inbox: Inbox::default(), keepalive })
    }

    /// Puts `request` on its way; [`Stream::next`] carries it, and says so when the stream has ended.
    ///
    /// Errors when the request is too large for a message.
    pub fn send(&mut self, request: DispatchRequest) -> Result<(), Refusal> {
        for chunk in request.into_chunks()? {
            // Fails only on a stream that has ended.
            let _ = self.requests.send_data(chunk, false);
        }
        Ok(())
    }

    /// Asks the node at once whether it lives; if it does not answer within `patience`, the stream breaks.
    pub fn probe(&mut self, patience: Duration) {
        self.keepalive.probe(patience);
    }

    /// Tells the node that nothing more will be asked.
    pub async fn close(mut self) {
        let _ = self.requests.send_data(Bytes::new(), true);
        // One look is enough to write it, unless the node does not read; then it sees the connection end.
        poll_fn(|cx| {
            let _ = Pin::new(&mut self.connection).poll(cx);
            Poll::Ready(())
        })
        .await;
    }

    /// The next answer; none once the node has ended the stream as it should. Errors when the stream broke.
    ///
    /// May be dropped and called again. Must be waited for as long as the stream is in use.
    pub async fn next(&mut self) -> Option<Result<DispatchResponse, Broken>> {
        poll_fn(|cx| self.poll_next(cx)).await
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<DispatchResponse, Broken>>> {
        // Reads all that has come and wakes whoever waits for it, which is what is polled next.
        let connection = Pin::new(&mut self.connection).poll(cx);
        if let Poll::Ready(answer) = self.poll_responses(cx) {
            return Poll::Ready(answer.transpose());
        }
        match connection {
            Poll::Ready(Err(error)) => return Poll::Ready(Some(Err(Broken(error.to_string())))),
            Poll::Ready(Ok(())) => return Poll::Ready(Some(Err(Broken(CLOSED.to_owned())))),
            Poll::Pending => {}
        }
        self.keepalive.poll(cx).map(|broken| Some(Err(broken)))
    }

    fn poll_responses(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<DispatchResponse>, Broken>> {
        let broken = |error: h2::Error| Broken(error.to_string());
        loop {
            let next = self.inbox.next::<wire::DispatchResponse>();
            if let Some(response) = next.map_err(|status| Broken(status.message().to_owned()))? {
                return Poll::Ready(Ok(Some(DispatchResponse::from_wire(response))));
            }
            match &mut self.responses {
                Responses::Awaited(response) => {
                    let response = ready!(Pin::new(response).poll(cx)).map_err(broken)?;
                    if response.status() != http::StatusCode::OK {
                        return Poll::Ready(Err(Broken(format!("HTTP status {}", response.status()))));
                    }
                    let (parts, body) = response.into_parts();
                    if let Some(status) = Status::from_header_map(&parts.headers) {
                        return Poll::Ready(ended(&status));
                    }
                    self.responses = Responses::Open(body);
                }
                Responses::Open(body) => {
                    if let Some(chunk) = ready!(body.poll_data(cx)) {
                        let chunk = chunk.map_err(broken)?;
                        // Fails only for more than was received.
                        let _ = body.flow_control().release_capacity(chunk.len());
                        self.inbox.push(chunk);
                        continue;
                    }
                    let trailers = ready!(body.poll_trailers(cx)).map_err(broken)?;
                    let status = trailers.as_ref().and_then(Status::from_header_map);
                    let status = status.unwrap_or_else(|| Status::unknown("the stream ended without a status"));
                    return Poll::Ready(ended(&status));
                }
            }
        }
    }
}

/// What is said of a node that has gone.
const CLOSED: &str = "the node closed it";

fn ended<T>(status: &Status) -> Result<Option<T>, Broken> {
    match status.code() {
        Code::Ok => Ok(None),
        code => Err(Broken(format!("{code:?}: {}", status.message()))),
    }
}

impl Keepalive {
    /// Ready when the connection has not answered in time.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Broken> {
        let (interval, patience) = self.waits;
        loop {
            if self.asked.is_some() && matches!(self.pings.poll_pong(cx), Poll::Ready(Ok(_))) {
                self.asked = None;
                self.restart(interval);
            }
            ready!(self.timer.as_mut().poll(cx));
            if let Some(patience) = self.asked {
                return Poll::Ready(Broken(format!("no sign of life within {patience:?}")));
            }
            if !self.ask(patience) {
                return Poll::Ready(Broken(CLOSED.to_owned()));
            }
        }
    }

    /// Does what is due only later now.
    fn probe(&mut self, patience: Duration) {
        match self.asked {
            None => drop(self.ask(patience)),
            Some(granted) if granted > patience => {
                self.asked = Some(patience);
                self.restart(patience);
            }
            Some(_) => {}
        }
    }

    /// Asks, unless the connection has ended.
    fn ask(&mut self, patience: Duration) -> bool {
        let sent = self.pings.send_ping(Ping::opaque()).is_ok();
        if sent {
            self.asked = Some(patience);
            self.restart(patience);
        }
        sent
    }

    fn restart(&mut self, wait: Duration) {
        self.timer.as_mut().reset(Instant::now() + wait);
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn a_node_that_says_nothing_is_given_up() {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let wait = Duration::from_millis(20);
        let mut stream = Stream::connect(&address, (wait, wait)).await.unwrap();
        let silent = listener.accept().await.unwrap();
        let broken = stream.next().await.unwrap().unwrap_err();
        assert_eq!(broken.to_string(), "no sign of life within 20ms");
        drop(silent);
    }

    #[tokio::test]
    async fn a_node_that_is_asked_at_once_is_given_up_as_soon_as_it_may_be() {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let hour = Duration::from_hours(1);
        for waits in [(hour, hour), (Duration::from_millis(1), hour)] {
            let mut stream = Stream::connect(&address, waits).await.unwrap();
            let silent = listener.accept().await.unwrap();
            let quiet = timeout(Duration::from_millis(30), stream.next()).await;
            assert!(quiet.is_err(), "by now the second has asked, and would wait for an hour");
            stream.probe(Duration::from_millis(20));
            let broken = stream.next().await.unwrap().unwrap_err();
            assert_eq!(broken.to_string(), "no sign of life within 20ms");
            drop(silent);
        }
    }
}
