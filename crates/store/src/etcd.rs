//! The store that is an etcd cluster.
//!
//! Calls go through [`Endpoints`], which knows timeouts, failover and what may be repeated; this file only translates. Leases
//! and elections use plain keys and transactions, never etcd's own lock or election services, so that both stores share them.

mod args;
mod endpoints;
mod options;

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use etcd_client::{
    Compare as EtcdCompare, CompareOp, DeleteOptions, Error as EtcdError, EventType, GetOptions, KeyValue, PutOptions,
    ResponseHeader, Txn as EtcdTxn, TxnOp, WatchOptions, WatchResponse, WatchStream as EtcdWatch,
};
use futures::{StreamExt, stream};

pub use self::options::EtcdOptions;
pub use args::EtcdArgs;

use self::endpoints::{Connected, Endpoints, Failure, NOT_FOUND, Repeat, code};
use crate::backoff::Backoff;
use crate::embedded::whole_seconds;
use crate::{
    Compare, Entry, Event, Grant, LeaseId, Listing, Op, Result, Revision, Store, StoreError, Txn, TxnOutcome,
    WatchBatch, WatchStream,
};

/// Largest answer accepted from etcd, in bytes; a listing of every placement of a large cluster is a few MiB.
const MAX_ANSWER: usize = 64 << 20;

/// See the module.
pub struct EtcdStore {
    endpoints: Endpoints,
}

impl EtcdStore {
    /// Connects to etcd, trying every endpoint with backoff and saying why each one fails, until one answers.
    ///
    /// Errors: `Options` at once for options that cannot work; `Refused` at once when etcd turns the user away;
    /// `Unreachable` after `options.connect_timeout`. Dropping the future stops trying.
    pub async fn connect(options: EtcdOptions) -> Result<Arc<dyn Store>> {
        let endpoints = Endpoints::new(&options).await?;
        let start = Instant::now();
        let mut backoff = Backoff::new();
        loop {
            let Err(failures) = endpoints.probe().await else { return Ok(Arc::new(Self { endpoints })) };
            for (endpoint, error) in &failures {
                if !error.is_transient() {
                    return Err(error.clone());
                }
                tracing::warn!(endpoint, %error, waited = ?start.elapsed(), "waiting for etcd");
            }
            if options.connect_timeout.is_some_and(|limit| start.elapsed() >= limit) {
                let reasons: Vec<String> = failures.iter().map(|(_, error)| error.to_string()).collect();
                return Err(StoreError::Unreachable { waited: start.elapsed(), reasons: reasons.join("; ") });
            }
            backoff.wait().await;
        }
    }
}

#[async_trait]
impl Store for EtcdStore {
    async fn get(&self, key: &str) -> Result<Option<Arc<Entry>>> {
        let request = |etcd: Connected| async move { reading(&etcd).get(key, None).await };
        let answer = self.endpoints.call("get", Repeat::Freely, request).await?;
        Ok(answer.kvs().first().map(entry))
    }

