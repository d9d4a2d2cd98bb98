//! Follows the file of keys: reads it every two seconds and at SIGHUP. A file that cannot be used changes nothing.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use super::keys::{self, KeysError};
use super::{Following, Known, known};

const EVERY: Duration = Duration::from_secs(2);

/// Why there are no keys to begin with.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The file cannot be read.
    #[error("--api-keys: {path}: {error}")]
    Read {
        /// The file.
        path: String,
        /// Why.
        error: std::io::Error,
    },
    /// What is in it is wrong.
    #[error("--api-keys: {path}: {error}")]
    Keys {
        /// The file.
        path: String,
        /// What, and where.
        error: KeysError,
    },
}

/// Keeps the callers in step with the file.
#[derive(Debug)]
pub(crate) struct Reload {
    path: PathBuf,
    /// What was read last, good or bad.
    last: Result<String, String>,
    known: watch::Sender<Arc<Vec<Known>>>,
    hangup: Signal,
}

impl Reload {
    /// Reads the file for the first time. Must be called within a tokio runtime.
    pub(super) fn open(path: &Path) -> Result<(Self, Following), OpenError> {
        let shown = || path.display().to_string();
        let unread = |error| OpenError::Read { path: shown(), error };
        let text = std::fs::read_to_string(path).map_err(unread)?;
        let entries = keys::parse(&text).map_err(|error| OpenError::Keys { path: shown(), error })?;
        tracing::info!(path = %path.display(), keys = entries.len(), "only callers with an API key are served");
        let (sender, receiver) = watch::channel(Arc::new(known(entries, &[])));
        let hangup = signal(SignalKind::hangup()).map_err(unread)?;
        Ok((Self { path: path.to_owned(), last: Ok(text), known: sender, hangup }, receiver))
    }

    /// Follows the file until `shutdown`.
    pub(crate) async fn run(mut self, shutdown: CancellationToken) {
        let mut ticks = tokio::time::interval(EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                _ = ticks.tick() => {}
                _ = self.hangup.recv() => {}
            }
            let read = tokio::fs::read_to_string(&self.path).await.map_err(|error| error.to_string());
            self.take(read);
        }
    }

    fn take(&mut self, read: Result<String, String>) {
        if read == self.last {
            return;
        }
        let path = self.path.display();
        let entries = match &read {
            Ok(text) => keys::parse(text).map_err(|error| error.to_string()),
            Err(error) => Err(error.clone()),
        };
        match entries {
            Ok(entries) => {
                tracing::info!(%path, keys = entries.len(), "the API keys were read again");
                self.known.send_modify(|now| *now = Arc::new(known(entries, now)));
            }
            Err(error) => tracing::error!(%path, error, "the API keys cannot be used, those read before stay valid"),
        }
        self.last = read;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_broken_file_changes_nothing_and_a_good_one_everything() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let entry = |name: &str| format!("[[key]]\nname = \"{name}\"\nhash = \"sha256:{}\"\n", "0".repeat(64));
        std::fs::write(file.path(), entry("ada")).unwrap();
        let (mut reload, known) = Reload::open(file.path()).unwrap();
        let names = || known.borrow().iter().map(|known| known.entry.name.clone()).collect::<Vec<_>>();
        for (read, expected) in [
            (Ok("[[key]]".to_owned()), ["ada"].as_slice()),
            (Err("it is gone".to_owned()), &["ada"]),
            (Ok(entry("bob")), &["bob"]),
            (Ok(String::new()), &[]),
        ] {
            reload.take(read);
            assert_eq!(names(), expected);
        }
    }

    #[tokio::test]
    async fn a_router_does_not_start_with_a_broken_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "[[key]]\nname = \"ada\"\nhash = 5").unwrap();
        let error = Reload::open(file.path()).unwrap_err().to_string();
        assert!(error.contains("--api-keys: ") && error.contains("line 3, hash"), "{error}");
        assert!(Reload::open(Path::new("/nonexistent")).unwrap_err().to_string().contains("/nonexistent"));
    }
}
