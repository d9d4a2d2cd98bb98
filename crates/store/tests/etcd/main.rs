//! What only etcd can show: outages, several endpoints, TLS, users.
#![forbid(unsafe_code)]

mod access;
mod outages;

use std::time::Duration;

use sirocco_store::{EtcdOptions, StoreError};

/// How long any condition may take to come true.
const PATIENCE: Duration = Duration::from_secs(30);

async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    let waited = tokio::time::timeout(PATIENCE, future).await;
    waited.unwrap_or_else(|_| panic!("{what}: not within {PATIENCE:?}"))
}

/// The error of connecting, which must come at once and not by giving up.
async fn refused_at_once(options: EtcdOptions) -> StoreError {
    let connecting = within("refusal", sirocco_store::EtcdStore::connect(options)).await;
    let Err(error) = connecting else { panic!("connected") };
    assert!(!matches!(error, StoreError::Unreachable { .. } | StoreError::Unavailable { .. }), "{error}");
    error
}
