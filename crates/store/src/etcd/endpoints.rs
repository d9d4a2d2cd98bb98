//! Which etcd member a call goes to, and what happens when it does not answer.
//!
//! All calls go to one member for as long as it answers; a failure moves every later call to the next. Each try has its own
//! timeout. A call that changes nothing, or the same thing when made twice, is tried up to twice on every member (three times
//! on a single one), with backoff between rounds. A transaction is tried again only when the failed try surely changed
//! nothing: the connection was refused, or etcd turned the request away for its outdated token.

use std::error::Error;
use std::io;
use std::pin::pin;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use etcd_client::{Client, ConnectOptions, Error as EtcdError};

use super::options::{EtcdOptions, wrong};
use crate::backoff::{Backoff, random};
use crate::{Result, StoreError};

/// Whether making a call twice does the same as making it once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Repeat {
    /// Try again after any failure that may pass.
    Freely,
    /// Try again only when nothing was changed by the failed try.
    OnlyIfUnapplied,
}

/// A client of one etcd member.
#[derive(Clone)]
pub(super) struct Connected {
    pub(super) client: Client,
    pub(super) endpoint: String,
}

pub(super) struct Endpoints {
    members: Vec<Member>,
    options: ConnectOptions,
    timeout: Duration,
    /// Counts up with each failover; modulo the number of members it is the one in use.
    current: AtomicUsize,
}

struct Member {
    url: String,
    client: Mutex<Option<Client>>,
}

/// Why one try failed.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) reason: String,
    kind: FailureKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FailureKind {
    /// May pass; may have been applied.
    Transient,
    /// May pass; was not applied.
    Unapplied,
    /// Will not pass.
    Refused,
}

impl Endpoints {
    /// Checks the options, certificates too, and sends nothing. Errors: `Options`.
    pub(super) async fn new(options: &EtcdOptions) -> Result<Self> {
        let connect = options.check()?;
        for url in &options.endpoints {
            // Certificates are parsed when a client is made; without a user that is all it does.
            if let Err(error) = Client::connect([url], Some(connect.clone())).await {
                let reason = Failure::of(&error).reason;
                return Err(wrong("etcd endpoint", url, &format!("cannot be used with these certificates: {reason}")));
            }
        }
        let members = options.endpoints.iter().map(|url| Member { url: url.clone(), client: Mutex::default() });
        Ok(Self {
            members: members.collect(),
            options: options.with_user(connect),
            timeout: options.timeout,
            current: AtomicUsize::new(random() as usize),
        })
    }

    /// Calls each member once until one answers; that one is used from then on. Gives each one's failure.
    pub(super) async fn probe(&self) -> std::result::Result<(), Vec<(String, StoreError)>> {
        let mut failures = Vec::new();
        for _ in &self.members {
            let current = self.current.load(Ordering::Relaxed);
            let member = self.member(current);
            // As etcdctl's health check does: any key will do, and being denied it is an answer too.
            let answered = self.try_on(member, &|mut etcd: Connected| async move {
                match etcd.client.get("health", None).await {
                    Err(error) if code(&error) == Some(PERMISSION_DENIED) => Ok(()),
                    answer => answer.map(|_| ()),
                }
            });
            match answered.await {
                Ok(()) => return Ok(()),
                Err(mut failure) => {
                    self.fail_over(current);
                    if failure.kind == FailureKind::Transient && member.url.starts_with("https") {
                        // A server that turns away the client's certificate closes the connection without a word.
                        failure
                            .reason
                            .push_str(" (does etcd trust the client certificate, and the CA file match etcd?)");
                    }
                    failures.push((member.url.clone(), failure.into_error("connect", &member.url)));
                }
            }
        }
        Err(failures)
    }

    /// Makes one call as the module says.
    pub(super) async fn call<T, F>(
        &self,
        operation: &'static str,
        repeat: Repeat,
        request: impl Fn(Connected) -> F + Send + Sync,
    ) -> Result<T>
    where
        T: Send,
        F: Future<Output = std::result::Result<T, EtcdError>> + Send,
    {
        let tries = (2 * self.members.len()).max(3);
        let mut backoff = Backoff::new();
        for attempt in 1.. {
            let current = self.current.load(Ordering::Relaxed);
            let member = self.member(current);
            let failure = match self.try_on(member, &request).await {
                Ok(answer) => return Ok(answer),
                Err(failure) => failure,
            };
            let again = match failure.kind {
                FailureKind::Refused => false,
                FailureKind::Unapplied => true,
                FailureKind::Transient => repeat == Repeat::Freely,
            };
            if failure.kind != FailureKind::Refused {
                self.fail_over(current);
            }
            if !again || attempt >= tries {
                return Err(failure.into_error(operation, &member.url));
            }
            tracing::debug!(
                operation,
                endpoint = member.url,
                reason = failure.reason,
                "etcd call failed; trying again"
            );
            if attempt % self.members.len() == 0 {
                backoff.wait().await;
            }
        }
        unreachable!("the last try returns")
    }

