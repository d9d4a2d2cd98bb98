//! The cluster's state behind one trait, [`Store`], with two implementations: etcd ([`EtcdStore`]) and one that lives in
//! this process ([`EmbeddedStore`]).
//!
//! What nodes build on is written once over the trait, so both stores behave the same: a [`Lease`] that is kept alive, a
//! [`Registration`] that keeps a node's records present, a [`Mirror`] that keeps a live copy of a prefix, and [`campaign`]
//! for leadership with fenced writes. [`Keys`] lays out the keys, [`ClusterState`] reads a mirror's snapshot back into
//! domain types. Nothing here decides anything about placement.
#![forbid(unsafe_code)]

mod backoff;
mod cluster;
mod election;
mod embedded;
mod error;
mod etcd;
mod keys;
mod lease;
mod mirror;
mod registration;
mod store;
mod txn;

pub use cluster::ClusterState;
pub use election::{Leadership, campaign, leader};
pub use embedded::EmbeddedStore;
pub use error::{Result, StoreError};
pub use etcd::{EtcdArgs, EtcdOptions, EtcdStore};
pub use keys::{Keys, parse, to_json};
pub use lease::Lease;
pub use mirror::{Mirror, Snapshot};
pub use registration::Registration;
pub use store::{Entry, Event, Grant, LeaseId, Listing, Revision, Store, WatchBatch, WatchStream};
pub use txn::{Compare, MAX_TXN_OPS, Op, Txn, TxnOutcome};

/// How long a node that says nothing stays a member. An etcd that loses its leader may refuse calls for longer than 10 s.
pub const LEASE_TTL: std::time::Duration = std::time::Duration::from_secs(15);

/// How long a leader that says nothing leads. Shorter than [`LEASE_TTL`], so that placement goes on soon after a leader's
/// death; losing it by mistake costs one election and nothing else, because every write is fenced.
pub const LEADER_TTL: std::time::Duration = std::time::Duration::from_secs(6);
