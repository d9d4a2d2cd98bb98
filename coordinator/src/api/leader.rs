//! How a request reaches the leader: here, or by being passed on to another coordinator, once.

use std::time::Duration;

use sirocco_proto::channel::{self, MAX_MESSAGE_BYTES};
use sirocco_proto::cluster::ClusterServiceClient;
use sirocco_proto::tonic::metadata::MetadataValue;
use sirocco_proto::tonic::transport::Channel;
use sirocco_proto::tonic::{Request, Status};
use tokio::sync::oneshot;

use super::Api;
use crate::leader::{Command, CommandError};
use crate::operations::{self, Decision, Refusal};

/// Marks a request that was passed on, so that it is not passed on again.
const PASSED_ON: &str = "sirocco-passed-on";

/// Longest wait for the leader's decision.
const PATIENCE: Duration = Duration::from_secs(30);

/// A client of the leader, and a request for it.
pub(super) type PassedOn<T> = (ClusterServiceClient<Channel>, Request<T>);

impl Api {
    /// A client of the leader and `request` for it; none when this coordinator leads.
    ///
    /// Errors: UNAVAILABLE while none leads, or when the request was passed on to a coordinator that no longer does.
    pub(super) fn leader<T: Clone>(&self, request: &Request<T>) -> Result<Option<PassedOn<T>>, Status> {
        let state = self.state();
        if state.leader() == Some(self.id.as_str()) {
            return Ok(None);
        }
        let Some(address) = state.leader_address() else {
            return Err(Status::unavailable("no coordinator leads now; try again in a few seconds"));
        };
        if request.metadata().contains_key(PASSED_ON) {
            return Err(Status::unavailable(format!("{} no longer leads; try again", self.id)));
        }
        let channel = channel::lazy(address).map_err(|error| Status::unavailable(error.to_string()))?;
        let mut passed_on = Request::new(request.get_ref().clone());
        passed_on.metadata_mut().insert(PASSED_ON, MetadataValue::from_static("1"));
        passed_on.set_timeout(PATIENCE);
        let client = ClusterServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES);
        Ok(Some((client, passed_on)))
    }

    /// Has this coordinator, which leads, decide on `request`.
    pub(super) async fn command(&self, request: operations::Request, by: String) -> Result<Decision, Status> {
        let (answer, answered) = oneshot::channel();
        let deposed = || Status::unavailable(CommandError::Deposed.to_string());
        let command = Command { request, by, answer };
        let asked = async {
            self.commands.send(command).await.map_err(|_| deposed())?;
            answered.await.map_err(|_| deposed())
        };
        let decision = tokio::time::timeout(PATIENCE, asked).await;
        let decision = decision.map_err(|_| {
            let seconds = PATIENCE.as_secs();
            Status::deadline_exceeded(format!(
                "no decision within {seconds} s; look at the operations before asking again"
            ))
        })?;
        decision?.map_err(|error| match error {
            CommandError::Refused(refusal) => refused(&refusal),
            CommandError::Store(_) | CommandError::Deposed => Status::unavailable(error.to_string()),
        })
    }
}

/// A refusal as a status.
pub(super) fn refused(refusal: &Refusal) -> Status {
    let message = refusal.to_string();
    match refusal {
        Refusal::Invalid(..) => Status::invalid_argument(message),
        Refusal::NotFound(..) => Status::not_found(message),
        Refusal::NotNow(_) => Status::failed_precondition(message),
    }
}
