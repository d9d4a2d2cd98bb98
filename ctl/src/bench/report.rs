//! What a run's outcomes amount to.

use std::time::Duration;

use serde::Serialize;

use super::load::{End, Outcome};
use crate::output;

/// A run in figures.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    completed: usize,
    /// Because the router had too much to do.
    refused: usize,
    failed: usize,
    /// While requests were sent: what came after that does not count.
    tokens_per_s: f64,
    requests_per_s: f64,
    /// From sending to the first token.
    first_token_ms: Spread,
    /// Between two tokens of a completion.
    inter_token_ms: Spread,
    /// From sending to the end of a completion.
    total_ms: Spread,
    /// From sending to being refused.
    refusal_ms: Spread,
}

/// How a duration is spread; all 0 when there was none.
#[derive(Debug, Default, PartialEq, Serialize)]
pub(super) struct Spread {
    p50: f64,
    p90: f64,
    p99: f64,
    max: f64,
}

impl Spread {
    fn of(durations: impl Iterator<Item = Duration>) -> Self {
        let mut ms: Vec<f64> = durations.map(|duration| duration.as_secs_f64() * 1e3).collect();
        ms.sort_by(f64::total_cmp);
        let Some(last) = ms.len().checked_sub(1) else { return Self::default() };
        let at = |share: f64| ms[(last as f64 * share).round() as usize];
        Self { p50: at(0.5), p90: at(0.9), p99: at(0.99), max: ms[last] }
    }
}

impl Report {
    /// What came of requests that were sent during `seconds`.
    pub(super) fn of(outcomes: &[Outcome], seconds: f64) -> Self {
        let count = |end| outcomes.iter().filter(|outcome| outcome.end == end).count();
        let ended = |end| outcomes.iter().filter(move |outcome| outcome.end == end);
        let completed = || ended(End::Completed);
        let in_time = |moment: &Duration| moment.as_secs_f64() <= seconds;
        let tokens = completed().flat_map(|outcome| &outcome.tokens).filter(|moment| in_time(moment)).count();
        let requests = completed().filter(|outcome| in_time(&outcome.ended)).count();
        let took = |outcome: &Outcome| between(outcome.sent, outcome.ended);
        Self {
            completed: count(End::Completed),
            refused: count(End::Refused),
            failed: count(End::Failed),
            tokens_per_s: tokens as f64 / seconds,
            requests_per_s: requests as f64 / seconds,
            first_token_ms: Spread::of(completed().filter_map(|o| Some(between(o.sent, *o.tokens.first()?)))),
            inter_token_ms: Spread::of(
                completed().flat_map(|o| o.tokens.windows(2).map(|pair| between(pair[0], pair[1]))),
            ),
            total_ms: Spread::of(completed().map(took)),
            refusal_ms: Spread::of(ended(End::Refused).map(took)),
        }
    }

    /// For people.
    pub(super) fn text(&self) -> String {
        let columns = ["milliseconds", "p50", "p90", "p99", "max"].map(output::column);
        let spreads = [
            ("first token", &self.first_token_ms),
            ("between tokens", &self.inter_token_ms),
            ("whole completion", &self.total_ms),
            ("refusal", &self.refusal_ms),
        ];
        let row = |(name, spread): &(&str, &Spread)| {
            let figures = [spread.p50, spread.p90, spread.p99, spread.max].map(|ms| format!("{ms:.1}"));
            [vec![(*name).to_owned()], figures.to_vec()].concat()
        };
        format!(
            "{} completed, {} refused, {} failed; {} tokens/s, {} requests/s\n{}",
            self.completed,
            self.refused,
            self.failed,
            output::rate(self.tokens_per_s),
            output::rate(self.requests_per_s),
            output::table(&columns, &spreads.iter().map(row).collect::<Vec<_>>(), false)
        )
    }
}

fn between(earlier: Duration, later: Duration) -> Duration {
    later.saturating_sub(earlier)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(sent: u64, tokens: &[u64], ended: u64, end: End) -> Outcome {
        let ms = Duration::from_millis;
        Outcome { sent: ms(sent), tokens: tokens.iter().copied().map(ms).collect(), ended: ms(ended), end }
    }

    #[test]
    fn only_what_came_in_time_counts_and_refusals_are_apart() {
        let outcomes = [
            outcome(0, &[100, 150, 250], 260, End::Completed),
            outcome(500, &[900, 1100], 1100, End::Completed),
            outcome(600, &[], 605, End::Refused),
            outcome(700, &[750], 800, End::Failed),
        ];
        let report = Report::of(&outcomes, 1.0);
        assert_eq!((report.completed, report.refused, report.failed), (2, 1, 1));
        assert_eq!((report.tokens_per_s, report.requests_per_s), (4.0, 1.0));
        assert_eq!(report.first_token_ms, Spread { p50: 400.0, p90: 400.0, p99: 400.0, max: 400.0 });
        assert_eq!(report.inter_token_ms, Spread { p50: 100.0, p90: 200.0, p99: 200.0, max: 200.0 });
        assert_eq!(report.refusal_ms, Spread { p50: 5.0, p90: 5.0, p99: 5.0, max: 5.0 });
        assert_eq!(Spread::of(std::iter::empty()), Spread::default());
    }
}
