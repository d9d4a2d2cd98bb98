//! Sirocco's domain types: plain data that every crate shares. No I/O, no clocks, no threads.
//!
//! Wire and storage formats are made of these: the proto crate converts them to protobuf, the store keeps them as JSON.
#![forbid(unsafe_code)]

mod bytes;
mod device;
mod grammar;
mod ids;
mod load;
mod member;
mod model;
mod operation;
mod placement;
mod priority;
mod routing;
mod sampling;

pub use bytes::Bytes;
pub use device::{DeviceChoice, GpuReadings, UnknownDevice};
pub use grammar::{Calls, Grammar, GrammarTooLong, JsonSchema, Otherwise, Tool, grammar_limits};
pub use ids::{Epoch, ExpertId, ExpertKey, LayerId, NodeId, NodeIdError};
pub use load::{LayerLoad, LoadCounters, LoadReport, NodeLoad};
pub use member::{Device, ExpertHoldings, Member, MemberState, RefusedExpert, Role};
pub use model::{
    Dtype, ExpertDtype, ExpertDtypeError, Fingerprint, FingerprintError, ModelIdentity, ModelSpec, SpecError,
};
pub use operation::{Cordon, EpochAbout, MinReplicas, Move, Operation, OperationKind, OperationState};
pub use placement::{EpochRef, LayerPlacement, Placement, PlacementKind};
pub use priority::Priority;
pub use routing::Routing;
pub use sampling::{FinishReason, SamplingParams, SamplingParamsError, Timings, Usage, limits};
