//! Messages of the Dispatch stream as chunks of an HTTP/2 body: the bytes of any gRPC peer, without a copy of the rows.
//!
//! A message is written as two chunks, its fields but for the rows' data, and the data itself, which is why the tensor stands
//! last. It is read from whatever chunks the peer's frames come in; data within one frame is used where it arrived. Source:
//! gRPC over HTTP/2, "Length-Prefixed-Message".

use std::collections::VecDeque;

use bytes::{Buf, BufMut as _, Bytes, BytesMut};
use prost::DecodeError;
use prost::Message;
use prost::encoding::{
    DecodeContext, WireType, decode_key, decode_varint, encode_key, encode_varint, encoded_len_varint, key_len,
    skip_field,
};
use tonic::Status;

use super::Checked;
use crate::channel::MAX_MESSAGE_BYTES;
use crate::wire::expert::Tensor;

/// The compressed flag and the length before each message.
const PREFIX_BYTES: usize = 5;

/// The field of a [`Tensor`] that has its elements.
const TENSOR_DATA: u32 = 3;

/// Bytes of a message beside its tensor's data. Decoded they may take sixteen times as much, the data nothing.
const MAX_FIELD_BYTES: usize = 16 << 20;

/// The chunks of one message, `fields` and after them `tensor` as field `tag`. None of them is empty.
///
/// Errors with the size when it is over [`MAX_MESSAGE_BYTES`].
pub(super) fn chunks(fields: &impl Message, tag: u32, tensor: Option<Tensor>) -> Result<Vec<Bytes>, usize> {
    let mut tensor = tensor;
    let data = tensor.as_mut().map(|tensor| std::mem::take(&mut tensor.data)).unwrap_or_default();
    let data_len = if data.is_empty() { 0 } else { delimited_len(TENSOR_DATA, data.len()) };
    let tensor_len = tensor.as_ref().map(|tensor| tensor.encoded_len() + data_len);
    let len = fields.encoded_len() + tensor_len.map_or(0, |len| delimited_len(tag, len));
    if len > MAX_MESSAGE_BYTES {
        return Err(len);
    }
    let mut head = BytesMut::with_capacity(PREFIX_BYTES + len - data.len());
    head.put_u8(0);
    head.put_u32(len as u32);
    fields.encode_raw(&mut head);
    if let (Some(tensor), Some(tensor_len)) = (tensor, tensor_len) {
        delimit(tag, tensor_len, &mut head);
        tensor.encode_raw(&mut head);
        if !data.is_empty() {
            delimit(TENSOR_DATA, data.len(), &mut head);
        }
    }
    let mut chunks = vec![head.freeze()];
    chunks.extend(Some(data).filter(|data| !data.is_empty()));
    Ok(chunks)
}

/// Bytes of a length-delimited field `tag` of `len` bytes.
fn delimited_len(tag: u32, len: usize) -> usize {
    key_len(tag) + encoded_len_varint(len as u64) + len
}

fn delimit(tag: u32, len: usize, head: &mut BytesMut) {
    encode_key(tag, WireType::LengthDelimited, head);
    encode_varint(len as u64, head);
}

/// What has come of a stream of messages and is not decoded yet.
#[derive(Debug, Default)]
pub(super) struct Inbox {
    chunks: Chunks,
    /// Of the message whose prefix has been read.
    len: Option<usize>,
}

impl Inbox {
    /// Takes in a frame's data.
    pub(super) fn push(&mut self, chunk: Bytes) {
        self.chunks.push(chunk);
    }

    /// Whether the stream may end here.
    pub(super) fn is_empty(&self) -> bool {
        self.len.is_none() && self.chunks.len == 0
    }

