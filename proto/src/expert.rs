//! `sirocco.expert.v1` in domain types: what a router asks of an expert node and what it answers.
//!
//! [`Stream`] is the router's side of the connection, [`ExpertServer`] the node's. Both write and read the bytes that the code
//! generated from the `.proto` would, without its copies.

mod checksum;
#[cfg(test)]
mod hostile;
mod message;
mod server;
mod stream;
#[cfg(test)]
mod tests;

use std::time::Duration;

use bytes::Bytes;
use sirocco_types::{ExpertId, Fingerprint, LayerId};

use crate::channel::MAX_MESSAGE_BYTES;
pub use crate::wire::expert::expert_service_client::ExpertServiceClient;
use crate::wire::expert::{self as wire, Status};
use crate::{Rows, RowsError};
pub use checksum::Checked;
pub use server::{Description, ExpertServer, Node};
pub use stream::{Broken, Stream};

/// The method that [`Stream`] calls and [`ExpertServer`] answers.
const DISPATCH_PATH: &str = "/sirocco.expert.v1.ExpertService/Dispatch";

/// The field of `DispatchRequest` that has the hidden states.
const HIDDEN_STATES: u32 = 5;

/// The field of `DispatchResponse` that has the rows.
const ROWS: u32 = 5;

/// One layer's rows for the experts of one node.
#[derive(Clone, Debug, PartialEq)]
pub struct DispatchRequest {
    /// Unique within its stream.
    pub id: u64,
    /// The checkpoint the router serves.
    pub fingerprint: Fingerprint,
    /// Which layer's experts are meant.
    pub layer: LayerId,
    /// What is left of the caller's time.
    pub deadline: Option<Duration>,
    /// `[rows, hidden_size]`.
    pub hidden_states: Rows,
    /// Which rows each expert runs on.
    pub experts: Vec<ExpertRows>,
}

/// The rows one expert runs on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpertRows {
    /// The expert.
    pub expert: ExpertId,
    /// Indices into the request's rows, each below their number.
    pub rows: Vec<u32>,
}

/// The answer to one [`DispatchRequest`].
#[derive(Clone, Debug, PartialEq)]
pub struct DispatchResponse {
    /// The request's id.
    pub id: u64,
    /// The answer, or why there is none for any expert.
    pub result: Result<ExpertOutputs, Refusal>,
}

/// What a node's experts made of a request.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ExpertOutputs {
    /// One entry per entry of the request, in the same order.
    pub experts: Vec<(ExpertId, Result<(), Refusal>)>,
    /// `[rows, hidden_size]`, unweighted: for each expert without a refusal, in order, one row per row of its request.
    pub rows: Rows,
}

/// Why a request, or one expert of it, was not run.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// What the caller can do about it.
    pub reason: RefusalReason,
    /// For a person.
    pub message: String,
}

/// What a caller can do about a [`Refusal`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefusalReason {
    /// Look at the placement again.
    NotHeld,
    /// Nothing: the request is malformed.
    Invalid,
    /// Nothing: the node serves another checkpoint.
    WrongModel,
    /// Send it again.
    Corrupt,
    /// Try another replica, or later.
    Unavailable,
    /// Nothing: time is up.
    DeadlineExceeded,
    /// Try another replica: the node failed.
    Internal,
}

impl RefusalReason {
    /// All of them, in the order of their values.
    pub const ALL: [Self; 7] = [
        Self::NotHeld,
        Self::Invalid,
        Self::WrongModel,
        Self::Corrupt,
        Self::Unavailable,
        Self::DeadlineExceeded,
        Self::Internal,
    ];

    /// The lower-case name, as metrics have it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NotHeld => "not_held",
            Self::Invalid => "invalid",
            Self::WrongModel => "wrong_model",
            Self::Corrupt => "corrupt",
            Self::Unavailable => "unavailable",
            Self::DeadlineExceeded => "deadline_exceeded",
            Self::Internal => "internal",
        }
    }
}

impl Refusal {
    /// A refusal for `reason`, explained by `message`.
    pub fn new(reason: RefusalReason, message: impl Into<String>) -> Self {
        Self { reason, message: message.into() }
    }
}

impl DispatchRequest {
    /// As it crosses the wire.
    fn into_wire(self) -> wire::DispatchRequest {
        let mut request = wire::DispatchRequest {
            id: self.id,
            model_fingerprint: Bytes::copy_from_slice(&self.fingerprint.0),
            layer: self.layer.0,
            deadline_ms: self.deadline.map_or(0, |left| left.as_millis().clamp(1, u32::MAX as u128) as u32),
            hidden_states: Some(self.hidden_states.into_wire()),
            experts: self.experts.into_iter().map(|e| wire::ExpertRows { expert: e.expert.0, rows: e.rows }).collect(),
            crc32c: 0,
        };
        request.crc32c = request.checksum();
        request
    }

    /// As the chunks of a stream's body. Errors when it is too large for a message.
    fn into_chunks(self) -> Result<Vec<Bytes>, Refusal> {
        let mut request = self.into_wire();
        let hidden_states = request.hidden_states.take();
        message::chunks(&request, HIDDEN_STATES, hidden_states).map_err(|size| too_large("hidden_states", size))
    }

