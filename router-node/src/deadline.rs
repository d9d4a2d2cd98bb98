//! When a request must be over, wherever it is by then.

use std::time::{Duration, Instant};

/// The end of a request's time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Deadline {
    pub(crate) at: Instant,
    /// From the request's arrival.
    timeout: Duration,
}

/// A request's time is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the request took longer than its {} s", .timeout.as_secs_f64())]
pub(crate) struct Overdue {
    timeout: Duration,
}

impl Deadline {
    /// That of a request that arrived at `arrived` and may take the shortest of `most` and what it `asks` for.
    pub(crate) fn new(arrived: Instant, most: Duration, asks: impl IntoIterator<Item = Duration>) -> Self {
        let timeout = asks.into_iter().fold(most, Duration::min);
        Self { at: arrived + timeout, timeout }
    }

    /// The failure of a request that has passed it.
    pub(crate) fn overdue(self) -> Overdue {
        Overdue { timeout: self.timeout }
    }

    /// `work`, if it is done in time.
    pub(crate) async fn within<T, E: From<Overdue>>(self, work: impl Future<Output = Result<T, E>>) -> Result<T, E> {
        tokio::time::timeout_at(self.at.into(), work).await.unwrap_or_else(|_| Err(self.overdue().into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_shortest_time_counts() {
        let (now, s) = (Instant::now(), Duration::from_secs);
        assert_eq!(Deadline::new(now, s(5), []).at, now + s(5));
        assert_eq!(Deadline::new(now, s(5), [s(9), s(3)]).at, now + s(3));
        let over = Deadline::new(now, Duration::from_millis(1500), [s(0)]);
        let stuck = over.within(std::future::pending::<Result<(), Overdue>>()).await;
        assert_eq!(stuck.unwrap_err().to_string(), "the request took longer than its 0 s");
    }
}
