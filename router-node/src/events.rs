//! What a sequence's client is told, for every API: what the engine sends, until its end, its failure or its deadline. Whoever
//! drops it has left: the engine then drops the sequence, and the caller's place becomes free.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures::{FutureExt as _, Stream};
use sirocco_proto::inference::Event;
use tokio::sync::mpsc;
use tokio::time::{Sleep, sleep_until};

use crate::callers::Admission;
use crate::deadline::Deadline;
use crate::engine::GenerateError;

/// The events of one sequence; the last one is `Finished` or an error.
#[derive(Debug)]
pub(crate) struct Events {
    engine: mpsc::Receiver<Result<Event, GenerateError>>,
    deadline: Deadline,
    sleep: Pin<Box<Sleep>>,
    ended: bool,
    /// Shared by the sequences of a request.
    admission: Arc<Admission>,
}

impl Events {
    pub(crate) fn new(
        engine: mpsc::Receiver<Result<Event, GenerateError>>,
        deadline: Deadline,
        admission: Arc<Admission>,
    ) -> Self {
        let sleep = Box::pin(sleep_until(deadline.at.into()));
        Self { engine, deadline, sleep, ended: false, admission }
    }
}

impl Stream for Events {
    type Item = Result<Event, GenerateError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let event = if self.sleep.poll_unpin(cx).is_ready() {
            Err(self.deadline.overdue().into())
        } else {
            match self.engine.poll_recv(cx) {
                Poll::Ready(event) => {
                    event.unwrap_or_else(|| Err(GenerateError::Internal("the engine has ended".into())))
                }
                Poll::Pending => return Poll::Pending,
            }
        };
        match &event {
            Ok(Event::Token(_)) => self.admission.count_token(),
            Ok(Event::Finished(_)) | Err(_) => {
                self.ended = true;
                self.engine.close();
            }
            Ok(Event::Started(_)) => {}
        }
        Poll::Ready(Some(event))
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use futures::StreamExt as _;

    use super::*;
    use crate::callers::Callers;

    type Sender = mpsc::Sender<Result<Event, GenerateError>>;

    fn events(timeout: Duration) -> (Sender, Events) {
        let (sender, receiver) = mpsc::channel(4);
        let caller = Callers::open(None).unwrap().0.identify(None, None).unwrap();
        let now = Instant::now();
        (sender, Events::new(receiver, Deadline::new(now, timeout, []), caller.admit(now).unwrap()))
    }

    #[tokio::test]
    async fn the_deadline_ends_the_stream_and_tells_the_engine() {
        let (sender, mut events) = events(Duration::from_millis(5));
        assert!(matches!(events.next().await, Some(Err(GenerateError::Overdue(_)))));
        assert!(events.next().await.is_none());
        assert!(sender.is_closed());
    }

    #[tokio::test]
    async fn an_engine_that_has_ended_is_a_failure_and_nothing_comes_after_one() {
        let (sender, mut events) = events(Duration::from_mins(1));
        drop(sender);
        assert!(matches!(events.next().await, Some(Err(GenerateError::Internal(_)))));
        assert!(events.next().await.is_none());
    }
}