    /// Checks a request. Errors say what to answer.
    fn from_wire(request: wire::DispatchRequest) -> Result<Self, Refusal> {
        let invalid = |message: String| Refusal::new(RefusalReason::Invalid, message);
        let fingerprint = request.model_fingerprint.as_ref().try_into().map_err(|_| {
            invalid(format!("model_fingerprint: {} bytes long, must be 32", request.model_fingerprint.len()))
        })?;
        let tensor = request.hidden_states.ok_or_else(|| invalid("hidden_states: absent".into()))?;
        let hidden_states = Rows::from_wire(tensor).map_err(|e| tensor_refusal("hidden_states", &e))?;
        let count = hidden_states.len();
        for expert in &request.experts {
            if let Some(row) = expert.rows.iter().find(|&&row| row as usize >= count) {
                return Err(invalid(format!(
                    "experts: expert {} asks for row {row}, hidden_states has {count}",
                    expert.expert
                )));
            }
        }
        let asked: usize = request.experts.iter().map(|part| part.rows.len()).sum();
        let answer = asked * hidden_states.width() * size_of::<f32>();
        if answer > MAX_MESSAGE_BYTES {
            return Err(invalid(format!(
                "experts: {asked} rows, an answer of {answer} bytes, the limit is {MAX_MESSAGE_BYTES}"
            )));
        }
        Ok(Self {
            id: request.id,
            fingerprint: Fingerprint(fingerprint),
            layer: LayerId(request.layer),
            deadline: (request.deadline_ms > 0).then(|| Duration::from_millis(request.deadline_ms.into())),
            hidden_states,
            experts: request
                .experts
                .into_iter()
                .map(|e| ExpertRows { expert: ExpertId(e.expert), rows: e.rows })
                .collect(),
        })
    }
}

impl DispatchResponse {
    /// As it crosses the wire.
    fn into_wire(self) -> wire::DispatchResponse {
        let mut response = match self.result {
            Ok(outputs) => wire::DispatchResponse {
                id: self.id,
                status: Status::Ok.into(),
                message: String::new(),
                experts: outputs.experts.into_iter().map(|(expert, result)| expert_result(expert, result)).collect(),
                rows: (!outputs.rows.is_empty()).then(|| outputs.rows.into_wire()),
                crc32c: 0,
            },
            Err(refusal) => wire::DispatchResponse {
                id: self.id,
                status: status(refusal.reason).into(),
                message: refusal.message,
                ..Default::default()
            },
        };
        response.crc32c = response.checksum();
        response
    }

    /// As the chunks of a stream's body. One that is too large for a message becomes a refusal.
    fn into_chunks(self) -> Vec<Bytes> {
        let id = self.id;
        let mut response = self.into_wire();
        let rows = response.rows.take();
        message::chunks(&response, ROWS, rows).unwrap_or_else(|size| {
            let response = Self { id, result: Err(too_large("rows", size)) }.into_wire();
            message::chunks(&response, ROWS, None).unwrap_or_default()
        })
    }

    /// Checks a response. A malformed one becomes a refusal, so that its request is not left waiting.
    fn from_wire(response: wire::DispatchResponse) -> Self {
        let id = response.id;
        let result = match reason(response.status()) {
            Some(reason) => Err(Refusal::new(reason, response.message)),
            None => Self::outputs(response),
        };
        Self { id, result }
    }

    fn outputs(response: wire::DispatchResponse) -> Result<ExpertOutputs, Refusal> {
        let rows = match response.rows {
            Some(tensor) => Rows::from_wire(tensor).map_err(|e| tensor_refusal("rows", &e))?,
            None => Rows::default(),
        };
        let experts = response
            .experts
            .into_iter()
            .map(|result| {
                let outcome = match reason(result.status()) {
                    Some(reason) => Err(Refusal::new(reason, result.message)),
                    None => Ok(()),
                };
                (ExpertId(result.expert), outcome)
            })
            .collect();
        Ok(ExpertOutputs { experts, rows })
    }
}

/// Refuses a message of `size` bytes, most of them `field`.
fn too_large(field: &str, size: usize) -> Refusal {
    let problem = format!("{field}: a message of {size} bytes, the limit is {MAX_MESSAGE_BYTES}");
    Refusal::new(RefusalReason::Invalid, problem)
}

fn expert_result(expert: ExpertId, result: Result<(), Refusal>) -> wire::ExpertResult {
    let (status, message) = match result {
        Ok(()) => (Status::Ok, String::new()),
        Err(refusal) => (status(refusal.reason), refusal.message),
    };
    wire::ExpertResult { expert: expert.0, status: status.into(), message }
}

fn tensor_refusal(field: &str, error: &RowsError) -> Refusal {
    let reason = match error {
        RowsError::Corrupt { .. } => RefusalReason::Corrupt,
        _ => RefusalReason::Invalid,
    };
    Refusal::new(reason, format!("{field}: {error}"))
}

fn status(reason: RefusalReason) -> Status {
    match reason {
        RefusalReason::NotHeld => Status::NotHeld,
        RefusalReason::Invalid => Status::Invalid,
        RefusalReason::WrongModel => Status::WrongModel,
        RefusalReason::Corrupt => Status::Corrupt,
        RefusalReason::Unavailable => Status::Unavailable,
        RefusalReason::DeadlineExceeded => Status::DeadlineExceeded,
        RefusalReason::Internal => Status::Internal,
    }
}

/// The reason behind a status; none for success. A status this version does not know is a failure of the node.
fn reason(status: Status) -> Option<RefusalReason> {
    match status {
        Status::Ok => None,
        Status::NotHeld => Some(RefusalReason::NotHeld),
        Status::Invalid => Some(RefusalReason::Invalid),
        Status::WrongModel => Some(RefusalReason::WrongModel),
        Status::Corrupt => Some(RefusalReason::Corrupt),
        Status::Unavailable => Some(RefusalReason::Unavailable),
        Status::DeadlineExceeded => Some(RefusalReason::DeadlineExceeded),
        Status::Internal | Status::Unspecified => Some(RefusalReason::Internal),
    }
}
