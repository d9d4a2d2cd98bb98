//! Random weights in safetensors files, a few megabytes of them in memory at a time.
//!
//! Each tensor has a sequence of random numbers of its own, so that neither the files nor the other tensors change it.

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::Path;

use anyhow::{Context as _, Result};
use serde_json::{Map, Value, json};
use sirocco_model::expected_tensors;
use sirocco_types::ModelSpec;

use crate::random::Random;

/// Weights are made and written this much at a time.
const PIECE_BYTES: usize = 4 << 20;

/// Bytes of a weight: bf16.
const WEIGHT_BYTES: usize = 2;

/// 1.0 in bf16.
const ONE: [u8; 2] = 0x3f80_u16.to_le_bytes();

/// The standard deviation of a matrix's weights: what most models begin their training with.
const DEVIATION: f32 = 0.02;

/// Which tensors are in which file.
pub(super) struct Shards(Vec<Vec<Tensor>>);

struct Tensor {
    name: String,
    shape: Vec<usize>,
    /// Its place among all.
    index: u64,
}

impl Tensor {
    fn bytes(&self) -> u64 {
        (self.shape.iter().product::<usize>() * WEIGHT_BYTES) as u64
    }
}

impl Shards {
    /// Spreads the tensors of such a model over files of at most `shard_bytes`, or of one tensor.
    pub(super) fn plan(spec: &ModelSpec, shard_bytes: u64) -> Self {
        let mut shards: Vec<Vec<Tensor>> = Vec::new();
        let mut room = 0;
        for ((name, shape), index) in expected_tensors(spec).zip(0..) {
            let tensor = Tensor { name, shape, index };
            let bytes = tensor.bytes();
            if let Some(shard) = shards.last_mut().filter(|_| bytes <= room) {
                shard.push(tensor);
                room -= bytes;
            } else {
                shards.push(vec![tensor]);
                room = shard_bytes.saturating_sub(bytes);
            }
        }
        Self(shards)
    }

    /// Bytes of all weights.
    pub(super) fn bytes(&self) -> u64 {
        self.0.iter().flatten().map(Tensor::bytes).sum()
    }

    /// Writes the files, and an index when there are several; says to `written` how many bytes of weights each piece had.
    /// Yields after each, so that the task can be dropped.
    pub(super) async fn write(&self, folder: &Path, seed: u64, mut written: impl FnMut(u64)) -> Result<()> {
        let mut places = Map::new();
        for (number, tensors) in self.0.iter().enumerate() {
            let name = match self.0.len() {
                1 => "model.safetensors".to_owned(),
                all => format!("model-{:05}-of-{all:05}.safetensors", number + 1),
            };
            let file = File::create_new(folder.join(&name)).with_context(|| name.clone())?;
            let mut file = BufWriter::with_capacity(PIECE_BYTES, file);
            file.write_all(&header(tensors)?).with_context(|| name.clone())?;
            for tensor in tensors {
                let mut left = tensor.bytes() as usize;
                let mut random = Random(seed.wrapping_mul(0xd129_42f0_fe94_f35b) ^ tensor.index << 40);
                let mut piece = vec![0; left.min(PIECE_BYTES)];
                while left > 0 {
                    let piece = &mut piece[..left.min(PIECE_BYTES)];
                    if tensor.shape.len() == 1 {
                        ones(piece);
                    } else {
                        fill(piece, &mut random);
                    }
                    file.write_all(piece).with_context(|| name.clone())?;
                    left -= piece.len();
                    written(piece.len() as u64);
                    tokio::task::yield_now().await;
                }
                places.insert(tensor.name.clone(), name.clone().into());
            }
            file.flush().with_context(|| name)?;
        }
        if self.0.len() > 1 {
            let index = json!({"metadata": {"total_size": self.bytes()}, "weight_map": places});
            std::fs::write(folder.join("model.safetensors.index.json"), serde_json::to_vec_pretty(&index)?)?;
        }
        Ok(())
    }
}

/// The head of a safetensors file: its length and a JSON object with the type, shape and place of each tensor, padded so that
/// the weights are aligned. Source: the format's description, github.com/huggingface/safetensors.
fn header(tensors: &[Tensor]) -> Result<Vec<u8>> {
    let mut header = Map::from_iter([("__metadata__".to_owned(), json!({"format": "pt"}))]);
    let mut start = 0;
    for tensor in tensors {
        let end = start + tensor.bytes();
        let info = json!({"dtype": "BF16", "shape": tensor.shape, "data_offsets": [start, end]});
        header.insert(tensor.name.clone(), info);
        start = end;
    }
    let mut json = serde_json::to_vec(&Value::Object(header))?;
    json.resize(json.len().next_multiple_of(8), b' ');
    Ok([&(json.len() as u64).to_le_bytes()[..], &json].concat())
}

/// What norms multiply with.
fn ones(bytes: &mut [u8]) {
    for weight in bytes.chunks_exact_mut(WEIGHT_BYTES) {
        weight.copy_from_slice(&ONE);
    }
}

/// Little-endian bf16, uniform around zero with [`DEVIATION`]; four from each random number.
fn fill(bytes: &mut [u8], random: &mut Random) {
    for weights in bytes.chunks_mut(4 * WEIGHT_BYTES) {
        let mut bits = random.next();
        for weight in weights.chunks_exact_mut(WEIGHT_BYTES) {
            weight.copy_from_slice(&uniform(bits as i16).to_le_bytes());
            bits >>= 16;
        }
    }
}

/// A step of 65536 between plus and minus sqrt(3) deviations, rounded to bf16, ties to even.
fn uniform(step: i16) -> u16 {
    const SQRT_3: f32 = 1.732_050_8;
    let bits = (f32::from(step) * (DEVIATION * SQRT_3 / 32768.0)).to_bits();
    ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_spread_around_zero_as_wide_as_they_should() {
        let mut bytes = vec![0; 1 << 20];
        fill(&mut bytes, &mut Random(7));
        let (pairs, _) = bytes.as_chunks::<2>();
        let weights: Vec<f64> =
            pairs.iter().map(|pair| f32::from_bits(u32::from(u16::from_le_bytes(*pair)) << 16).into()).collect();
        let mean = weights.iter().sum::<f64>() / weights.len() as f64;
        let deviation = (weights.iter().map(|weight| weight * weight).sum::<f64>() / weights.len() as f64).sqrt();
        assert!(mean.abs() < 1e-4, "{mean}");
        assert!((deviation / 0.02 - 1.0).abs() < 0.01, "{deviation}");
        assert!(weights.iter().all(|weight| weight.abs() < 0.035));
    }
}
