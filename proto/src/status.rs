//! Where domain errors become gRPC statuses.

use sirocco_types::SamplingParamsError;
use tonic::Status;

/// A request that can never succeed: which field, what is wrong with its value, and what is allowed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct Invalid {
    /// The field's name, as in the `.proto`.
    pub field: String,
    /// Its value's problem and the limit.
    pub problem: String,
}

impl Invalid {
    /// Names `field` and its `problem`.
    pub fn new(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self { field: field.into(), problem: problem.into() }
    }
}

impl From<SamplingParamsError> for Invalid {
    fn from(error: SamplingParamsError) -> Self {
        Self::new(error.field, format!("{}, {}", error.value, error.limit))
    }
}

impl From<Invalid> for Status {
    fn from(error: Invalid) -> Self {
        Self::invalid_argument(error.to_string())
    }
}

/// The cluster cannot serve this now; a later attempt may succeed.
pub fn unavailable(error: impl std::fmt::Display) -> Status {
    Status::unavailable(error.to_string())
}

/// The caller's time ran out.
pub fn deadline_exceeded(error: impl std::fmt::Display) -> Status {
    Status::deadline_exceeded(error.to_string())
}

/// The node failed.
pub fn failed(error: impl std::fmt::Display) -> Status {
    Status::internal(error.to_string())
}
