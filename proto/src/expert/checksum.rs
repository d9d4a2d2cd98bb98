//! Checksums of what is said beside the rows: a layer, an expert or a row that changed on the way would bring good rows of
//! something else than was asked for.

use crc_fast::crc32_iscsi;
use prost::Message;

use super::wire;

/// A message of the Dispatch stream.
pub trait Checked: Message + Default {
    /// The field that has its tensor.
    const TENSOR: u32;

    /// CRC-32C of its fields in the order that the `.proto` says, as they are now.
    fn checksum(&self) -> u32;

    /// What its sender says it was.
    fn claimed(&self) -> u32;
}

impl Checked for wire::DispatchRequest {
    const TENSOR: u32 = super::HIDDEN_STATES;

    fn checksum(&self) -> u32 {
        let rows: usize = self.experts.iter().map(|part| part.rows.len() + 2).sum();
        let mut fields = Fields(Vec::with_capacity(128 + size_of::<u32>() * rows));
        fields.long(self.id);
        fields.bytes(&self.model_fingerprint);
        fields.number(self.layer);
        fields.number(self.deadline_ms);
        fields.tensor(self.hidden_states.as_ref());
        fields.count(self.experts.len());
        for part in &self.experts {
            fields.number(part.expert);
            fields.numbers(&part.rows);
        }
        crc32_iscsi(&fields.0)
    }

    fn claimed(&self) -> u32 {
        self.crc32c
    }
}

impl Checked for wire::DispatchResponse {
    const TENSOR: u32 = super::ROWS;

    fn checksum(&self) -> u32 {
        let mut fields = Fields(Vec::with_capacity(128 + 3 * size_of::<u32>() * self.experts.len()));
        fields.long(self.id);
        fields.number(self.status.cast_unsigned());
        fields.bytes(self.message.as_bytes());
        fields.count(self.experts.len());
        for result in &self.experts {
            fields.number(result.expert);
            fields.number(result.status.cast_unsigned());
            fields.bytes(result.message.as_bytes());
        }
        fields.tensor(self.rows.as_ref());
        crc32_iscsi(&fields.0)
    }

    fn claimed(&self) -> u32 {
        self.crc32c
    }
}

/// Fields one after the other.
struct Fields(Vec<u8>);

impl Fields {
    fn long(&mut self, value: u64) {
        self.0.extend(value.to_le_bytes());
    }

    fn number(&mut self, value: u32) {
        self.0.extend(value.to_le_bytes());
    }

    /// Messages have fewer bytes than fit.
    fn count(&mut self, count: usize) {
        self.number(count as u32);
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.count(bytes.len());
        self.0.extend(bytes);
    }

    fn numbers(&mut self, values: &[u32]) {
        self.count(values.len());
        self.0.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    }

    fn tensor(&mut self, tensor: Option<&wire::Tensor>) {
        let (dtype, shape, crc32c) =
            tensor.map_or((0, &[][..], 0), |tensor| (tensor.dtype, tensor.shape.as_slice(), tensor.crc32c));
        self.number(dtype.cast_unsigned());
        self.numbers(shape);
        self.number(crc32c);
    }
}
