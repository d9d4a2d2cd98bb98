//! How a gRPC connection is made: one place for timeouts, windows and frame sizes.

use std::time::Duration;

use tonic::transport::{Channel, Endpoint};

/// Largest message either side takes. A layer's rows of a large prefill must fit.
pub const MAX_MESSAGE_BYTES: usize = 512 << 20;

/// Largest HTTP/2 frame: fewer, larger frames cost less per byte.
pub(crate) const MAX_FRAME_BYTES: u32 = 1 << 20;

/// The same between nodes, the most there can be: rows that arrive in one frame are used where they arrived.
pub(crate) const MAX_ROWS_FRAME_BYTES: u32 = (1 << 24) - 1;

/// Calls that a connection may have under way; what is over waits at the peer.
pub(crate) const MAX_STREAMS: u32 = 1024;

/// The same of a router at an expert node, each with a message of up to [`MAX_MESSAGE_BYTES`] on its way. A router needs one.
pub(crate) const MAX_ROWS_STREAMS: u32 = 16;

/// Bytes a peer may send before it waits for us.
pub(crate) const WINDOW_BYTES: u32 = 16 << 20;

/// How often a silent connection is asked whether it lives, and how long it may take to answer.
pub(crate) const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(5));

/// How long a connection may take to come about.
pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// A channel to `address` (`host:port` or an `http://` URL) that connects when first used and again after a failure.
///
/// Errors when `address` is no address.
pub fn lazy(address: &str) -> Result<Channel, tonic::transport::Error> {
    Ok(endpoint(address)?.connect_lazy())
}

/// A channel to `address` (`host:port` or an `http://` URL), connected.
///
/// Errors when `address` is no address or nothing answers there.
pub async fn connect(address: &str) -> Result<Channel, tonic::transport::Error> {
    endpoint(address)?.connect().await
}

fn endpoint(address: &str) -> Result<Endpoint, tonic::transport::Error> {
    let url = if address.contains("://") { address.to_owned() } else { format!("http://{address}") };
    let (interval, timeout) = KEEPALIVE;
    Ok(Endpoint::from_shared(url)?
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .max_frame_size(MAX_FRAME_BYTES)
        .http2_keep_alive_interval(interval)
        .keep_alive_timeout(timeout)
        .keep_alive_while_idle(true))
}
