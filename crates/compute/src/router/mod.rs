//! What a router node computes of a model: all but the experts, with the KV cache, on the CPU or a GPU, behind one trait.
//!
//! A step's batch goes through a lane: [`RouterBackend::begin`] embeds its tokens, then layer by layer [`RouterBackend::attend`] gives what
//! the experts are asked, and [`RouterBackend::add_experts`] takes their answer; at the end [`RouterBackend::sample`] draws tokens. What is
//! between two layers stays on the device. Which tokens make a batch, who holds which block and what experts answer is decided elsewhere.

mod cpu;
mod gate;

use std::fmt;
use std::sync::Arc;

use sirocco_types::{DeviceChoice, GpuReadings, LayerId, ModelSpec, Routing};

use crate::backend::choose;
use crate::cuda::{CudaRouter, DeviceError, KernelSettings};
use crate::{AttentionShape, Draw, Drawn, KvLayer, Pool, Queries};

pub use cpu::{CpuRouter, CpuWeights};
pub(crate) use gate::route;

/// Batches that may be under way at once.
pub const LANES: usize = 2;

/// Bytes of KV cache that a router on the CPU takes unless it is told.
const CPU_KV_BYTES: usize = 1 << 30;

/// A matrix of a router's weights, `[outputs, inputs]`, bf16 in a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RouterMatrix {
    /// `[vocab_size, hidden_size]`, a row for each token.
    Embedding,
    /// `[vocab_size, hidden_size]`, the output projection; the embedding where a model's embeddings are tied.
    LmHead,
    /// `[heads * head_dim, hidden_size]`
    Q(LayerId),
    /// `[kv_heads * head_dim, hidden_size]`
    K(LayerId),
    /// `[kv_heads * head_dim, hidden_size]`
    V(LayerId),
    /// `[hidden_size, heads * head_dim]`
    O(LayerId),
    /// `[num_local_experts, hidden_size]`
    Gate(LayerId),
}

impl RouterMatrix {
    /// Those of a model, in the order in which they are loaded.
    pub fn all(spec: &ModelSpec) -> impl Iterator<Item = Self> + use<> {
        let lm_head = (!spec.tie_word_embeddings).then_some(Self::LmHead);
        let of_layer = |layer| [Self::Q(layer), Self::K(layer), Self::V(layer), Self::O(layer), Self::Gate(layer)];
        [Self::Embedding].into_iter().chain(lm_head).chain(spec.layers().flat_map(of_layer))
    }

    /// Its outputs and inputs.
    pub fn shape(self, spec: &ModelSpec) -> (usize, usize) {
        let (hidden, q) = (spec.hidden_size, spec.num_attention_heads * spec.head_dim);
        match self {
            Self::Embedding | Self::LmHead => (spec.vocab_size, hidden),
            Self::Q(_) => (q, hidden),
            Self::K(_) | Self::V(_) => (spec.num_key_value_heads * spec.head_dim, hidden),
            Self::O(_) => (hidden, q),
            Self::Gate(_) => (spec.num_local_experts, hidden),
        }
    }
}

/// A vector of a router's weights, `[hidden_size]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RouterVector {
    /// Of the RMSNorm before a layer's attention.
    AttentionNorm(LayerId),
    /// Of the RMSNorm before a layer's gate and experts.
    ExpertsNorm(LayerId),
    /// Of the last RMSNorm.
    Norm,
}

impl RouterVector {
    /// Those of a model, in the order in which they are loaded.
    pub fn all(spec: &ModelSpec) -> impl Iterator<Item = Self> + use<> {
        let of_layer = |layer| [Self::AttentionNorm(layer), Self::ExpertsNorm(layer)];
        spec.layers().flat_map(of_layer).chain([Self::Norm])
    }
}

/// What a router must have room for.
#[derive(Clone, Copy, Debug)]
pub struct RouterLimits {
    /// Most tokens of a batch.
    pub step_tokens: usize,
    /// Most queries of a batch, and most rows whose logits are asked for at once.
    pub step_sequences: usize,
    /// Blocks of the KV cache.
    pub kv_blocks: KvBlocks,
}

