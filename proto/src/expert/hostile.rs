//! Dispatch messages that were damaged on the way, or made by somebody who does not keep to the rules, by seeds that replay alone:
//! nothing panics, nothing that changed is taken for what was sent, and nothing is left behind.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use futures::executor::block_on;
use http_body::{Body as _, Frame};
use prost::Message;
use prost::encoding::{WireType, encode_key, encode_varint};
use sirocco_types::{ExpertHoldings, NodeId};
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tonic::codegen::{Service as _, http};

use super::message::Inbox;
use super::*;

/// Of each direction.
const CASES: u64 = 50_000;

/// Numbers that look random, the same for the same seed. Source: splitmix64.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % end as u64) as usize
    }

    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    /// A value from small to the largest.
    fn number(&mut self) -> u32 {
        (self.below(1 << 32) as u32) >> self.below(32)
    }

    /// A part of `0..len`, which may be empty.
    fn range(&mut self, len: usize) -> std::ops::Range<usize> {
        let start = self.below(len + 1);
        start..start + self.below((len - start).min(24) + 1)
    }
}

fn request(id: u64, random: &mut Random) -> DispatchRequest {
    let (rows, width) = (random.below(5), 1 + random.below(6));
    let values = (0..rows * width).map(|_| f32::from_bits(random.number())).collect();
    let experts = (0..random.below(4)).map(|_| {
        let count = if rows == 0 { 0 } else { random.below(6) };
        ExpertRows {
            expert: ExpertId(random.below(300) as u32),
            rows: (0..count).map(|_| random.below(rows) as u32).collect(),
        }
    });
    let experts = experts.collect();
    DispatchRequest {
        id,
        fingerprint: Fingerprint([random.below(256) as u8; 32]),
        layer: LayerId(random.below(80) as u32),
        deadline: random.one_in(2).then(|| Duration::from_millis(1 + random.below(60_000) as u64)),
        hidden_states: Rows::new(values, width),
        experts,
    }
}

/// What a node makes of `request`: anything that differs for each.
fn answer(request: &DispatchRequest) -> Result<ExpertOutputs, Refusal> {
    if request.layer.0.is_multiple_of(5) {
        return Err(Refusal::new(RefusalReason::Unavailable, format!("layer {} rests", request.layer)));
    }
    let (mut experts, mut rows) = (Vec::new(), Vec::new());
    for part in &request.experts {
        if part.expert.0.is_multiple_of(7) {
            experts.push((part.expert, Err(Refusal::new(RefusalReason::NotHeld, "elsewhere"))));
            continue;
        }
        experts.push((part.expert, Ok(())));
        part.rows.iter().for_each(|row| request.hidden_states.append_row(*row as usize, &mut rows));
    }
    let rows = if rows.is_empty() { Rows::default() } else { Rows::new(rows, request.hidden_states.width()) };
    Ok(ExpertOutputs { experts, rows })
}

/// A node that notes what it is asked.
#[derive(Clone, Default)]
struct Witness {
    asked: Arc<Mutex<Vec<Result<DispatchRequest, Refusal>>>>,
    /// One more for each answer under way.
    live: Arc<()>,
}

impl Node for Witness {
    fn describe(&self) -> Description {
        Description {
            id: NodeId::new("witness").unwrap(),
            fingerprint: Fingerprint([0; 32]),
            holdings: ExpertHoldings::default(),
        }
    }

    fn answer(
        &self,
        request: Result<DispatchRequest, Refusal>,
    ) -> impl Future<Output = Result<ExpertOutputs, Refusal>> + Send + 'static {
        self.asked.lock().unwrap().push(request.clone());
        let live = Arc::clone(&self.live);
        async move {
            tokio::task::yield_now().await;
            drop(live);
            answer(&request?)
        }
    }
}

/// A body that comes in pieces and may break off.
struct Pieces {
    left: VecDeque<Bytes>,
    breaks: bool,
    waits: bool,
}

impl Pieces {
    fn new(bytes: &Bytes, random: &mut Random) -> Self {
        let mut pieces = VecDeque::new();
        let mut start = 0;
        while start < bytes.len() {
            let end = bytes.len().min(start + 1 + random.below(200));
            pieces.push_back(bytes.slice(start..end));
            start = end;
        }
        Self { left: pieces, breaks: random.one_in(8), waits: false }
    }
}

