//! How well a model predicts text it has not seen: what is lost when its experts are kept as fewer bits.

use sirocco_compute::{BLOCK_TOKENS, Pool, RouterDevice};
use sirocco_types::{ExpertDtype, ModelSpec};

use crate::{
    Checkpoint, CheckpointError, LocalExperts, Logits, Model, SequenceChunk, StepError, Tokenizer, TokenizerError,
};

/// Tokens that are predicted from each other at most.
const WINDOW: usize = 512;

/// Why a model's quality cannot be measured.
#[derive(Debug, thiserror::Error)]
pub enum QualityError {
    /// The checkpoint cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The tokenizer cannot be read or does not take the text.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The model failed.
    #[error(transparent)]
    Step(#[from] StepError),
    /// The compute threads cannot be started.
    #[error("{threads} threads cannot be started: {error}")]
    Threads {
        /// How many.
        threads: usize,
        /// Why not.
        error: std::io::Error,
    },
    /// There is nothing to predict.
    #[error("the text has no token, must have at least one")]
    NoText,
}

/// The bits per byte it takes a model to predict `text`, by what its experts are kept as. Fewer are better.
pub async fn quality(
    checkpoint: &Checkpoint,
    text: &str,
    threads: usize,
) -> Result<[(ExpertDtype, f64); 3], QualityError> {
    let tokens = Tokenizer::load(checkpoint.folder(), checkpoint.spec())?.encode(text, false)?;
    if tokens.is_empty() {
        return Err(QualityError::NoText);
    }
    let pool = Pool::new(threads).map_err(|error| QualityError::Threads { threads, error })?;
    let kv_blocks = window(checkpoint.spec()).div_ceil(BLOCK_TOKENS);
    let mut model = Model::load(checkpoint, RouterDevice::Cpu { pool: pool.clone(), kv_blocks })?;
    let mut found = ExpertDtype::ALL.map(|dtype| (dtype, 0.0));
    for (dtype, bits_per_byte) in &mut found {
        let experts = LocalExperts::load(checkpoint, *dtype, pool.clone())?;
        *bits_per_byte = bits(&mut model, &experts, &tokens).await? / text.len() as f64;
    }
    Ok(found)
}

/// The bits it takes to tell each of `tokens` given those before it.
///
/// The tokens are cut into windows, each put behind the model's begin token; a model without one is not asked for the first
/// token of a window.
async fn bits(model: &mut Model, experts: &LocalExperts, tokens: &[u32]) -> Result<f64, StepError> {
    let (window, bos) = (window(model.spec()), model.spec().bos_token_id);
    let blocks: Vec<u32> = (0..window.div_ceil(BLOCK_TOKENS) as u32).collect();
    let mut nats = 0.0;
    for part in tokens.chunks((window - 1).max(1)) {
        let input: Vec<u32> = bos.into_iter().chain(part.iter().copied()).collect();
        let chunk = SequenceChunk { blocks: &blocks, start: 0, tokens: &input, logits: Logits::All, until: None };
        let logits = model.forward(&[&[chunk]], experts).await?.logits;
        nats += logits.iter().zip(&input[1..]).map(|(logits, &token)| surprise(logits, token)).sum::<f64>();
    }
    Ok(nats / std::f64::consts::LN_2)
}

/// Tokens of a window.
fn window(spec: &ModelSpec) -> usize {
    WINDOW.min(spec.max_position_embeddings)
}

/// Minus the natural logarithm of the probability of `token`.
fn surprise(logits: &[f32], token: u32) -> f64 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - largest).exp()).sum();
    sum.ln() - f64::from(logits[token as usize] - largest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_logits_cost_the_logarithm_of_their_number() {
        assert!((surprise(&[3.0; 8], 5) - 8.0_f64.ln()).abs() < 1e-12);
        assert!(surprise(&[0.0, 60.0], 1) < 1e-12);
    }
}
