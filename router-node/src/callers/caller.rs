//! One caller: what it may take, and what it has taken. A request is let in once, with an [`Admission`] that counts its tokens
//! and frees its place when it is dropped.

use std::num::NonZeroU32;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sirocco_types::Priority;

use super::bucket::Bucket;
use super::keys::Limits;
use crate::scheduler::{ClientId, Flow};

/// After how long a caller may try again when all its places are taken: when one becomes free is not known.
const RETRY_PLACES: Duration = Duration::from_secs(1);

/// Somebody who may ask.
#[derive(Debug)]
pub(crate) struct Caller {
    /// For logs.
    pub(crate) name: String,
    /// For the engine's fairness.
    pub(super) client: ClientId,
    pub(super) limits: Limits,
    pub(super) max_priority: Priority,
    /// Survives a change of the limits.
    pub(super) usage: Arc<Usage>,
}

/// What a caller has taken.
#[derive(Debug)]
pub(super) struct Usage(Mutex<Counters>);

#[derive(Debug)]
struct Counters {
    requests: Bucket,
    tokens: Bucket,
    running: u32,
}

/// A limit of the caller's is reached.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the limit of {limit} {what} is reached for {caller}; try again in {} s", .retry_after.as_secs_f64())]
pub(crate) struct Limited {
    caller: String,
    what: &'static str,
    limit: NonZeroU32,
    /// When there will be room.
    pub(crate) retry_after: Duration,
}

/// How far one of a caller's rates is used, as the headers `x-ratelimit-*` tell it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rate {
    /// `requests` or `tokens`.
    pub(crate) of: &'static str,
    pub(crate) limit: u32,
    pub(crate) remaining: u32,
    /// Until nothing of it is used any more.
    pub(crate) reset: Duration,
}

impl Usage {
    pub(super) fn new(now: Instant) -> Self {
        Self(Mutex::new(Counters { requests: Bucket::new(now), tokens: Bucket::new(now), running: 0 }))
    }

    fn counters(&self) -> MutexGuard<'_, Counters> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Caller {
    /// Lets a request in, or takes nothing and says when to come back.
    pub(crate) fn admit(self: &Arc<Self>, now: Instant) -> Result<Arc<Admission>, Limited> {
        let limits = &self.limits;
        let mut counters = self.usage.counters();
        if let Some(limit) = limits.concurrent_requests
            && counters.running >= limit.get()
        {
            return Err(self.limited("requests at once", limit, RETRY_PLACES));
        }
        if let Some(limit) = limits.tokens_per_minute {
            // A token must be left, which a prompt takes in any case; it is not known yet how many it is.
            counters.tokens.take(limit, 1, now).map_err(|wait| self.limited("tokens a minute", limit, wait))?;
            counters.tokens.refund(1);
        }
        if let Some(limit) = limits.requests_per_minute {
            counters.requests.take(limit, 1, now).map_err(|wait| self.limited("requests a minute", limit, wait))?;
        }
        counters.running += 1;
        Ok(Arc::new(Admission { caller: Arc::clone(self) }))
    }

    /// Where a request that wants `priority` stands in the engine; nobody goes above what they may.
    pub(crate) fn flow(&self, priority: Priority) -> Flow {
        Flow { client: self.client, priority: priority.min(self.max_priority) }
    }

    /// The limited rates.
    pub(crate) fn rates(&self, now: Instant) -> Vec<Rate> {
        let mut counters = self.usage.counters();
        let rate = |of, limit: Option<NonZeroU32>, bucket: &mut Bucket| {
            let limit = limit?;
            let (remaining, reset) = bucket.left(limit, now);
            Some(Rate { of, limit: limit.get(), remaining, reset })
        };
        let requests = rate("requests", self.limits.requests_per_minute, &mut counters.requests);
        let tokens = rate("tokens", self.limits.tokens_per_minute, &mut counters.tokens);
        requests.into_iter().chain(tokens).collect()
    }

    fn limited(&self, what: &'static str, limit: NonZeroU32, retry_after: Duration) -> Limited {
        Limited { caller: self.name.clone(), what, limit, retry_after }
    }
}

