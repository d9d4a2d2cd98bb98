//! The same model served by processes: a coordinator, a router and eight expert nodes on an etcd of their own.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use futures::future::try_join_all;
use sirocco_proto::channel;
use sirocco_proto::inference::InferenceServiceClient;
use sirocco_proto::tonic::transport::Channel;
use sirocco_proto::wire::inference as wire;
use sirocco_proto::wire::inference::generate_response::Event;
use sirocco_testkit::cluster::{Cluster, Setup};
use sirocco_testkit::etcd::Etcd;
use tokio::runtime::Runtime;

use crate::work::Rate;

const EXPERT_NODES: usize = 8;

pub(crate) struct Served {
    client: InferenceServiceClient<Channel>,
    runtime: Runtime,
    _cluster: Cluster,
    _etcd: Etcd,
}

impl Served {
    /// Starts everything; returns when the router can serve.
    pub(crate) fn start(folder: &Path) -> Result<Self> {
        let etcd = Etcd::start()?;
        let setup = Setup {
            name: "measured",
            router_model: folder,
            models: &vec![folder.to_owned(); EXPERT_NODES],
            coordinators: 1,
            routers: 1,
            // No replicas: nothing is loaded while something is measured.
            envs: &[("SIROCCO_MAX_EXPERTS_PER_LAYER", "1")],
        };
        let cluster = Cluster::start_with(&etcd.endpoint(), &setup)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let channel = runtime.block_on(channel::connect(&cluster.routers[0].grpc))?;
        Ok(Self { client: InferenceServiceClient::new(channel), runtime, _cluster: cluster, _etcd: etcd })
    }

    /// Completes `prompts` at once and greedily, as `expected` says. Returns the tokens of all together from when the last
    /// one has its first token until the first one has its last.
    pub(crate) fn complete(&self, prompts: &[Vec<u32>], expected: &[Vec<u32>]) -> Result<Rate> {
        let streams = prompts.iter().zip(expected).map(|(prompt, expected)| self.stream(prompt, expected));
        let times = self.runtime.block_on(try_join_all(streams))?;
        let began = times.iter().filter_map(|times| times.first()).max().context("there are tokens")?;
        let ended = times.iter().filter_map(|times| times.last()).min().context("there are tokens")?;
        let tokens = times.iter().flatten().filter(|time| *time > began && *time <= ended).count();
        ensure!(tokens > 0, "no moment saw all {} sequences generate", prompts.len());
        Ok(Rate { tokens, seconds: (*ended - *began).as_secs_f64() })
    }

    /// When each token of a completion came.
    async fn stream(&self, prompt: &[u32], expected: &[u32]) -> Result<Vec<Instant>> {
        let request = wire::GenerateRequest {
            prompt: Some(wire::generate_request::Prompt::TokenIds(wire::TokenIds { ids: prompt.to_vec() })),
            sampling: Some(wire::SamplingParams { temperature: Some(0.0), ..Default::default() }),
            max_tokens: Some(expected.len() as u32),
            ignore_eos: true,
            ..Default::default()
        };
        let mut stream = self.client.clone().generate(request).await?.into_inner();
        let (mut ids, mut times) = (Vec::new(), Vec::new());
        while let Some(message) = stream.message().await? {
            if let Some(Event::Token(token)) = message.event {
                times.push(Instant::now());
                ids.push(token.id);
            }
        }
        ensure!(ids == expected, "the cluster says {ids:?}, one process {expected:?}");
        Ok(times)
    }
}