/// How many blocks a KV cache has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvBlocks {
    /// So many.
    Exactly(usize),
    /// As many as a GPU has room for after all else; on the CPU, whose memory is others' too, as many as a GiB has.
    AsFit {
        /// No more than so many, which is all that can be used.
        most: usize,
    },
}

impl KvBlocks {
    /// How many that are on the CPU, at least one.
    fn on_cpu(self, spec: &ModelSpec) -> usize {
        match self {
            Self::Exactly(blocks) => blocks,
            Self::AsFit { most } => (CPU_KV_BYTES / kv_block_bytes(spec)).min(most).max(1),
        }
    }
}

/// Memory that one block of the KV cache takes, over all layers, bytes.
pub fn kv_block_bytes(spec: &ModelSpec) -> usize {
    spec.num_hidden_layers * KvLayer::block_bytes(&attention_shape(spec))
}

pub(crate) fn attention_shape(spec: &ModelSpec) -> AttentionShape {
    AttentionShape {
        heads: spec.num_attention_heads,
        kv_heads: spec.num_key_value_heads,
        head_dim: spec.head_dim,
        window: spec.sliding_window,
    }
}

/// Tells from any thread how a GPU fares; none when it does not tell.
pub type GpuGauge = Arc<dyn Fn() -> Option<GpuReadings> + Send + Sync>;

/// Keeps all of a model but its experts, and the KV cache, and computes with them.
///
/// Up to [`LANES`] batches are under way at once, each in a lane of its own; no two have a sequence in common. What a token comes to
/// depends neither on its batch mates nor on how its sequence was cut into batches. After an error a batch has to be begun anew, and
/// others may succeed unless it is `Lost`.
pub trait RouterBackend: Send + fmt::Debug {
    /// `cpu` or `cuda`.
    fn kind(&self) -> &'static str;

    /// For people, for example `AMD EPYC, AVX2+FMA, 2 threads`.
    fn name(&self) -> String;

    /// How its GPU fares, when it has one.
    fn gauge(&self) -> Option<GpuGauge>;

    /// Memory of its weights, bytes.
    fn weight_bytes(&self) -> usize;

    /// Blocks of its KV cache.
    fn kv_blocks(&self) -> usize;

    /// Copies all that KV block `from` holds to block `to`, in every layer.
    fn copy_block(&mut self, from: u32, to: u32) -> Result<(), DeviceError>;

    /// Begins a batch, whatever the lane had: embeds `tokens`, at least one, each in the vocabulary, which are those of `queries` one
    /// after the other. The blocks of a query are enough for all positions up to its end, and those before its start are
    /// stored.
    fn begin(&mut self, lane: usize, tokens: &[u32], queries: &[Queries]) -> Result<(), DeviceError>;

    /// RMSNorm, attention, residual, RMSNorm and gate of a layer; stores the batch's keys and values. Writes what the experts are asked,
    /// `[tokens, hidden_size]`, to `normed`, and says who is asked.
    fn attend(&mut self, lane: usize, layer: LayerId, normed: &mut Vec<f32>) -> Result<Routing, DeviceError>;

    /// Adds the weighted sum of each token's experts, `[tokens, hidden_size]`, to the residual stream.
    fn add_experts(&mut self, lane: usize, layer: LayerId, combined: &[f32]) -> Result<(), DeviceError>;

    /// For each query of the batch the layer in which it came to values that are not finite, if it did. From there on it has zeros in their
    /// place, and no other query has seen them.
    fn overflows(&mut self, lane: usize) -> Result<Vec<Option<LayerId>>, DeviceError>;

    /// The logits after each of `rows`, places of tokens in the batch: `[rows, vocab_size]`.
    fn logits(&mut self, lane: usize, rows: &[u32]) -> Result<Vec<f32>, DeviceError>;

    /// What [`sample`](crate::sample) draws from the logits after each of `rows`, as `draws` say. Of equal
    /// logits all devices draw the same, and no others leave the device.
    fn sample(&mut self, lane: usize, rows: &[u32], draws: &[&Draw]) -> Result<Vec<Option<Drawn>>, DeviceError>;
}

