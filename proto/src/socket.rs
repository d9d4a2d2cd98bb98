//! A TCP socket that stays awake for what comes soon.
//!
//! Waking a thread costs tens of microseconds, as much as a small message takes to cross the network, so that it does not pay to
//! sleep for less. A socket stays awake while a frame of HTTP/2 is arriving, whose rest is on its way, and between frames when it
//! did not wait long for the last one, as in a hop without much to compute. It sleeps as any socket does once nothing came for
//! [`PATIENCE`], and between frames when somebody else wanted its core. One that is idle never wakes up by itself.

use std::io::{self, IoSlice};
use std::pin::{Pin, pin};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tonic::transport::server::{Connected, TcpConnectInfo};

/// How long a socket stays awake at most.
const PATIENCE: Duration = Duration::from_micros(200);

/// Longer than offering the core to others takes when nobody wants it.
const WANTED: Duration = Duration::from_micros(5);

/// What a client says first.
const PREFACE_BYTES: usize = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".len();

/// A socket with HTTP/2 on it.
#[derive(Debug)]
pub(crate) struct Socket {
    inner: TcpStream,
    arriving: Frames,
    /// Since when nothing has come, nor been written.
    quiet: Option<Instant>,
    /// How long it was quiet before the last frame.
    pause: Duration,
}

impl Socket {
    /// The client's end of a new connection.
    ///
    /// Errors as the system does when the socket is not connected any more.
    pub(crate) fn of_client(inner: TcpStream) -> io::Result<Self> {
        Self::new(inner, 0)
    }

    /// The server's end.
    ///
    /// Errors as the system does when the socket is not connected any more.
    pub(crate) fn of_server(inner: TcpStream) -> io::Result<Self> {
        Self::new(inner, PREFACE_BYTES)
    }

    fn new(inner: TcpStream, preface: usize) -> io::Result<Self> {
        inner.set_nodelay(true)?;
        Ok(Self {
            inner,
            arriving: Frames { payload: preface, header: [0; HEADER_BYTES], read: 0 },
            quiet: None,
            pause: Duration::MAX,
        })
    }
}

impl Socket {
    /// Waits for what will be said to what is written now.
    fn begin_waiting(&mut self, cx: &mut Context<'_>) {
        self.quiet = Some(Instant::now());
        if self.pause < PATIENCE {
            look_again(cx);
        }
    }
}

/// Has the runtime look at its sockets and then come back to the task.
fn look_again(cx: &mut Context<'_>) {
    // It comes back although the future is dropped.
    let _ = pin!(tokio::task::yield_now()).poll(cx);
}

impl AsyncRead for Socket {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let result = Pin::new(&mut self.inner).poll_read(cx, buf);
        let within = self.arriving.within();
        if result.is_ready() {
            if let Some(since) = self.quiet.take().filter(|_| !within) {
                self.pause = since.elapsed();
            }
            self.arriving.pass(&buf.filled()[before..]);
            return result;
        }
        let quiet = self.quiet.get_or_insert_with(Instant::now).elapsed();
        if quiet < PATIENCE && (within || self.pause < PATIENCE) {
            let offered = Instant::now();
            std::thread::yield_now();
            if offered.elapsed() > WANTED {
                self.pause = Duration::MAX;
            }
            if within || self.pause < PATIENCE {
                look_again(cx);
            }
        }
        result
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.begin_waiting(cx);
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.begin_waiting(cx);
        Pin::new(&mut self.inner).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

impl Connected for Socket {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        self.inner.connect_info()
    }
}

/// Bytes before a frame's payload, of which the first three are its length. Source: RFC 9113, section 4.1.
const HEADER_BYTES: usize = 9;

/// Where in a sequence of frames the bytes that have come so far end.
#[derive(Debug)]
struct Frames {
    /// Bytes of a payload that are still to come.
    payload: usize,
    header: [u8; HEADER_BYTES],
    /// Bytes of `header` that have come.
    read: usize,
}

impl Frames {
    /// Whether a frame has begun and is not complete.
    fn within(&self) -> bool {
        self.payload > 0 || self.read > 0
    }

    fn pass(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let payload = self.payload.min(bytes.len());
            self.payload -= payload;
            bytes = &bytes[payload..];
            let header = bytes.len().min(HEADER_BYTES - self.read);
            self.header[self.read..][..header].copy_from_slice(&bytes[..header]);
            bytes = &bytes[header..];
            self.read += header;
            if self.read == HEADER_BYTES {
                let [high, middle, low, ..] = self.header;
                self.payload = u32::from_be_bytes([0, high, middle, low]) as usize;
                self.read = 0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_each_frame_is_known_however_it_is_cut() {
        let frame = |payload: usize| [&(payload as u32).to_be_bytes()[1..], &[0; 6], &vec![7; payload]].concat();
        let frames = [0, 1, 70_000, 0, 300].map(frame);
        for piece in [1, 2, 8, 9, 10, 4096, usize::MAX] {
            let mut arriving = Frames { payload: PREFACE_BYTES, header: [0; HEADER_BYTES], read: 0 };
            assert!(arriving.within());
            arriving.pass(&[b'P'; PREFACE_BYTES]);
            for frame in &frames {
                assert!(!arriving.within(), "pieces of {piece}");
                for (index, bytes) in frame.chunks(piece).enumerate() {
                    assert_eq!(arriving.within(), index > 0, "pieces of {piece}");
                    arriving.pass(bytes);
                }
            }
            arriving.pass(&frames.concat());
            assert!(!arriving.within());
        }
    }
}
