//! What two nodes compare to know that they read the same checkpoint.
//!
//! Covered: the model's shape, each file's name, length and header (every tensor's name, type, shape and place), and the
//! values of each layer's gate, which any training of the whole model changes. Not covered: the other weights' values, so that
//! a node compares fingerprints without reading what it does not hold; a model trained with its gates frozen and stored in the
//! same layout is not told apart. It costs one small read a layer.

use sha2::{Digest as _, Sha256};
use sirocco_types::Fingerprint;

use crate::checkpoint::layer_tensor;
use crate::{Checkpoint, CheckpointError};

pub(crate) fn fingerprint(checkpoint: &Checkpoint) -> Result<Fingerprint, CheckpointError> {
    let mut hash = Sha256::new();
    let mut add = |bytes: &[u8]| {
        hash.update((bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
    };
    add(&serde_json::to_vec(checkpoint.spec()).expect("a spec is plain data"));
    for shard in checkpoint.shards() {
        add(shard.name.as_bytes());
        add(&shard.len.to_le_bytes());
        add(&shard.header);
    }
    for layer in checkpoint.spec().layers() {
        let tensor = layer_tensor(layer, "block_sparse_moe.gate");
        let mut gate = vec![0; checkpoint.tensor_bytes(&tensor)?];
        checkpoint.read(&tensor, 0, &mut gate)?;
        add(&gate);
    }
    Ok(Fingerprint(hash.finalize().into()))
}