/// What a router computes with, before it has weights.
#[derive(Debug)]
pub enum RouterDevice {
    /// The CPU.
    Cpu {
        /// Its threads.
        pool: Pool,
        /// Blocks of the KV cache.
        kv_blocks: usize,
    },
    /// A GPU.
    Cuda {
        /// With all the memory it takes.
        router: Box<CudaRouter>,
        /// Threads that read weights.
        pool: Pool,
    },
}

/// What a router of a model like `spec` computes with, as `choice` wants it; `pool` for the CPU, which is what `auto` falls back to. With
/// it comes why a GPU that may be there is not used, if there is something to say.
pub fn open_router(
    choice: DeviceChoice,
    settings: &KernelSettings,
    spec: &ModelSpec,
    limits: RouterLimits,
    pool: Pool,
) -> Result<(RouterDevice, Option<String>), DeviceError> {
    let (gpu, said) = choose(choice, |ordinal| CudaRouter::open(ordinal, settings, spec, limits))?;
    let device = match gpu {
        Some(router) => RouterDevice::Cuda { router: Box::new(router), pool },
        None => RouterDevice::Cpu { pool, kv_blocks: limits.kv_blocks.on_cpu(spec) },
    };
    Ok((device, said))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda_devices;

    fn spec() -> ModelSpec {
        ModelSpec {
            model_type: "mixtral".into(),
            hidden_size: 32,
            intermediate_size: 64,
            num_hidden_layers: 2,
            num_local_experts: 4,
            num_experts_per_tok: 2,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            head_dim: 8,
            vocab_size: 64,
            max_position_embeddings: 128,
            sliding_window: None,
            rms_norm_eps: 1e-5,
            rope_theta: 1e4,
            tie_word_embeddings: true,
            bos_token_id: None,
            eos_token_ids: vec![2],
            dtype: sirocco_types::Dtype::Bf16,
        }
    }

    #[test]
    fn without_a_gpu_auto_is_the_cpu_and_says_why_and_a_gpu_that_is_asked_for_is_missed_by_name() {
        let open = |choice, kv_blocks| {
            let limits = RouterLimits { step_tokens: 16, step_sequences: 4, kv_blocks };
            open_router(choice, &KernelSettings::default(), &spec(), limits, Pool::new(1).unwrap())
        };
        let on_cpu = |choice, kv_blocks| match open(choice, kv_blocks).unwrap() {
            (RouterDevice::Cpu { kv_blocks, .. }, said) => (kv_blocks, said),
            (device, _) => panic!("{device:?}"),
        };
        let idle = cuda_devices();
        let (blocks, said) = on_cpu(DeviceChoice::Cpu, KvBlocks::Exactly(7));
        assert_eq!((blocks, said.is_some()), (7, !idle.is_empty()));
        if !idle.is_empty() {
            // With a GPU, `cargo xtask gpu-check` says what happens.
            return;
        }
        let (blocks, said) = on_cpu(DeviceChoice::Auto, KvBlocks::AsFit { most: 9 });
        assert_eq!(blocks, 9, "a GiB has more");
        let error = open(DeviceChoice::Cuda(0), KvBlocks::Exactly(7)).unwrap_err();
        assert_eq!(said, Some(error.to_string()));
        let named = ["libcuda.so.1 not found: ", "cuda:0: this machine has 0 NVIDIA GPUs"];
        assert!(named.iter().any(|start| error.to_string().starts_with(start)), "{error}");
    }

    #[test]
    fn the_cache_of_a_router_on_the_cpu_has_a_gib_unless_it_is_told() {
        let many = KvBlocks::AsFit { most: usize::MAX };
        assert_eq!(many.on_cpu(&spec()), (1 << 30) / (2 * 2 * 2 * 16 * 4 * 32));
        let large = ModelSpec { head_dim: 1 << 12, num_key_value_heads: 1 << 10, ..spec() };
        assert_eq!(many.on_cpu(&large), 1, "even when a block takes more");
    }
}