/// A request that was let in, until it is dropped.
#[derive(Debug)]
pub(crate) struct Admission {
    pub(crate) caller: Arc<Caller>,
}

impl Admission {
    /// The most tokens a prompt may ever have.
    pub(crate) fn most_tokens(&self) -> Option<u32> {
        self.caller.limits.tokens_per_minute.map(NonZeroU32::get)
    }

    /// Takes the tokens of the request's prompts, or none and says when to come back.
    pub(crate) fn take_tokens(&self, count: u32, now: Instant) -> Result<(), Limited> {
        let Some(limit) = self.caller.limits.tokens_per_minute else { return Ok(()) };
        let taken = self.caller.usage.counters().tokens.take(limit, count, now);
        taken.map_err(|wait| self.caller.limited("tokens a minute", limit, wait))
    }

    /// Gives back what [`Self::take_tokens`] took.
    pub(crate) fn refund_tokens(&self, count: u32) {
        self.caller.usage.counters().tokens.refund(count);
    }

    /// Counts a generated token. A completion is not cut off when it uses up the limit: the next request waits for longer.
    pub(crate) fn count_token(&self) {
        if let Some(limit) = self.caller.limits.tokens_per_minute {
            self.caller.usage.counters().tokens.charge(limit, 1, Instant::now());
        }
    }
}

impl Drop for Admission {
    fn drop(&mut self) {
        self.caller.usage.counters().running -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn caller(requests: u32, tokens: u32, at_once: u32) -> Arc<Caller> {
        let limits = Limits {
            requests_per_minute: NonZeroU32::new(requests),
            tokens_per_minute: NonZeroU32::new(tokens),
            concurrent_requests: NonZeroU32::new(at_once),
        };
        let usage = Arc::new(Usage::new(Instant::now()));
        Arc::new(Caller { name: "ada".into(), client: ClientId(1), limits, max_priority: Priority::Normal, usage })
    }

    #[test]
    fn a_place_is_free_again_when_its_request_is_gone() {
        let (caller, now) = (caller(0, 0, 1), Instant::now());
        let running = caller.admit(now).unwrap();
        let refused = caller.admit(now).unwrap_err();
        assert_eq!(refused.to_string(), "the limit of 1 requests at once is reached for ada; try again in 1 s");
        drop(running);
        assert!(caller.admit(now).is_ok());
    }

    #[test]
    fn requests_come_back_one_by_one() {
        let (caller, now) = (caller(2, 0, 0), Instant::now());
        assert!(caller.admit(now).is_ok() && caller.admit(now).is_ok());
        assert_eq!(caller.admit(now).unwrap_err().retry_after, Duration::from_secs(30));
        assert!(caller.admit(now + Duration::from_secs(30)).is_ok());
        assert!(caller.admit(now + Duration::from_secs(31)).is_err());
    }

    #[test]
    fn tokens_are_counted_as_they_come_and_a_debt_is_paid_first() {
        let (caller, now) = (caller(0, 60, 0), Instant::now());
        let admission = caller.admit(now).unwrap();
        assert_eq!(admission.take_tokens(50, now), Ok(()));
        assert_eq!(admission.take_tokens(20, now).unwrap_err().retry_after, Duration::from_secs(10));
        (0..40).for_each(|_| admission.count_token());
        let wait = caller.admit(now).unwrap_err().retry_after;
        assert!((Duration::from_secs(30)..=Duration::from_secs(31)).contains(&wait), "{wait:?}");
        assert_eq!(caller.rates(now)[0].remaining, 0);
        admission.refund_tokens(50);
        assert_eq!(caller.rates(Instant::now())[0].limit, 60);
        assert!(caller.admit(now).is_ok());
    }

    #[test]
    fn nobody_goes_above_their_priority() {
        let caller = caller(0, 0, 0);
        for (wanted, given) in [(Priority::High, Priority::Normal), (Priority::Low, Priority::Low)] {
            assert_eq!(caller.flow(wanted), Flow { client: ClientId(1), priority: given });
        }
    }
}
