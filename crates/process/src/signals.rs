//! The signals that end a process: the first asks it to drain, the second ends it at once.

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Ctrl-C and SIGTERM, listened to from the moment this is made.
#[derive(Debug)]
pub struct Shutdown {
    interrupt: Signal,
    terminate: Signal,
}

impl Shutdown {
    /// Takes over both signals. Must be called within a tokio runtime.
    pub fn listen() -> std::io::Result<Self> {
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    /// Runs `life` to its end; `token` is cancelled at the first signal, the process exits at a second one.
    pub async fn drive<T>(mut self, token: &CancellationToken, life: impl Future<Output = T>) -> T {
        tokio::pin!(life);
        loop {
            tokio::select! {
                result = &mut life => return result,
                name = self.received() => {
                    if token.is_cancelled() {
                        tracing::warn!(signal = name, "second signal, exiting at once");
                        std::process::exit(if name == "SIGINT" { 130 } else { 143 });
                    }
                    tracing::info!(signal = name, "draining; a second signal exits at once");
                    token.cancel();
                }
            }
        }
    }

    async fn received(&mut self) -> &'static str {
        tokio::select! {
            _ = self.interrupt.recv() => "SIGINT",
            _ = self.terminate.recv() => "SIGTERM",
        }
    }
}
