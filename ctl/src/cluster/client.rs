//! Talking to coordinators: several addresses in order, until one answers.
//!
//! A question may go to one after the other; an order is sent at most once, because it may have been followed even though its
//! answer was lost.

use std::error::Error as _;
use std::fmt;
use std::time::Duration;

use anyhow::Result;
use sirocco_proto::channel::{self, MAX_MESSAGE_BYTES};
use sirocco_proto::cluster::ClusterServiceClient;
use sirocco_proto::tonic::transport::Channel;
use sirocco_proto::tonic::{Code, Status};

use crate::Unreachable;
use crate::generate::refusal;

/// How long a coordinator may take to answer a question before the next one is asked.
const QUESTION: Duration = Duration::from_secs(5);

/// How long a coordinator may take to record an order.
const ORDER: Duration = Duration::from_secs(30);

/// A connected coordinator.
pub(crate) type Client = ClusterServiceClient<Channel>;

/// Which coordinators to talk to.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Coordinators {
    /// The coordinators' gRPC addresses, with commas between; the first that answers is used
    #[arg(
        long = "coordinator",
        env = "SIROCCO_COORDINATOR",
        value_name = "ADDRS",
        value_delimiter = ',',
        default_value = "127.0.0.1:7400"
    )]
    addresses: Vec<String>,
}

/// A coordinator's answer that is a refusal.
#[derive(Debug)]
pub(crate) struct Refused {
    /// What kind of refusal.
    pub(crate) code: Code,
    reason: String,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)
    }
}

impl std::error::Error for Refused {}

impl Coordinators {
    /// The one coordinator at `address`.
    pub(crate) fn at(address: &str) -> Self {
        Self { addresses: vec![address.to_owned()] }
    }

    /// Asks one coordinator after the other until one answers.
    ///
    /// Errors: [`Refused`] with what one said; one that cannot reach the leader counts only when no other answers.
    /// [`Unreachable`], naming all, when none answers.
    pub(crate) async fn ask<T>(&self, question: impl AsyncFn(Client) -> Result<T, Status>) -> Result<T> {
        let (mut silent, mut unavailable) = (Vec::new(), None);
        for address in &self.addresses {
            let answer = match connect(address).await {
                Ok(client) => tokio::time::timeout(QUESTION, question(client)).await,
                Err(error) => {
                    silent.push(error);
                    continue;
                }
            };
            match answer {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(status)) if is_lost(&status) => silent.push(lost(address, &status)),
                Ok(Err(status)) if status.code() == Code::Unavailable => unavailable = Some(refused(address, &status)),
                Ok(Err(status)) => return Err(refused(address, &status)),
                Err(_) => silent.push(format!("coordinator {address}: no answer within {} s", QUESTION.as_secs())),
            }
        }
        Err(unavailable.unwrap_or_else(|| unreachable(&silent)))
    }

    /// Gives the first coordinator that can be reached an order, once.
    ///
    /// Errors: [`Refused`] with its reason; [`Unreachable`] when none can be reached; another one when it is not known whether
    /// the order was followed.
    pub(crate) async fn tell<T>(&self, order: impl AsyncFnOnce(Client) -> Result<T, Status>) -> Result<T> {
        let mut silent = Vec::new();
        for address in &self.addresses {
            let client = match connect(address).await {
                Ok(client) => client,
                Err(error) => {
                    silent.push(error);
                    continue;
                }
            };
            let unknown = "it is not known whether this was done, `sirocco events` tells";
            return match tokio::time::timeout(ORDER, order(client)).await {
                Ok(Ok(answer)) => Ok(answer),
                Ok(Err(status)) if is_lost(&status) => anyhow::bail!("{}; {unknown}", lost(address, &status)),
                Ok(Err(status)) => Err(refused(address, &status)),
                Err(_) => anyhow::bail!("coordinator {address}: no answer within {} s; {unknown}", ORDER.as_secs()),
            };
        }
        Err(unreachable(&silent))
    }
}

/// A connection to the coordinator at `address`, or why there is none.
async fn connect(address: &str) -> Result<Client, String> {
    match channel::connect(address).await {
        Ok(channel) => Ok(ClusterServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES)),
        Err(error) => Err(format!("coordinator {address}: {}", sirocco_process::chain(&error))),
    }
}

/// Whether `status` was made on this side, because the answer did not come.
fn is_lost(status: &Status) -> bool {
    status.source().is_some()
}

fn lost(address: &str, status: &Status) -> String {
    let cause = status.source().map_or_else(String::new, sirocco_process::chain);
    format!("coordinator {address}: the connection broke: {cause}")
}

/// `status` as the coordinator at `address` meant it: its reason alone where it gives one.
fn refused(address: &str, status: &Status) -> anyhow::Error {
    let code = status.code();
    let reason = match code {
        Code::FailedPrecondition
        | Code::InvalidArgument
        | Code::NotFound
        | Code::Unavailable
        | Code::ResourceExhausted
            if !status.message().is_empty() =>
        {
            status.message().to_owned()
        }
        _ => format!("{:#}", refusal(address, status)),
    };
    Refused { code, reason }.into()
}

fn unreachable(silent: &[String]) -> anyhow::Error {
    Unreachable(silent.join("; ")).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_cluster_is_unreachable_only_when_no_coordinator_answers_and_then_all_are_named() {
        let addresses = ["127.0.0.1:1", "127.0.0.1:2"];
        let coordinators = Coordinators { addresses: addresses.map(str::to_owned).to_vec() };
        let asked = coordinators.ask(async |_| Ok(())).await.unwrap_err();
        let told = coordinators.tell(async |_| Ok(())).await.unwrap_err();
        for error in [asked, told] {
            assert!(error.is::<Unreachable>(), "{error}");
            assert!(addresses.iter().all(|address| error.to_string().contains(address)), "{error}");
        }
    }

    #[test]
    fn a_reason_is_repeated_as_it_was_given() {
        let status = Status::failed_precondition("expert-3 holds the only replica of 2 experts");
        assert_eq!(refused("a:1", &status).to_string(), status.message());
        assert!(refused("a:1", &Status::unimplemented("")).to_string().contains("a:1"));
    }
}
