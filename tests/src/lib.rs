//! What Sirocco's tests start clusters with: real processes on free ports, real clients.
#![forbid(unsafe_code)]

pub mod etcd;
