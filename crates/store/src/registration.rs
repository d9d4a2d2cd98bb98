//! Keeps a node's records present in the store for as long as the node wants them there.
//!
//! All records hang on one lease and on one of them, the claim: the member key, which only one live process may hold. The
//! owner says what the records should be; a task makes them so, and does it again whenever the lease is lost (an outage
//! longer than its time), someone deletes the claim, or a write fails. Each write checks the claim, so a process that has
//! lost its id to another never writes under it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::backoff::Backoff;
use crate::election::until_deleted;
use crate::{Compare, Lease, LeaseId, Op, Result, Store, StoreError, Txn};

/// How long a dead process's key is given to vanish: its lease's time, which starts anew when etcd changes its own leader, and a
/// little more, for stores look for expired leases periodically.
fn patience(ttl: Duration) -> Duration {
    2 * ttl + Duration::from_secs(2)
}

/// See the module. Dropping it stops its task; the records then vanish when the lease's time is up.
#[derive(Debug)]
pub struct Registration {
    wanted: watch::Sender<BTreeMap<String, String>>,
    shutdown: CancellationToken,
    task: JoinSet<()>,
}

impl Registration {
    /// Registers under `claim` with its first value; returns once it is in the store.
    ///
    /// A key left by a killed predecessor is waited for until its lease has ended. Outages are waited out. Errors: `Held`
    /// when the key stays for longer than twice `ttl`, so that its process must be alive; `Refused`. Dropping the future may leave
    /// the record behind until `ttl` has passed.
    pub async fn open(store: Arc<dyn Store>, claim: &str, value: &str, ttl: Duration) -> Result<Self> {
        let wanted = watch::Sender::new(BTreeMap::from([(claim.to_owned(), value.to_owned())]));
        let shutdown = CancellationToken::new();
        let mut keeper =
            Keeper { store, claim: claim.to_owned(), ttl, wanted: wanted.subscribe(), shutdown: shutdown.clone() };
        let tenure = keeper.register().await.expect("only the registration being opened can shut it down")?;
        let mut task = JoinSet::new();
        task.spawn(keeper.run(tenure));
        Ok(Self { wanted, shutdown, task })
    }

    /// Sets records, the claim's or others, which are soon in the store. Those set together arrive together.
    pub fn set(&self, records: impl IntoIterator<Item = (String, String)>) {
        self.wanted.send_if_modified(|wanted| {
            let mut changed = false;
            for (key, value) in records {
                changed |= wanted.get(&key) != Some(&value);
                wanted.insert(key, value);
            }
            changed
        });
    }

    /// Ends the lease, so that all records vanish at once. With the store out of reach it gives up after a few tries; the
    /// records then vanish when the lease's time is up.
    pub async fn close(mut self) {
        self.shutdown.cancel();
        while self.task.join_next().await.is_some() {}
    }
}

struct Keeper {
    store: Arc<dyn Store>,
    claim: String,
    ttl: Duration,
    wanted: watch::Receiver<BTreeMap<String, String>>,
    shutdown: CancellationToken,
}

/// A lease with which the claim was made, and what was written under it.
struct Tenure {
    lease: Lease,
    written: BTreeMap<String, String>,
}

impl Keeper {
    async fn run(mut self, first: Tenure) {
        let shutdown = self.shutdown.clone();
        let mut tenure = first;
        let mut backoff = Backoff::new();
        loop {
            let serving = shutdown.run_until_cancelled(self.serve(&mut tenure)).await;
            self.end(tenure.lease).await;
            if serving.is_none() {
                return;
            }
            tracing::warn!(key = self.claim, "registration lost; registering again");
            tenure = loop {
                match self.register().await {
                    None => return,
                    Some(Ok(new)) => break new,
                    Some(Err(error)) => tracing::error!(key = self.claim, %error, "not registered; trying again"),
                }
                if shutdown.run_until_cancelled(backoff.wait()).await.is_none() {
                    return;
                }
            };
            backoff = Backoff::new();
        }
    }

    /// Grants a lease and makes the claim with it, waiting out outages and a dead predecessor's lease; none at shutdown.
    async fn register(&mut self) -> Option<Result<Tenure>> {
        let shutdown = self.shutdown.clone();
        let lease = match shutdown.run_until_cancelled(self.grant()).await? {
            Ok(lease) => lease,
            Err(error) => return Some(Err(error)),
        };
        let failure = match shutdown.run_until_cancelled(self.claim(&lease)).await {
            Some(Ok(written)) => return Some(Ok(Tenure { lease, written })),
            Some(Err(error)) => Some(Err(error)),
            None => None,
        };
        // The claim may have been made though its answer did not come in time.
        self.end(lease).await;
        failure
    }