impl http_body::Body for Pieces {
    type Data = Bytes;
    type Error = tonic::Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, tonic::Status>>> {
        self.waits = !self.waits;
        if self.waits {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let broken = || Some(Err(tonic::Status::unavailable("broken off")));
        Poll::Ready(match self.left.pop_front() {
            Some(piece) => Some(Ok(Frame::data(piece))),
            None if std::mem::take(&mut self.breaks) => broken(),
            None => None,
        })
    }
}

/// As it stands on a stream.
fn framed(message: &impl Message) -> Vec<u8> {
    let body = message.encode_to_vec();
    [&[0][..], &(body.len() as u32).to_be_bytes(), &body].concat()
}

/// Writes the length of the body that follows the prefix.
fn measure(message: &mut [u8]) {
    let len = message.len().saturating_sub(5) as u32;
    if let Some(field) = message.get_mut(1..5) {
        field.copy_from_slice(&len.to_be_bytes());
    }
}

/// What becomes of `messages` on the way.
fn damaged(mut messages: Vec<Vec<u8>>, random: &mut Random) -> Bytes {
    let which = random.below(messages.len());
    let other = messages[random.below(messages.len())].clone();
    let kind = random.below(14);
    let message = &mut messages[which];
    match kind {
        0 => {
            message.extend(unknown_field(random));
            measure(message);
        }
        1 => {
            message.extend([0xff; 11]);
            measure(message);
        }
        2 => {
            // A field that claims to be longer than anything.
            encode_key(1 + random.below(9) as u32, WireType::LengthDelimited, message);
            encode_varint(u64::MAX >> random.below(64), message);
            measure(message);
        }
        3 => {
            message.extend_from_slice(&other[5..]);
            measure(message);
        }
        4 => {
            let part = random.range(message.len() - 5);
            let part = message[5 + part.start..5 + part.end].to_vec();
            message.extend(part);
            measure(message);
        }
        5 => {
            let len = [random.number(), message.len() as u32 - 5 + random.below(9) as u32 - 4][random.below(2)];
            message[1..5].copy_from_slice(&len.to_be_bytes());
        }
        6 => message[0] = 1 + random.below(255) as u8,
        7 => drop(messages.remove(which)),
        8 => messages.push(other),
        9 => messages.reverse(),
        kind => {
            let mut bytes = messages.concat();
            let part = random.range(bytes.len());
            match kind {
                10 => (0..=random.below(8)).for_each(|_| {
                    let byte = random.below(bytes.len());
                    bytes[byte] ^= 1 << random.below(8);
                }),
                11 => bytes.truncate(part.start),
                12 => bytes[part].iter_mut().for_each(|byte| *byte = random.below(256) as u8),
                _ => {
                    let copy = if random.one_in(2) { bytes[part.clone()].to_vec() } else { Vec::new() };
                    let into = random.range(bytes.len());
                    drop(bytes.splice(into, copy));
                }
            }
            return bytes.into();
        }
    }
    messages.concat().into()
}

/// A field that no version has, of any wire type.
fn unknown_field(random: &mut Random) -> Vec<u8> {
    let mut field = Vec::new();
    let tag = 100 + random.below(1 << 20) as u32;
    match random.below(4) {
        0 => {
            encode_key(tag, WireType::Varint, &mut field);
            encode_varint(u64::from(random.number()), &mut field);
        }
        1 => {
            encode_key(tag, WireType::SixtyFourBit, &mut field);
            field.extend([1; 8]);
        }
        2 => {
            encode_key(tag, WireType::LengthDelimited, &mut field);
            encode_varint(3, &mut field);
            field.extend(b"new");
        }
        _ => {
            encode_key(tag, WireType::ThirtyTwoBit, &mut field);
            field.extend([1; 4]);
        }
    }
    field
}

/// Changes a tensor that its sender then vouches for.
fn lie_of_tensor(tensor: &mut wire::Tensor, random: &mut Random) {
    match random.below(5) {
        0 => tensor.dtype = random.number().cast_signed(),
        1 => tensor.shape = (0..random.below(4)).map(|_| random.number()).collect(),
        2 => tensor.data.truncate(random.below(tensor.data.len() + 1)),
        3 => tensor.crc32c ^= 1 << random.below(32),
        _ => tensor.data = [&tensor.data[..], b"more"].concat().into(),
    }
}

/// A request whose sender vouches for nonsense.
fn lying_request(mut request: wire::DispatchRequest, random: &mut Random) -> wire::DispatchRequest {
    match (random.below(6), request.experts.first_mut()) {
        (0, _) => request.model_fingerprint.truncate(random.below(32)),
        (1, _) => request.hidden_states = None,
        (2, Some(part)) => part.rows.push(random.number()),
        (3, Some(part)) => part.expert = random.number(),
        (4, _) => (request.id, request.layer) = (u64::MAX - u64::from(random.number()), random.number()),
        _ => request.hidden_states.iter_mut().for_each(|tensor| lie_of_tensor(tensor, random)),
    }
    request.crc32c = request.checksum();
    request
}

/// An answer whose sender vouches for nonsense.
fn lying_response(mut response: wire::DispatchResponse, random: &mut Random) -> wire::DispatchResponse {
    match (random.below(6), response.experts.first_mut()) {
        (0, _) => response.status = random.number().cast_signed(),
        (1, _) => response.id = u64::from(random.number()),
        (2, Some(result)) => result.expert = random.number(),
        (3, Some(result)) => result.status = random.number().cast_signed(),
        (4, _) => response.rows = None,
        _ => response.rows.iter_mut().for_each(|tensor| lie_of_tensor(tensor, random)),
    }
    response.crc32c = response.checksum();
    response
}

fn is_sound(rows: &Rows) -> bool {
    let mut values = Vec::new();
    rows.append_rows(0..rows.len(), &mut values);
    values.len() == rows.len() * rows.width()
}

/// Serves a stream of `bytes` to its end and returns what was answered.
fn serve(node: &Witness, bytes: &Bytes, random: &mut Random) -> Vec<DispatchResponse> {
    let mut server = ExpertServer::new(node.clone(), CancellationToken::new());
    let request = http::Request::post(DISPATCH_PATH).body(Body::new(Pieces::new(bytes, random))).unwrap();
    block_on(async {
        let mut answers = server.call(request).await.unwrap().into_body();
        let (mut inbox, mut read) = (Inbox::default(), Vec::new());
        while let Some(frame) = std::future::poll_fn(|cx| Pin::new(&mut answers).poll_frame(cx)).await {
            let Ok(data) = frame.unwrap().into_data() else { continue };
            inbox.push(data);
            while let Some(response) = inbox.next::<wire::DispatchResponse>().unwrap() {
                read.push(DispatchResponse::from_wire(response));
            }
        }
        assert!(inbox.is_empty(), "the stream ends after an answer");
        read
    })
}

#[test]
fn no_damaged_request_is_run_as_something_else() {
    let (mut whole, mut refused, mut broken) = (0, 0, 0);
    for seed in 0..CASES {
        let mut random = Random(seed);
        let sent: Vec<_> = (0..=random.below(3) as u64).map(|id| request(id, &mut random)).collect();
        let node = Witness::default();
        let lies = random.one_in(4);
        let bytes = if lies {
            let messages = sent.iter().map(|request| framed(&lying_request(request.clone().into_wire(), &mut random)));
            messages.flatten().collect()
        } else {
            damaged(sent.iter().map(|request| framed(&request.clone().into_wire())).collect(), &mut random)
        };
        let answers = serve(&node, &bytes, &mut random);

        let asked = node.asked.lock().unwrap();
        let taken: Vec<&DispatchRequest> = asked.iter().flatten().collect();
        for request in &taken {
            if lies {
                let within = |row: &u32| (*row as usize) < request.hidden_states.len();
                let rows = request.experts.iter().all(|part| part.rows.iter().all(within));
                assert!(rows && is_sound(&request.hidden_states), "seed {seed}");
            } else {
                assert!(sent.contains(request), "seed {seed}: {request:?} was never sent");
            }
        }
        for response in &answers {
            let known = |request: &&&DispatchRequest| request.id == response.id && answer(request) == response.result;
            assert!(response.result.is_err() || taken.iter().any(|r| known(&r)), "seed {seed}: {response:?}");
        }
        assert_eq!(Arc::strong_count(&node.live), 1, "seed {seed}: an answer is under way without its stream");
        whole += taken.len();
        refused += asked.len() - taken.len();
        broken += usize::from(asked.len() < sent.len());
    }
    assert!(whole > 10_000 && refused > 5_000 && broken > 10_000, "{whole} run, {refused} refused, {broken} broken");
}

#[test]
fn no_damaged_answer_is_taken_for_another() {
    let (mut whole, mut refused, mut broken) = (0, 0, 0);
    for seed in CASES..2 * CASES {
        let mut random = Random(seed);
        let answered = |id, random: &mut Random| DispatchResponse { id, result: answer(&request(id, random)) };
        let sent: Vec<_> = (0..=random.below(3) as u64).map(|id| answered(id, &mut random)).collect();
        let lies = random.one_in(4);
        let bytes: Bytes = if lies {
            let messages =
                sent.iter().map(|response| framed(&lying_response(response.clone().into_wire(), &mut random)));
            messages.flatten().collect()
        } else {
            damaged(sent.iter().map(|response| framed(&response.clone().into_wire())).collect(), &mut random)
        };
        let mut inbox = Inbox::default();
        let mut read = 0;
        'stream: for piece in Pieces::new(&bytes, &mut random).left {
            inbox.push(piece);
            loop {
                let response = match inbox.next::<wire::DispatchResponse>() {
                    Ok(Some(response)) => DispatchResponse::from_wire(response),
                    Ok(None) => break,
                    Err(_) => break 'stream,
                };
                read += 1;
                match &response.result {
                    Ok(outputs) if lies => assert!(is_sound(&outputs.rows), "seed {seed}"),
                    _ if lies => {}
                    // Its fields are whole, its rows are not.
                    Err(Refusal { reason: RefusalReason::Corrupt | RefusalReason::Invalid, .. }) => {
                        assert!(sent.iter().any(|sent| sent.id == response.id), "seed {seed}");
                    }
                    _ => assert!(sent.contains(&response), "seed {seed}: {response:?} was never sent"),
                }
                whole += usize::from(response.result.is_ok());
                refused += usize::from(response.result.is_err());
            }
        }
        broken += usize::from(read < sent.len());
    }
    assert!(whole > 10_000 && refused > 5_000 && broken > 10_000, "{whole} whole, {refused} refused, {broken} broken");
}
