//! A line on the terminal that says how loading goes. Nothing is written when standard error is no terminal.

use std::io::{IsTerminal as _, Write as _};
use std::time::Instant;

/// The progress of one round of loading.
#[derive(Debug)]
pub(crate) struct Progress {
    visible: bool,
    started: Instant,
    experts: (usize, usize),
    bytes: (u64, u64),
}

impl Progress {
    /// A round of `experts` experts, `bytes` in all.
    pub(crate) fn start(wanted: bool, experts: usize, bytes: u64) -> Self {
        let visible = wanted && std::io::stderr().is_terminal();
        Self { visible, started: Instant::now(), experts: (0, experts), bytes: (0, bytes) }
    }

    /// One more expert of `bytes` is loaded.
    pub(crate) fn step(&mut self, bytes: u64) {
        self.experts.0 += 1;
        self.bytes.0 += bytes;
        if self.visible {
            // A terminal that cannot be written to has nobody to inform.
            let _ = write!(std::io::stderr(), "\r\x1b[2K{}", self.line());
        }
    }

    /// Ends the line and logs the round.
    pub(crate) fn finish(self) {
        if self.visible {
            let _ = writeln!(std::io::stderr());
        }
        let seconds = self.started.elapsed().as_secs_f64();
        tracing::info!(experts = self.experts.0, bytes = self.bytes.0, seconds, "experts loaded");
    }

    fn line(&self) -> String {
        let seconds = self.started.elapsed().as_secs_f64().max(1e-3);
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        let rate = self.bytes.0 as f64 / seconds;
        let left = (self.bytes.1 - self.bytes.0) as f64 / rate.max(1.0);
        format!(
            "experts {}/{}, {:.1} of {:.1} MiB, {:.0} MiB/s, {left:.0} s left",
            self.experts.0,
            self.experts.1,
            mib(self.bytes.0),
            mib(self.bytes.1),
            rate / f64::from(1 << 20),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_says_how_far_how_fast_and_how_long() {
        let mut progress = Progress::start(false, 4, 4 << 20);
        progress.step(1 << 20);
        assert!(progress.line().starts_with("experts 1/4, 1.0 of 4.0 MiB, "), "{}", progress.line());
        assert!(progress.line().ends_with(" s left"));
    }
}
