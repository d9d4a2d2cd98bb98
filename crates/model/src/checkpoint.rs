//! A Hugging Face checkpoint folder, read by byte range.
//!
//! Opening reads the configuration and the headers of the safetensors files and checks that every tensor the model needs is
//! there with the right type and shape. Weights are read later, each tensor by its own byte range, so a node touches only
//! what it holds. Files are read with positioned reads, never mapped: one that shrinks is an error, not a crash.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use half::bf16;
use safetensors::tensor::{Metadata, TensorInfo};
use sirocco_compute::{
    DeviceError, ExpertMatrix, ExpertPacker, ExpertWeights, PackedMatrix, Packer, RouterMatrix, RouterVector,
};
use sirocco_types::{ExpertDtype, ExpertKey, Fingerprint, LayerId, ModelIdentity, ModelSpec};

use crate::config::{read_json, read_spec};
use crate::fingerprint::fingerprint;

/// A header longer than this is no header.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Weights are read and packed about this much at a time, so that no second copy of a matrix is needed and what was read is
/// still in the cache when it is packed.
const READ_BYTES: usize = 256 << 10;

/// What keeps a checkpoint from being read. Each names the file and what in it is wrong.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The path is not a folder.
    #[error("model folder {0}: {1}")]
    Folder(PathBuf, &'static str),
    /// A file cannot be read.
    #[error("{file}: {error}")]
    Read {
        /// Its name in the folder.
        file: String,
        /// Why not.
        error: std::io::Error,
    },
    /// A configuration value is missing or has no meaning.
    #[error("{file}: {key} is {problem}")]
    Config {
        /// The file's name.
        file: &'static str,
        /// The key.
        key: String,
        /// What its value is and must be.
        problem: String,
    },
    /// A safetensors file is not what its header says.
    #[error("{file}: {problem}")]
    Shard {
        /// The file's name.
        file: String,
        /// What is wrong.
        problem: String,
    },
    /// A tensor is missing, or its type or shape does not fit the configuration.
    #[error("tensor {tensor}: {problem}")]
    Tensor {
        /// Its name.
        tensor: String,
        /// What is wrong.
        problem: String,
    },
    /// A tensor's bytes cannot be read.
    #[error("tensor {tensor} in {file}: {error}")]
    Weights {
        /// Its name.
        tensor: String,
        /// The file's name.
        file: String,
        /// Why not; an early end of file means that the file was cut.
        error: std::io::Error,
    },
    /// The device does not take an expert, or a router's weights.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// An open checkpoint: its shape and where each tensor lies. Weights stay in the files.
#[derive(Debug)]
pub struct Checkpoint {
    folder: PathBuf,
    identity: ModelIdentity,
    shards: Vec<Shard>,
    /// Tensor name to index into `shards`.
    tensors: BTreeMap<String, usize>,
}

/// One safetensors file.
#[derive(Debug)]
pub(crate) struct Shard {
    pub(crate) name: String,
    pub(crate) header: Vec<u8>,
    pub(crate) len: u64,
    file: File,
    metadata: Metadata,
}

impl Checkpoint {
    /// Opens `folder` and checks everything but the weights' values.
    pub fn open(folder: &Path) -> Result<Self, CheckpointError> {
        let refuse = |problem| CheckpointError::Folder(folder.to_owned(), problem);
        match std::fs::metadata(folder) {
            Err(_) => return Err(refuse("there is no such folder")),
            Ok(metadata) if !metadata.is_dir() => return Err(refuse("it is not a folder")),
            Ok(_) => {}
        }
        let spec = read_spec(folder)?;
        let (shards, tensors) = open_shards(folder)?;
        let name = folder.canonicalize().ok().and_then(|path| Some(path.file_name()?.to_string_lossy().into_owned()));
        let identity = ModelIdentity {
            name: name.unwrap_or_else(|| "model".into()),
            fingerprint: Fingerprint([0; 32]),
            spec,
            expert_dtype: ExpertDtype::default(),
        };
        let mut checkpoint = Self { folder: folder.to_owned(), identity, shards, tensors };
        checkpoint.check_tensors()?;
        checkpoint.identity.fingerprint = fingerprint(&checkpoint)?;
        Ok(checkpoint)
    }

    /// Where it was opened.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Its name, fingerprint and shape. The name is the folder's.
    pub fn identity(&self) -> &ModelIdentity {
        &self.identity
    }

    /// The model's shape.
    pub fn spec(&self) -> &ModelSpec {
        &self.identity.spec
    }

    /// Bytes of all its files together.
    pub fn bytes(&self) -> u64 {
        self.shards.iter().map(|shard| shard.len).sum()
    }

    /// Reads one expert, and not a byte of another, and keeps it as `dtype` for the CPU.
    pub fn load_expert(&self, key: ExpertKey, dtype: ExpertDtype) -> Result<ExpertWeights, CheckpointError> {
        let spec = self.spec();
        self.load_expert_into(key, ExpertPacker::new(dtype, spec.hidden_size, spec.intermediate_size))
    }

    /// Reads one expert, and not a byte of another, into `packer`, which is new and for experts of this shape.
    pub fn load_expert_into(&self, key: ExpertKey, mut packer: ExpertPacker) -> Result<ExpertWeights, CheckpointError> {
        for (matrix, weight) in [(ExpertMatrix::Gate, "w1"), (ExpertMatrix::Up, "w3"), (ExpertMatrix::Down, "w2")] {
            let rows = |bytes: &[u8]| packer.push_rows(matrix, bytes);
            self.read_rows(&expert_tensor(key, weight), ExpertPacker::ROWS, rows)?;
        }
        Ok(packer.finish()?)
    }

    /// Reads a matrix of a router and packs it for the CPU.
    pub(crate) fn router_matrix(&self, matrix: RouterMatrix) -> Result<PackedMatrix, CheckpointError> {
        let tensor = router_matrix_tensor(matrix);
        let (outputs, inputs) = self.matrix_shape(&tensor)?;
        let mut packer = Packer::new(outputs, inputs);
        self.read_rows(&tensor, Packer::ROWS, |bytes| packer.push_rows(bytes))?;
        Ok(packer.finish())
    }

    /// Passes the rows of a matrix to `push`, a multiple of `multiple` rows at a time and the rest at the end.
    fn read_rows(&self, tensor: &str, multiple: usize, mut push: impl FnMut(&[u8])) -> Result<(), CheckpointError> {
        let (outputs, inputs) = self.matrix_shape(tensor)?;
        let row_bytes = inputs * 2;
        let rows_at_once = (READ_BYTES / row_bytes.max(1)).next_multiple_of(multiple).min(outputs);
        let mut buffer = vec![0; rows_at_once * row_bytes];
        for start in (0..outputs).step_by(rows_at_once) {
            let bytes = &mut buffer[..(outputs - start).min(rows_at_once) * row_bytes];
            self.read(tensor, start * row_bytes, bytes)?;
            push(bytes);
        }
        Ok(())
    }

    /// `(outputs, inputs)` of a matrix.
    fn matrix_shape(&self, tensor: &str) -> Result<(usize, usize), CheckpointError> {
        match *self.find(tensor)?.1.shape {
            [outputs, inputs] => Ok((outputs, inputs)),
            ref shape => Err(bad_tensor(tensor, format!("its shape is {shape:?}, must be a matrix"))),
        }
    }

    /// Reads a matrix of a router as it is stored, `[outputs, inputs]` little-endian bf16.
    pub(crate) fn router_matrix_rows(&self, matrix: RouterMatrix) -> Result<Vec<u8>, CheckpointError> {
        let tensor = router_matrix_tensor(matrix);
        let mut rows = vec![0; self.tensor_bytes(&tensor)?];
        self.read(&tensor, 0, &mut rows)?;
        Ok(rows)
    }

    /// Reads a vector of a router.
    pub(crate) fn router_vector(&self, vector: RouterVector) -> Result<Vec<f32>, CheckpointError> {
        let tensor = router_vector_tensor(vector);
        let mut bytes = vec![0; self.tensor_bytes(&tensor)?];
        self.read(&tensor, 0, &mut bytes)?;
        Ok(bytes.as_chunks::<2>().0.iter().map(|&value| bf16::from_le_bytes(value).to_f32()).collect())
    }

    /// Fills `out` with the tensor's bytes from `offset` on.
    pub(crate) fn read(&self, tensor: &str, offset: usize, out: &mut [u8]) -> Result<(), CheckpointError> {
        let (shard, info) = self.find(tensor)?;
        let start = 8 + shard.header.len() + info.data_offsets.0 + offset;
        shard.file.read_exact_at(out, start as u64).map_err(|error| CheckpointError::Weights {
            tensor: tensor.to_owned(),
            file: shard.name.clone(),
            error,
        })
    }

    pub(crate) fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// Bytes a tensor takes.
    pub(crate) fn tensor_bytes(&self, tensor: &str) -> Result<usize, CheckpointError> {
        self.find(tensor).map(|(_, info)| info.data_offsets.1 - info.data_offsets.0)
    }

    fn find(&self, tensor: &str) -> Result<(&Shard, &TensorInfo), CheckpointError> {
        let shard = self.tensors.get(tensor).map(|&index| &self.shards[index]);
        let found = shard.and_then(|shard| Some((shard, shard.metadata.info(tensor)?)));
        found.ok_or_else(|| bad_tensor(tensor, "the checkpoint has no such tensor"))
    }

    fn check_tensors(&self) -> Result<(), CheckpointError> {
        for (tensor, shape) in expected_tensors(self.spec()) {
            let (shard, info) = self.find(&tensor)?;
            if info.dtype != safetensors::Dtype::BF16 {
                let problem = format!("its dtype in {} is {:?}, must be BF16", shard.name, info.dtype);
                return Err(bad_tensor(&tensor, problem));
            }
            if info.shape != shape {
                let problem = format!("its shape in {} is {:?}, config.json says {shape:?}", shard.name, info.shape);
                return Err(bad_tensor(&tensor, problem));
            }
        }
        Ok(())
    }
}

/// Loads each of `items` with `load` on `threads` threads, which share them as they get done; in the same order.
pub(crate) fn load_each<T: Sync, L: Send>(
    items: &[T],
    threads: usize,
    load: impl Fn(&T) -> Result<L, CheckpointError> + Sync,
) -> Result<Vec<L>, CheckpointError> {
    let next = AtomicUsize::new(0);
    let share = || -> Result<Vec<(usize, L)>, CheckpointError> {
        let mut loaded = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(index) else { return Ok(loaded) };
            loaded.push((index, load(item).inspect_err(|_| next.store(items.len(), Ordering::Relaxed))?));
        }
    };
    let shares: Result<Vec<_>, _> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(share)).collect();
        threads.into_iter().map(|thread| thread.join().expect("a checkpoint is read without a panic")).collect()
    });
    let mut loaded: Vec<_> = shares?.into_iter().flatten().collect();
    loaded.sort_unstable_by_key(|&(index, _)| index);
    Ok(loaded.into_iter().map(|(_, loaded)| loaded).collect())
}

