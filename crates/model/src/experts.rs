//! The experts of a layer, wherever they are.

use std::collections::HashMap;
use std::time::Instant;

use sirocco_compute::{ExpertWeights, Pool, weighted_sum};
use sirocco_types::{ExpertDtype, ExpertKey, LayerId, Routing};

use crate::checkpoint::load_each;
use crate::{Checkpoint, CheckpointError};

/// Runs a layer's experts over a batch of tokens.
pub trait Experts: Send + Sync {
    /// The weighted sum of each token's experts: `hidden` is `[tokens, hidden_size]`, normalised, and so is the result in
    /// shape. However it is computed, the bits are those of [`LocalExperts`]. After `until` nobody waits for it any more.
    fn forward(
        &self,
        layer: LayerId,
        hidden: &[f32],
        routing: &Routing,
        until: Option<Instant>,
    ) -> impl Future<Output = Result<Vec<f32>, ExpertsError>> + Send;
}

/// Why a layer's experts gave no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExpertsError {
    /// An expert is not served now; a later request may succeed.
    #[error("{0}")]
    Unavailable(String),
    /// Something is broken that trying again does not mend.
    #[error("{0}")]
    Internal(String),
}

/// The weighted sum of each token's rows, in the token's own top-k order, never in the order in which they came.
///
/// `rows`: `[tokens * top_k, hidden_size]`, unweighted.
pub fn combine(rows: &[f32], routing: &Routing, hidden_size: usize) -> Vec<f32> {
    weighted_sum(rows, &routing.weights, routing.top_k, hidden_size)
}

/// Every expert of a model in this process: the oracle for the cluster.
#[derive(Debug)]
pub struct LocalExperts {
    experts: HashMap<ExpertKey, ExpertWeights>,
    hidden_size: usize,
    pool: Pool,
}

impl LocalExperts {
    /// Loads every expert, kept as `dtype`, on as many threads as `pool` has.
    pub fn load(checkpoint: &Checkpoint, dtype: ExpertDtype, pool: Pool) -> Result<Self, CheckpointError> {
        let keys: Vec<ExpertKey> = checkpoint.spec().experts().collect();
        let loaded = load_each(&keys, pool.threads(), |&key| checkpoint.load_expert(key, dtype))?;
        let experts = keys.into_iter().zip(loaded).collect();
        Ok(Self { experts, hidden_size: checkpoint.spec().hidden_size, pool })
    }
}

impl Experts for LocalExperts {
    async fn forward(
        &self,
        layer: LayerId,
        hidden: &[f32],
        routing: &Routing,
        _: Option<Instant>,
    ) -> Result<Vec<f32>, ExpertsError> {
        let width = self.hidden_size;
        let mut rows = vec![0.0; routing.experts.len() * width]; // [tokens * top_k, hidden]
        for (expert, slots) in routing.by_expert() {
            let input: Vec<f32> =
                slots.iter().flat_map(|slot| &hidden[slot / routing.top_k * width..][..width]).copied().collect();
            let output = self.experts[&ExpertKey { layer, expert }].forward(&input, &self.pool);
            for (slot, row) in slots.iter().zip(output.chunks_exact(width)) {
                rows[slot * width..][..width].copy_from_slice(row);
            }
        }
        Ok(combine(&rows, routing, width))
    }
}
