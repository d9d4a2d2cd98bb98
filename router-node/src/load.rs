//! Counts what is routed to each expert, and tells the coordinator that leads.
//!
//! Counters only go up, so that a report that is lost loses nothing. Never knows which request a token belongs to.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use sirocco_proto::load;
use sirocco_store::ClusterState;
use sirocco_types::{ExpertKey, LoadCounters, LoadReport, ModelSpec, NodeId};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// One counter for each expert of a model.
#[derive(Debug)]
pub(crate) struct ExpertCounts {
    experts: usize,
    /// `[layers, experts]`
    counts: Vec<AtomicU64>,
}

impl ExpertCounts {
    /// Counters of all experts of `spec`, at zero.
    pub(crate) fn new(spec: &ModelSpec) -> Self {
        let experts = spec.num_local_experts;
        let counts = (0..spec.num_hidden_layers * experts).map(|_| AtomicU64::new(0)).collect();
        Self { experts, counts }
    }

    /// Adds `amount` to the counter of `key`, an expert of the model, and returns what it was before.
    pub(crate) fn add(&self, key: ExpertKey, amount: u64) -> u64 {
        self.counts[key.layer.index() * self.experts + key.expert.index()].fetch_add(amount, Ordering::Relaxed)
    }

    /// What all counters are now, `[layers][experts]`.
    pub(crate) fn totals(&self) -> Vec<Vec<u64>> {
        let layer = |layer: &[AtomicU64]| layer.iter().map(|count| count.load(Ordering::Relaxed)).collect();
        self.counts.chunks(self.experts.max(1)).map(layer).collect()
    }
}

/// Reports a router's counters.
#[derive(Debug)]
pub(crate) struct Reporter {
    pub(crate) node: NodeId,
    /// As in the member record.
    pub(crate) incarnation: u64,
    /// When the process started.
    pub(crate) started: Instant,
    /// Routed tokens.
    pub(crate) tokens: Arc<ExpertCounts>,
}

impl Reporter {
    /// Reports to whoever leads, until `shutdown`.
    pub(crate) async fn run(self, states: watch::Receiver<Arc<ClusterState>>, shutdown: CancellationToken) {
        let leader = |state: &ClusterState| state.leader_address().map(str::to_owned);
        load::report(states, leader, || self.sample(), shutdown).await;
    }

    fn sample(&self) -> LoadReport {
        LoadReport {
            node: self.node.clone(),
            incarnation: self.incarnation,
            uptime_us: self.started.elapsed().as_micros() as u64,
            counters: LoadCounters::Router { tokens: self.tokens.totals() },
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use sirocco_types::{Dtype, ExpertId, LayerId};

    use super::*;

    /// A model with 2 layers of 8 experts.
    pub(crate) fn spec() -> ModelSpec {
        ModelSpec {
            model_type: "mixtral".into(),
            hidden_size: 2,
            intermediate_size: 2,
            num_hidden_layers: 2,
            num_local_experts: 8,
            num_experts_per_tok: 2,
            num_attention_heads: 1,
            num_key_value_heads: 1,
            head_dim: 2,
            vocab_size: 8,
            max_position_embeddings: 8,
            sliding_window: None,
            rms_norm_eps: 1e-5,
            rope_theta: 1e4,
            tie_word_embeddings: false,
            bos_token_id: None,
            eos_token_ids: vec![2],
            dtype: Dtype::Bf16,
        }
    }

    #[test]
    fn every_expert_is_counted_by_itself_and_reported_in_its_place() {
        let tokens = Arc::new(ExpertCounts::new(&spec()));
        let key = |layer, expert| ExpertKey { layer: LayerId(layer), expert: ExpertId(expert) };
        assert_eq!(tokens.add(key(0, 7), 2), 0);
        assert_eq!(tokens.add(key(0, 7), 3), 2);
        assert_eq!(tokens.add(key(1, 0), 4), 0);
        let node = NodeId::new("router-0").unwrap();
        let report = Reporter { node: node.clone(), incarnation: 9, started: Instant::now(), tokens }.sample();
        assert_eq!((report.node, report.incarnation), (node, 9));
        let expected = vec![vec![0, 0, 0, 0, 0, 0, 0, 5], vec![4, 0, 0, 0, 0, 0, 0, 0]];
        assert_eq!(report.counters, LoadCounters::Router { tokens: expected });
    }
}