/// The name of one weight (`w1`, `w2` or `w3`) of an expert.
pub(crate) fn expert_tensor(key: ExpertKey, weight: &str) -> String {
    format!("model.layers.{}.block_sparse_moe.experts.{}.{weight}.weight", key.layer, key.expert)
}

/// The name of a matrix of a router.
fn router_matrix_tensor(matrix: RouterMatrix) -> String {
    match matrix {
        RouterMatrix::Embedding => "model.embed_tokens.weight".into(),
        RouterMatrix::LmHead => "lm_head.weight".into(),
        RouterMatrix::Q(layer) => layer_tensor(layer, "self_attn.q_proj"),
        RouterMatrix::K(layer) => layer_tensor(layer, "self_attn.k_proj"),
        RouterMatrix::V(layer) => layer_tensor(layer, "self_attn.v_proj"),
        RouterMatrix::O(layer) => layer_tensor(layer, "self_attn.o_proj"),
        RouterMatrix::Gate(layer) => layer_tensor(layer, "block_sparse_moe.gate"),
    }
}

/// The name of a vector of a router.
fn router_vector_tensor(vector: RouterVector) -> String {
    match vector {
        RouterVector::AttentionNorm(layer) => layer_tensor(layer, "input_layernorm"),
        RouterVector::ExpertsNorm(layer) => layer_tensor(layer, "post_attention_layernorm"),
        RouterVector::Norm => "model.norm.weight".into(),
    }
}