    /// The next message, when it is there as a whole.
    ///
    /// Errors when it is compressed (`INTERNAL`), too long (`OUT_OF_RANGE`), not the message it should be (`INVALID_ARGUMENT`
    /// with the field's name) or changed on the way (`DATA_LOSS`). Nothing after it can be read then.
    pub(super) fn next<M: Checked>(&mut self) -> Result<Option<M>, Status> {
        let len = match self.len {
            Some(len) => len,
            None if self.chunks.len < PREFIX_BYTES => return Ok(None),
            None => {
                let flag = self.chunks.get_u8();
                if flag != 0 {
                    return Err(Status::internal(format!(
                        "compressed flag: {flag}, messages of this stream must be plain (0)"
                    )));
                }
                let len = self.chunks.get_u32() as usize;
                if len > MAX_MESSAGE_BYTES {
                    return Err(Status::out_of_range(format!(
                        "message of {len} bytes, the limit is {MAX_MESSAGE_BYTES}"
                    )));
                }
                *self.len.insert(len)
            }
        };
        if self.chunks.len < len {
            return Ok(None);
        }
        self.len = None;
        if len > MAX_FIELD_BYTES {
            let fields = field_bytes(&mut self.chunks.clone().take(len), M::TENSOR);
            let fields = fields.map_err(|error| Status::invalid_argument(error.to_string()))?;
            if fields > MAX_FIELD_BYTES {
                return Err(Status::out_of_range(format!(
                    "message with {fields} bytes beside its rows, the limit is {MAX_FIELD_BYTES}"
                )));
            }
        }
        let message = M::decode((&mut self.chunks).take(len));
        let message = message.map_err(|error| Status::invalid_argument(error.to_string()))?;
        // Not even its id can be trusted.
        let (actual, claimed) = (message.checksum(), message.claimed());
        if actual != claimed {
            return Err(Status::data_loss(format!(
                "crc32c: {claimed:08x}, that of the message's fields is {actual:08x}"
            )));
        }
        Ok(Some(message))
    }
}

/// Bytes of a message but for the data of the tensor that is its field `tensor`. Decodes nothing; of what cannot be decoded it may
/// be anything.
fn field_bytes(message: &mut impl Buf, tensor: u32) -> Result<usize, DecodeError> {
    let all = message.remaining();
    let mut data = 0;
    let mut after_tensor = all; // bytes that remain where the tensor that is being read ends
    while message.has_remaining() {
        let in_tensor = message.remaining() > after_tensor;
        let (tag, kind) = decode_key(message)?;
        if kind == WireType::LengthDelimited && tag == if in_tensor { TENSOR_DATA } else { tensor } {
            let len = usize::try_from(decode_varint(message)?).unwrap_or(usize::MAX).min(message.remaining());
            if in_tensor {
                data += len;
                message.advance(len);
            } else {
                after_tensor = message.remaining() - len;
            }
        } else {
            skip_field(kind, tag, message, DecodeContext::default())?;
        }
    }
    Ok(all - data)
}

/// Chunks read as one. What lies within one of them is lent, not copied.
#[derive(Clone, Debug, Default)]
struct Chunks {
    /// None of them empty.
    chunks: VecDeque<Bytes>,
    /// Of all of them.
    len: usize,
}

impl Chunks {
    fn push(&mut self, chunk: Bytes) {
        if !chunk.is_empty() {
            self.len += chunk.len();
            self.chunks.push_back(chunk);
        }
    }
}

impl Buf for Chunks {
    fn remaining(&self) -> usize {
        self.len
    }

    fn chunk(&self) -> &[u8] {
        self.chunks.front().map_or(&[], |chunk| chunk)
    }

    fn advance(&mut self, mut count: usize) {
        self.len -= count;
        while let Some(first) = self.chunks.front_mut() {
            if count < first.len() {
                return first.advance(count);
            }
            count -= first.len();
            self.chunks.pop_front();
        }
    }