    async fn try_on<T, F>(
        &self,
        member: &Member,
        request: &(impl Fn(Connected) -> F + Send + Sync),
    ) -> std::result::Result<T, Failure>
    where
        F: Future<Output = std::result::Result<T, EtcdError>> + Send,
    {
        let attempt = pin!(async {
            let client = if let Some(client) = member.cached() {
                client
            } else {
                let made = Client::connect([&member.url], Some(self.options.clone())).await;
                // Nothing of the request itself has been sent yet.
                member.keep(made.map_err(|error| Failure::of(&error).unapplied())?)
            };
            request(Connected { client, endpoint: member.url.clone() }).await.map_err(|error| Failure::of(&error))
        });
        let result = tokio::time::timeout(self.timeout, attempt).await.unwrap_or_else(|_| {
            Err(Failure { reason: format!("no answer within {:?}", self.timeout), kind: FailureKind::Transient })
        });
        if result.as_ref().is_err_and(|failure| failure.kind != FailureKind::Refused) {
            // The next try makes a new connection and, with a user, gets a new token.
            member.forget();
        }
        result
    }

    fn member(&self, current: usize) -> &Member {
        &self.members[current % self.members.len()]
    }

    /// Moves to the next member unless another call has done so already.
    fn fail_over(&self, from: usize) {
        let next = from.wrapping_add(1);
        let moved = self.current.compare_exchange(from, next, Ordering::Relaxed, Ordering::Relaxed).is_ok();
        if moved && self.members.len() > 1 {
            tracing::warn!(
                from = self.member(from).url,
                to = self.member(next).url,
                "etcd endpoint failed; using the next"
            );
        }
    }
}

impl Member {
    fn cached(&self) -> Option<Client> {
        self.client.lock().expect("no code panics while it holds this lock").clone()
    }

    fn keep(&self, client: Client) -> Client {
        *self.client.lock().expect("no code panics while it holds this lock") = Some(client.clone());
        client
    }

    fn forget(&self) {
        *self.client.lock().expect("no code panics while it holds this lock") = None;
    }
}

const CANCELLED: i32 = 1;
const UNKNOWN: i32 = 2;
const DEADLINE_EXCEEDED: i32 = 4;
pub(super) const NOT_FOUND: i32 = 5;
const PERMISSION_DENIED: i32 = 7;
const RESOURCE_EXHAUSTED: i32 = 8;
const ABORTED: i32 = 10;
const INTERNAL: i32 = 13;
const UNAVAILABLE: i32 = 14;
const UNAUTHENTICATED: i32 = 16;

/// The gRPC status code of `error`, if it is one. Source: grpc.io, status codes.
pub(super) fn code(error: &EtcdError) -> Option<i32> {
    match error {
        EtcdError::GRpcStatus(status) => Some(status.code() as i32),
        _ => None,
    }
}

impl Failure {
    pub(super) fn of(error: &EtcdError) -> Self {
        let (reason, cause) = match error {
            EtcdError::GRpcStatus(status) => (status.message().to_owned(), deepest(status)),
            EtcdError::TransportError(error) => (error.to_string(), deepest(error)),
            other => (other.to_string(), None),
        };
        let never_connected = cause.and_then(|cause| cause.downcast_ref::<io::Error>()).is_some_and(|error| {
            use io::ErrorKind::{ConnectionRefused, HostUnreachable, NetworkUnreachable};
            matches!(error.kind(), ConnectionRefused | HostUnreachable | NetworkUnreachable)
        });
        // https://github.com/etcd-io/etcd/blob/v3.4.23/etcdserver/api/v3rpc/rpctypes/error.go
        let outdated_token = reason.contains("revision of auth store is old") || code(error) == Some(UNAUTHENTICATED);
        let may_pass = match error {
            EtcdError::InvalidArgs(_) | EtcdError::InvalidUri(_) | EtcdError::InvalidMetadataValue(_) => false,
            error => code(error).is_none_or(|code| {
                [CANCELLED, UNKNOWN, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, ABORTED, INTERNAL, UNAVAILABLE]
                    .contains(&code)
            }),
        };
        let kind = match (never_connected || outdated_token, may_pass) {
            (true, _) => FailureKind::Unapplied,
            (false, true) => FailureKind::Transient,
            (false, false) => FailureKind::Refused,
        };
        let cause = cause.map(ToString::to_string).filter(|cause| !reason.contains(cause.as_str()));
        let reason = cause.map_or(reason.clone(), |cause| format!("{reason}: {cause}"));
        Self { reason, kind }
    }

    fn unapplied(self) -> Self {
        let kind = if self.kind == FailureKind::Transient { FailureKind::Unapplied } else { self.kind };
        Self { kind, ..self }
    }

    pub(super) fn into_error(self, operation: &'static str, endpoint: &str) -> StoreError {
        let (endpoint, reason) = (endpoint.to_owned(), self.reason);
        match self.kind {
            FailureKind::Refused => StoreError::Refused { operation, endpoint, reason },
            FailureKind::Transient | FailureKind::Unapplied => StoreError::Unavailable { operation, endpoint, reason },
        }
    }
}

fn deepest<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a (dyn Error + 'static)> {
    let mut cause = error.source()?;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    Some(cause)
}