    /// Ends a lease that may have records on it.
    async fn end(&self, lease: Lease) {
        if let Err(error) = lease.revoke(&self.store).await {
            tracing::warn!(key = self.claim, %error, "lease not ended: its records vanish when its time is up");
        }
    }

    async fn grant(&self) -> Result<Lease> {
        let mut backoff = Backoff::new();
        loop {
            match Lease::grant(&self.store, self.ttl).await {
                Err(error) if error.is_transient() => {
                    tracing::warn!(key = self.claim, %error, "waiting for the store to register");
                    backoff.wait().await;
                }
                granted => return granted,
            }
        }
    }

    async fn claim(&mut self, lease: &Lease) -> Result<BTreeMap<String, String>> {
        let mut holder: Option<(LeaseId, Instant)> = None;
        let mut backoff = Backoff::new();
        loop {
            if lease.lost().is_cancelled() {
                return Err(StoreError::LeaseExpired(lease.id()));
            }
            match self.try_claim(lease, &mut holder).await {
                Ok(Some(written)) => return Ok(written),
                Ok(None) => continue,
                Err(error) if error.is_transient() => {
                    tracing::warn!(key = self.claim, %error, "waiting for the store to register");
                }
                Err(error) => return Err(error),
            }
            backoff.wait().await;
        }
    }

    /// One try; none when the key was in the way and has gone, or may have.
    async fn try_claim(
        &mut self,
        lease: &Lease,
        holder: &mut Option<(LeaseId, Instant)>,
    ) -> Result<Option<BTreeMap<String, String>>> {
        let wanted = self.wanted.borrow_and_update().clone();
        let mut txn = Txn::new().when(Compare::Absent(self.claim.clone()));
        for (key, value) in &wanted {
            txn = txn.put_leased(key, value, lease.id());
        }
        if self.store.txn(txn).await?.succeeded {
            return Ok(Some(wanted));
        }
        let listing = self.store.list(&self.claim).await?;
        let Some(present) = listing.entries.iter().find(|entry| entry.key == self.claim) else { return Ok(None) };
        let Some(other) = present.lease else {
            // Left by hand, without a lease: no process keeps it.
            let fence = Compare::ModifiedAt(self.claim.clone(), present.mod_revision);
            self.store.txn(Txn::new().when(fence).delete(&self.claim)).await?;
            return Ok(None);
        };
        if other == lease.id() {
            // An earlier try got through though its answer was lost; what it wrote is not known, so all is written again.
            return Ok(Some(BTreeMap::new()));
        }
        let since = match *holder {
            Some((known, since)) if known == other => since,
            _ => {
                tracing::info!(key = self.claim, lease = %other, "waiting for a predecessor's lease to end");
                holder.insert((other, Instant::now())).1
            }
        };
        let patience = patience(lease.ttl());
        match tokio::time::timeout_at(
            since + patience,
            until_deleted(self.store.as_ref(), &self.claim, listing.revision),
        )
        .await
        {
            Ok(gone) => gone.map(|()| None),
            Err(_) => Err(StoreError::Held { key: self.claim.clone(), lease: other, waited: patience }),
        }
    }

    /// Keeps the records as wanted until the lease or the claim is lost.
    async fn serve(&mut self, tenure: &mut Tenure) {
        let mut backoff = Backoff::new();
        let lost = tenure.lease.lost().clone();
        loop {
            match self.write(tenure).await {
                Ok(true) => backoff = Backoff::new(),
                Ok(false) | Err(StoreError::LeaseExpired(_)) => return,
                Err(error) => {
                    tracing::warn!(key = self.claim, %error, "records not written; trying again");
                    tenure.written.clear();
                    tokio::select! {
                        () = lost.cancelled() => return,
                        () = backoff.wait() => continue,
                    }
                }
            }
            tokio::select! {
                () = lost.cancelled() => return,
                // Without changes too: to see that the claim is still there.
                () = tokio::time::sleep(tenure.lease.ttl() / 3) => {}
                changed = self.wanted.changed() => if changed.is_err() { return },
            }
        }
    }

    /// Writes what differs from what was written; false when the claim is gone.
    async fn write(&mut self, tenure: &mut Tenure) -> Result<bool> {
        let wanted = self.wanted.borrow_and_update().clone();
        let lease = tenure.lease.id();
        let changed = wanted.iter().filter(|(key, value)| tenure.written.get(*key) != Some(*value));
        let puts = changed.map(|(key, value)| Op::Put { key: key.clone(), value: value.clone(), lease: Some(lease) });
        let txn = Txn { compares: vec![Compare::Lease(self.claim.clone(), lease)], ops: puts.collect() };
        let succeeded = self.store.txn(txn).await?.succeeded;
        if succeeded {
            tenure.written = wanted;
        }
        Ok(succeeded)
    }
}
