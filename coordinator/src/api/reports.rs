//! Takes in load reports while this coordinator leads.

use sirocco_proto::load::LoadService;
use sirocco_proto::tonic::{Request, Response, Status, Streaming};
use sirocco_proto::wire::cluster as wire;
use sirocco_types::LoadReport;
use tokio_stream::StreamExt as _;

use super::Api;

#[sirocco_proto::tonic::async_trait]
impl LoadService for Api {
    async fn report(
        &self,
        request: Request<Streaming<wire::LoadReport>>,
    ) -> Result<Response<wire::ReportResponse>, Status> {
        let mut reports = request.into_inner();
        let mut states = self.states.clone();
        let deposed = async {
            let leads = |state: &std::sync::Arc<sirocco_store::ClusterState>| state.leader() == Some(self.id.as_str());
            // An error means that the coordinator is stopping.
            let _ = states.wait_for(|state| !leads(state)).await;
        };
        let receive = async {
            while let Some(report) = reports.next().await {
                let report = LoadReport::try_from(report?)?;
                if self.reports.send(report).await.is_err() {
                    break;
                }
            }
            Ok(Response::new(wire::ReportResponse {}))
        };
        tokio::select! {
            result = receive => result,
            () = deposed => Err(Status::failed_precondition(format!("{} does not lead", self.id))),
            () = self.shutdown.cancelled() => Err(Status::unavailable("the coordinator is stopping")),
        }
    }
}