    fn copy_to_bytes(&mut self, count: usize) -> Bytes {
        match self.chunks.front() {
            Some(first) if count <= first.len() => {
                let bytes = first.slice(..count);
                self.advance(count);
                bytes
            }
            _ => {
                let mut bytes = BytesMut::with_capacity(count);
                bytes.put(self.take(count));
                bytes.freeze()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tonic::Code;

    use super::*;
    use crate::Rows;
    use crate::wire::expert::{DispatchRequest, ExpertRows};

    const HIDDEN_STATES: u32 = super::super::HIDDEN_STATES;

    fn request(rows: usize) -> DispatchRequest {
        let mut request = DispatchRequest {
            id: 7,
            model_fingerprint: Bytes::from_static(&[9; 32]),
            layer: 3,
            deadline_ms: 250,
            hidden_states: Some(Rows::new((0..rows * 4).map(|value| value as f32).collect(), 4).into_wire()),
            experts: vec![ExpertRows { expert: 5, rows: (0..rows as u32).collect() }],
            crc32c: 0,
        };
        request.crc32c = request.checksum();
        request
    }

    fn written(request: &DispatchRequest) -> Vec<Bytes> {
        let fields = DispatchRequest { hidden_states: None, ..request.clone() };
        chunks(&fields, HIDDEN_STATES, request.hidden_states.clone()).unwrap()
    }

    proptest! {
        #[test]
        fn a_message_reads_the_same_however_it_is_cut(rows in 0usize..40, cuts in proptest::collection::vec(0usize..900, 0..6)) {
            let requests = [request(rows), request(2 * rows), request(0)];
            let bytes = requests.iter().flat_map(written).flatten().collect::<Bytes>();
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(bytes.len())).chain([0, bytes.len()]).collect();
            cuts.sort_unstable();
            let mut inbox = Inbox::default();
            let mut read = Vec::new();
            for piece in cuts.windows(2) {
                inbox.push(bytes.slice(piece[0]..piece[1]));
                while let Some(message) = inbox.next::<DispatchRequest>().unwrap() {
                    read.push(message);
                }
            }
            prop_assert_eq!(read, requests);
            prop_assert!(inbox.is_empty());
        }
    }

    #[test]
    fn any_decoder_reads_what_is_written() {
        for rows in [0, 1, 300] {
            let bytes = written(&request(rows)).concat();
            assert_eq!(
                bytes[..PREFIX_BYTES],
                [&[0][..], &((bytes.len() - PREFIX_BYTES) as u32).to_be_bytes()].concat()
            );
            assert_eq!(DispatchRequest::decode(&bytes[PREFIX_BYTES..]), Ok(request(rows)));
        }
    }

    #[test]
    fn rows_are_neither_copied_when_written_nor_when_read_from_one_frame() {
        let request = request(100);
        let data = request.hidden_states.as_ref().unwrap().data.as_ptr();
        let mut inbox = Inbox::default();
        for chunk in written(&request) {
            inbox.push(chunk);
        }
        let read = inbox.next::<DispatchRequest>().unwrap().unwrap();
        assert_eq!(read.hidden_states.unwrap().data.as_ptr(), data);
    }

    #[test]
    fn what_is_no_message_is_refused() {
        let too_long = [&[0][..], &(MAX_MESSAGE_BYTES as u32 + 1).to_be_bytes()].concat();
        let wrong_field = [0, 0, 0, 0, 3, 0x1a, 1, b'x'].to_vec(); // layer as a string
        let cases = [
            (vec![1, 0, 0, 0, 0], Code::Internal, "compressed flag: 1"),
            (too_long, Code::OutOfRange, "the limit is 536870912"),
            (wrong_field, Code::InvalidArgument, "DispatchRequest.layer"),
        ];
        for (bytes, code, message) in cases {
            let mut inbox = Inbox::default();
            inbox.push(bytes.into());
            let status = inbox.next::<DispatchRequest>().unwrap_err();
            assert_eq!(status.code(), code);
            assert!(status.message().contains(message), "{status}");
        }
    }

    #[test]
    fn a_message_of_many_small_fields_is_refused_before_they_take_memory() {
        let empty_expert = [6 << 3 | 2, 0];
        for (experts, refused) in [(MAX_FIELD_BYTES / 2 - 100, false), (MAX_FIELD_BYTES / 2, true)] {
            let message = [request(2).encode_to_vec(), empty_expert.repeat(experts)].concat();
            let mut inbox = Inbox::default();
            inbox.push([&[0][..], &(message.len() as u32).to_be_bytes(), &message].concat().into());
            let status = inbox.next::<DispatchRequest>().unwrap_err();
            // One that is not refused for that was changed on the way.
            assert_eq!(status.code(), if refused { Code::OutOfRange } else { Code::DataLoss }, "{status}");
            assert_eq!(status.message().contains("beside its rows"), refused, "{status}");
        }
    }

    #[test]
    fn only_the_elements_of_the_tensor_are_not_counted() {
        for rows in [0, 1, 300] {
            let message = request(rows);
            let tensor = message.hidden_states.clone().unwrap();
            let (bytes, data) = (message.encode_to_vec(), tensor.data.len());
            assert_eq!(field_bytes(&mut &bytes[..], HIDDEN_STATES).unwrap(), bytes.len() - data);
            // Elsewhere the same bytes count.
            assert_eq!(field_bytes(&mut &bytes[..], HIDDEN_STATES + 1).unwrap(), bytes.len());
            assert_eq!(field_bytes(&mut &tensor.encode_to_vec()[..], HIDDEN_STATES).unwrap(), tensor.encoded_len());
        }
    }

    #[test]
    fn a_message_over_the_limit_is_not_written() {
        let tensor = Tensor { data: vec![0; MAX_MESSAGE_BYTES].into(), ..Tensor::default() };
        let size = chunks(&DispatchRequest::default(), HIDDEN_STATES, Some(tensor)).unwrap_err();
        assert!(size > MAX_MESSAGE_BYTES);
    }
}