/// The name of a layer's tensor.
pub(crate) fn layer_tensor(layer: LayerId, name: &str) -> String {
    format!("model.layers.{layer}.{name}.weight")
}

fn bad_tensor(tensor: &str, problem: impl Into<String>) -> CheckpointError {
    CheckpointError::Tensor { tensor: tensor.to_owned(), problem: problem.into() }
}

fn open_shards(folder: &Path) -> Result<(Vec<Shard>, BTreeMap<String, usize>), CheckpointError> {
    const SINGLE: &str = "model.safetensors";
    const INDEX: &str = "model.safetensors.index.json";
    let (names, index) = if folder.join(SINGLE).exists() || !folder.join(INDEX).exists() {
        (BTreeSet::from([SINGLE.to_owned()]), None)
    } else {
        let index = read_index(folder, INDEX)?;
        (index.values().cloned().collect(), Some(index))
    };
    let shards: Vec<Shard> = names.iter().map(|name| Shard::open(folder, name)).collect::<Result<_, _>>()?;
    let mut tensors = BTreeMap::new();
    for (position, shard) in shards.iter().enumerate() {
        for tensor in shard.metadata.offset_keys() {
            if index.as_ref().is_none_or(|index| index.get(&tensor) == Some(&shard.name)) {
                tensors.insert(tensor, position);
            }
        }
    }
    Ok((shards, tensors))
}

