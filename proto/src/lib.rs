//! Sirocco's gRPC services: generated code, conversion to and from domain types, status mapping, channels and servers.
//!
//! - [`expert`]: router nodes to expert nodes, `sirocco.expert.v1`.
//! - [`inference`]: clients to router nodes, `sirocco.inference.v1`.
//! - [`generation`]: a client's side of one completion, whatever routers are lost meanwhile.
//! - [`cluster`]: operators to coordinators, `sirocco.cluster.v1`.
//! - [`load`]: nodes to the leading coordinator, of the same package.
//! - [`channel`] and [`server`]: how every connection is made and every service is offered.
//!
//! Messages are checked here; what leaves this crate is valid. It never decides anything about placement or serving.
#![forbid(unsafe_code)]

#[cfg(target_endian = "big")]
compile_error!("tensors cross the wire as little-endian bytes taken straight from memory");

pub mod channel;
pub mod cluster;
pub mod codec;
pub mod expert;
pub mod generation;
pub mod inference;
pub mod load;
pub mod server;
mod socket;
mod status;
mod tensor;

pub use status::{Invalid, deadline_exceeded, failed, unavailable};
pub use tensor::{Rows, RowsError};
pub use tonic;

/// The descriptors of every service, for reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// Wire types as generated from the `.proto` files, whose comments document them.
pub mod wire {
    #![allow(missing_docs, unreachable_pub, unused_qualifications, clippy::pedantic, reason = "generated code")]

    /// `sirocco.expert.v1`
    pub mod expert {
        tonic::include_proto!("sirocco.expert.v1");
    }
    /// `sirocco.inference.v1`
    pub mod inference {
        tonic::include_proto!("sirocco.inference.v1");
    }
    /// `sirocco.cluster.v1`
    pub mod cluster {
        tonic::include_proto!("sirocco.cluster.v1");
    }
}
