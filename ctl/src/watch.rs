//! `--watch`: the same question again and again, its answer on a cleared screen or one document after the other.

use std::io::{ErrorKind, Write as _};
use std::time::Duration;

use anyhow::Result;
use tokio_util::sync::CancellationToken;

use crate::output::{self, Format};
use crate::terminal;

/// Moves to the upper left corner and clears all below it.
const CLEAR: &str = "\x1b[H\x1b[J";

/// Whether and how often an answer is shown again.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Watch {
    /// Show it again every so many seconds until Ctrl-C; every 2 when no number follows
    #[arg(long, env = "SIROCCO_WATCH", value_name = "SECONDS", num_args = 0..=1, default_missing_value = "2", value_parser = seconds)]
    watch: Option<Duration>,
}

impl Watch {
    /// Shows what `view` gives: once, or until `shutdown` when it is to be watched.
    pub(crate) async fn show(
        &self,
        format: Format,
        shutdown: &CancellationToken,
        view: impl AsyncFn() -> Result<String>,
    ) -> Result<()> {
        match self.watch {
            Some(every) => repeat(every, format, shutdown, view).await,
            None => output::print(&view().await?),
        }
    }
}

/// Shows what `view` gives every so often, until `shutdown` or until nobody reads it.
///
/// The first answer must come; later on a cluster that does not answer is shown as such and asked again.
pub(crate) async fn repeat(
    every: Duration,
    format: Format,
    shutdown: &CancellationToken,
    view: impl AsyncFn() -> Result<String>,
) -> Result<()> {
    let Some(first) = shutdown.run_until_cancelled(view()).await else {
        return Ok(());
    };
    let mut answer = first?;
    let mut screen = Screen { every, format, shown: false };
    let mut problem = None;
    loop {
        match screen.show(&answer, problem.as_ref()) {
            Err(error) if error.kind() == ErrorKind::BrokenPipe => return Ok(()),
            result => result?,
        }
        let next = async {
            tokio::time::sleep(every).await;
            view().await
        };
        match shutdown.run_until_cancelled(next).await {
            None => return Ok(()),
            Some(Ok(text)) => (answer, problem) = (text, None),
            Some(Err(error)) => problem = Some(error),
        }
    }
}

/// Where answers are shown.
struct Screen {
    every: Duration,
    format: Format,
    /// Something has been.
    shown: bool,
}

impl Screen {
    /// Shows the latest `answer`, and the `problem` that keeps a newer one away.
    fn show(&mut self, answer: &str, problem: Option<&anyhow::Error>) -> std::io::Result<()> {
        let height = terminal::height().filter(|_| matches!(self.format, Format::Table | Format::Wide));
        if let Some(height) = height {
            let first = match problem {
                Some(error) => format!("sirocco: {error:#}; what follows is older"),
                None => format!("every {} s, Ctrl-C ends", self.every.as_secs_f64()),
            };
            // The line below the last one stays free, because writing there would scroll the first one away.
            let lines: Vec<&str> = answer.lines().take(height.saturating_sub(3)).collect();
            let mut stdout = std::io::stdout();
            write!(stdout, "{CLEAR}{first}\n\n{}\n", lines.join("\n"))?;
            return stdout.flush();
        }
        if let Some(error) = problem {
            eprintln!("sirocco: {error:#}");
            return Ok(());
        }
        let separator = match self.format {
            Format::Yaml if self.shown => "---\n",
            Format::Table | Format::Wide if self.shown => "\n",
            _ => "",
        };
        self.shown = true;
        writeln!(std::io::stdout(), "{separator}{answer}")
    }
}

/// A number of seconds, from 0.1 to 3600.
pub(crate) fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|error: std::num::ParseFloatError| error.to_string())?;
    if !(0.1..=3600.0).contains(&seconds) {
        return Err("must be from 0.1 to 3600".to_owned());
    }
    Ok(Duration::from_secs_f64(seconds))
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use anyhow::bail;

    use super::*;

    const SOON: Duration = Duration::from_millis(1);

    #[tokio::test]
    async fn watching_goes_on_after_a_failure_and_ends_well_when_asked_to() {
        let (asked, shutdown) = (Cell::new(0), CancellationToken::new());
        let view = async || {
            asked.set(asked.get() + 1);
            match asked.get() {
                2 => bail!("it is away"),
                4 => {
                    shutdown.cancel();
                    std::future::pending().await
                }
                number => Ok(format!("answer {number}")),
            }
        };
        repeat(SOON, Format::Json, &shutdown, view).await.unwrap();
        assert_eq!(asked.get(), 4);
    }

    #[tokio::test]
    async fn a_question_that_fails_at_first_is_not_repeated() {
        let view = async || bail!("no such place");
        let error = repeat(SOON, Format::Table, &CancellationToken::new(), view).await.unwrap_err();
        assert_eq!(error.to_string(), "no such place");
    }

    #[test]
    fn seconds_are_checked() {
        assert_eq!(seconds("0.5"), Ok(Duration::from_millis(500)));
        for text in ["0", "-1", "nan", "1e9", "soon", ""] {
            assert!(seconds(text).is_err(), "{text}");
        }
    }
}