    async fn list(&self, prefix: &str) -> Result<Listing> {
        let request =
            |etcd: Connected| async move { reading(&etcd).get(prefix, Some(GetOptions::new().with_prefix())).await };
        let answer = self.endpoints.call("list", Repeat::Freely, request).await?;
        Ok(Listing { entries: answer.kvs().iter().map(entry).collect(), revision: revision(answer.header()) })
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome> {
        txn.check()?;
        let lease = txn.ops.iter().find_map(|op| if let Op::Put { lease, .. } = op { *lease } else { None });
        let request = |etcd: Connected| {
            let txn = to_etcd(&txn);
            async move { unless_gone(etcd.client.kv_client().txn(txn).await) }
        };
        let answer = self.endpoints.call("transaction", Repeat::OnlyIfUnapplied, request).await?;
        match (answer, lease) {
            (Some(answer), _) => Ok(TxnOutcome { succeeded: answer.succeeded(), revision: revision(answer.header()) }),
            (None, lease) => Err(StoreError::LeaseExpired(lease.unwrap_or(LeaseId(0)))),
        }
    }

    async fn grant_lease(&self, ttl: Duration) -> Result<Grant> {
        let seconds = whole_seconds(ttl).as_secs().cast_signed();
        // A grant whose answer is lost leaves a lease without keys behind, which ends by itself.
        let request = |etcd: Connected| async move { etcd.client.lease_client().grant(seconds, None).await };
        let answer = self.endpoints.call("lease grant", Repeat::Freely, request).await?;
        Ok(Grant { lease: LeaseId(answer.id()), ttl: Duration::from_secs(answer.ttl().unsigned_abs()) })
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<()> {
        let request = |etcd: Connected| async move {
            match etcd.client.lease_client().keep_alive(lease.0).await {
                // The client's own words for an answer with no time left.
                Err(EtcdError::LeaseKeepAliveError(reason)) if reason == "lease not found" => Ok(None),
                answer => unless_gone(answer),
            }
        };
        let answer = self.endpoints.call("lease keep-alive", Repeat::Freely, request).await?;
        answer.map(|_| ()).ok_or(StoreError::LeaseExpired(lease))
    }

    async fn revoke(&self, lease: LeaseId) -> Result<()> {
        let request = |etcd: Connected| async move { unless_gone(etcd.client.lease_client().revoke(lease.0).await) };
        self.endpoints.call("lease revoke", Repeat::Freely, request).await.map(|_| ())
    }

    async fn watch(&self, prefix: &str, from: Revision) -> Result<WatchStream> {
        let from = from.max(Revision(1));
        let request = |etcd: Connected| async move {
            let options = WatchOptions::new().with_prefix().with_start_revision(from.0.cast_signed());
            let mut client = etcd.client.watch_client().max_decoding_message_size(MAX_ANSWER);
            let watch = client.watch(prefix, Some(options)).await?;
            Ok(Watcher { watch, endpoint: etcd.endpoint, from })
        };
        let watcher = self.endpoints.call("watch", Repeat::Freely, request).await?;
        Ok(stream::try_unfold(watcher, |mut watcher| async { Ok(Some((watcher.next_batch().await?, watcher))) })
            .boxed())
    }
}

struct Watcher {
    watch: EtcdWatch,
    endpoint: String,
    from: Revision,
}

impl Watcher {
    async fn next_batch(&mut self) -> Result<WatchBatch> {
        loop {
            let answer = match self.watch.message().await {
                Ok(Some(answer)) => answer,
                Ok(None) => return Err(self.unavailable("etcd closed the stream".to_owned())),
                Err(error) => return Err(self.unavailable(Failure::of(&error).reason)),
            };
            if answer.compact_revision() > 0 {
                let oldest = Revision(answer.compact_revision().cast_unsigned());
                return Err(StoreError::Compacted { from: self.from, oldest });
            }
            if answer.canceled() {
                return Err(self.unavailable(format!("etcd cancelled it: {}", answer.cancel_reason())));
            }
            if let Some(batch) = batch(&answer) {
                self.from = batch.revision.next();
                return Ok(batch);
            }
        }
    }

    fn unavailable(&self, reason: String) -> StoreError {
        StoreError::Unavailable { operation: "watch", endpoint: self.endpoint.clone(), reason }
    }
}

/// The changes in `answer`; none when it only says that the watch was made.
fn batch(answer: &WatchResponse) -> Option<WatchBatch> {
    let changed: Vec<(EventType, &KeyValue)> =
        answer.events().iter().filter_map(|event| Some((event.event_type(), event.kv()?))).collect();
    let revision = changed.iter().map(|(_, kv)| kv.mod_revision()).max()?;
    let events = changed
        .into_iter()
        .map(|(kind, kv)| match kind {
            EventType::Put => Event::Put(entry(kv)),
            EventType::Delete => Event::Delete { key: text(kv.key()) },
        })
        .collect();
    Some(WatchBatch { revision: Revision(revision.cast_unsigned()), events })
}

fn reading(etcd: &Connected) -> etcd_client::KvClient {
    etcd.client.kv_client().max_decoding_message_size(MAX_ANSWER)
}

/// None when etcd says that the lease named in the request does not exist: nothing else is ever not found here.
fn unless_gone<T>(answer: std::result::Result<T, EtcdError>) -> std::result::Result<Option<T>, EtcdError> {
    match answer {
        Err(error) if code(&error) == Some(NOT_FOUND) => Ok(None),
        answer => answer.map(Some),
    }
}

fn to_etcd(txn: &Txn) -> EtcdTxn {
    let compares = txn.compares.iter().map(|compare| {
        let (key, equal) = (compare.key(), CompareOp::Equal);
        match compare {
            Compare::Exists(_) => EtcdCompare::version(key, CompareOp::Greater, 0),
            Compare::Absent(_) => EtcdCompare::version(key, equal, 0),
            Compare::CreatedAt(_, revision) => EtcdCompare::create_revision(key, equal, revision.0.cast_signed()),
            Compare::ModifiedAt(_, revision) => EtcdCompare::mod_revision(key, equal, revision.0.cast_signed()),
            Compare::Value(_, value) => EtcdCompare::value(key, equal, value.as_str()),
            Compare::Lease(_, lease) => EtcdCompare::lease(key, equal, lease.0),
        }
    });
    let ops = txn.ops.iter().map(|op| match op {
        Op::Put { key, value, lease } => {
            let options = lease.map(|lease| PutOptions::new().with_lease(lease.0));
            TxnOp::put(key.as_str(), value.as_str(), options)
        }
        Op::Delete(key) => TxnOp::delete(key.as_str(), None),
        Op::DeletePrefix(prefix) => TxnOp::delete(prefix.as_str(), Some(DeleteOptions::new().with_prefix())),
    });
    EtcdTxn::new().when(compares.collect::<Vec<_>>()).and_then(ops.collect::<Vec<_>>())
}

fn entry(kv: &KeyValue) -> Arc<Entry> {
    Arc::new(Entry {
        key: text(kv.key()),
        value: text(kv.value()),
        create_revision: Revision(kv.create_revision().cast_unsigned()),
        mod_revision: Revision(kv.mod_revision().cast_unsigned()),
        lease: (kv.lease() != 0).then(|| LeaseId(kv.lease())),
    })
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn revision(header: Option<&ResponseHeader>) -> Revision {
    Revision(header.map_or(0, |header| header.revision().cast_unsigned()))
}