/// Tensor name to file name.
fn read_index(folder: &Path, file: &'static str) -> Result<BTreeMap<String, String>, CheckpointError> {
    let bad = |problem: String| CheckpointError::Config { file, key: "weight_map".into(), problem };
    let index = read_json(folder, file)?;
    let map = index["weight_map"].as_object().ok_or_else(|| bad("absent".into()))?;
    let mut tensors = BTreeMap::new();
    for (tensor, name) in map {
        let name = name.as_str().unwrap_or_default();
        if name.is_empty() || name.contains(['/', '\\']) || name == ".." {
            return Err(bad(format!("{name:?} for {tensor}, must be the name of a file in the folder")));
        }
        tensors.insert(tensor.clone(), name.to_owned());
    }
    Ok(tensors)
}

impl Shard {
    fn open(folder: &Path, name: &str) -> Result<Self, CheckpointError> {
        let unreadable = |error| CheckpointError::Read { file: name.to_owned(), error };
        let bad = |problem: String| CheckpointError::Shard { file: name.to_owned(), problem };
        let file = File::open(folder.join(name)).map_err(unreadable)?;
        let len = file.metadata().map_err(unreadable)?.len();
        let mut prefix = [0; 8];
        file.read_exact_at(&mut prefix, 0)
            .map_err(|_| bad(format!("it is {len} bytes long, too short for a safetensors header")))?;
        let header_len = u64::from_le_bytes(prefix);
        if header_len > MAX_HEADER_BYTES.min(len.saturating_sub(8)) {
            return Err(bad(format!("its header claims {header_len} bytes, the file has {len}")));
        }
        let mut header = vec![0; header_len as usize];
        file.read_exact_at(&mut header, 8).map_err(unreadable)?;
        let metadata: Metadata =
            serde_json::from_slice(&header).map_err(|error| bad(format!("its header does not parse: {error}")))?;
        let expected = (8 + header_len).saturating_add(metadata.data_len() as u64);
        if len < expected {
            return Err(bad(format!("it is {len} bytes long, its header describes {expected}: the file is truncated")));
        }
        Ok(Self { name: name.to_owned(), header, len, file, metadata })
    }
}

/// Every tensor a model of this shape has, with its shape. One at a time: a configuration may claim more than memory holds.
pub fn expected_tensors(spec: &ModelSpec) -> impl Iterator<Item = (String, Vec<usize>)> {
    let (hidden, inter, experts) = (spec.hidden_size, spec.intermediate_size, spec.num_local_experts);
    let (q, kv) = (spec.num_attention_heads * spec.head_dim, spec.num_key_value_heads * spec.head_dim);
    let lm_head = (!spec.tie_word_embeddings).then_some(("lm_head.weight", vec![spec.vocab_size, hidden]));
    let outer = [("model.embed_tokens.weight", vec![spec.vocab_size, hidden]), ("model.norm.weight", vec![hidden])];
    let layers = spec.layers().flat_map(move |layer| {
        let shapes = [
            ("input_layernorm", vec![hidden]),
            ("post_attention_layernorm", vec![hidden]),
            ("self_attn.q_proj", vec![q, hidden]),
            ("self_attn.k_proj", vec![kv, hidden]),
            ("self_attn.v_proj", vec![kv, hidden]),
            ("self_attn.o_proj", vec![hidden, q]),
            ("block_sparse_moe.gate", vec![experts, hidden]),
        ];
        shapes.map(|(name, shape)| (layer_tensor(layer, name), shape))
    });
    let experts = spec.experts().flat_map(move |key| {
        let shapes = [("w1", vec![inter, hidden]), ("w2", vec![hidden, inter]), ("w3", vec![inter, hidden])];
        shapes.map(|(weight, shape)| (expert_tensor(key, weight), shape))
    });
    outer.into_iter().chain(lm_head).map(|(name, shape)| (name.to_owned(), shape)).chain(layers).chain(experts)
}
