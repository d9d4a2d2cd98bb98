//! What several end-to-end tests share: the goldens, the local oracle, and a client that keeps everything it is told.

use futures::executor::block_on;
use serde_json::Value;
use sirocco_compute::{Pool, RouterDevice};
use sirocco_model::{Checkpoint, LocalExperts, Logits, Model, SequenceChunk};
use sirocco_proto::channel::{self, MAX_MESSAGE_BYTES};
use sirocco_proto::inference::InferenceServiceClient;
use sirocco_proto::tonic::Status;
use sirocco_proto::wire::inference as wire;
use sirocco_proto::wire::inference::generate_response::Event;
use sirocco_testkit::repository;
use sirocco_types::ExpertDtype;

/// A prompt with what Hugging Face transformers makes of it.
pub(crate) struct Golden {
    pub(crate) prompt: String,
    pub(crate) input_ids: Vec<u32>,
    pub(crate) greedy_ids: Vec<u32>,
    pub(crate) greedy_text: String,
    /// For the first steps, the five highest logits: ids and values.
    pub(crate) top5: Vec<(Vec<u32>, Vec<f64>)>,
    /// By layer and prompt token, the experts.
    pub(crate) routing: Vec<Vec<Vec<u32>>>,
}

/// Reads the bundled model's goldens.
pub(crate) fn goldens() -> Vec<Golden> {
    let text = std::fs::read(repository("tests/data/demo/golden.json")).unwrap();
    let golden: Value = serde_json::from_slice(&text).unwrap();
    let list = |value: &Value| -> Vec<u32> { serde_json::from_value(value.clone()).unwrap() };
    let read = |case: &Value| Golden {
        prompt: case["prompt"].as_str().unwrap().to_owned(),
        input_ids: list(&case["input_ids"]),
        greedy_ids: list(&case["greedy_ids"]),
        greedy_text: case["greedy_text"].as_str().unwrap().to_owned(),
        top5: case["top5"]
            .as_array()
            .unwrap()
            .iter()
            .map(|top| (list(&top["ids"]), serde_json::from_value(top["values"].clone()).unwrap()))
            .collect(),
        routing: case["router"]
            .as_array()
            .unwrap()
            .iter()
            .map(|layer| serde_json::from_value(layer["ids"].clone()).unwrap())
            .collect(),
    };
    golden["prompts"].as_array().unwrap().iter().map(read).collect()
}

/// What a completion computed on the way.
#[derive(Default)]
pub(crate) struct Traced {
    pub(crate) ids: Vec<u32>,
    pub(crate) text: String,
    /// The bits of every token's logits.
    pub(crate) logits: Vec<Vec<u32>>,
    /// For each token, by layer, the experts of the positions computed for it, flat.
    pub(crate) experts: Vec<Vec<Vec<u32>>>,
    /// The bits of the gate's weights, in the same places.
    pub(crate) weights: Vec<Vec<Vec<u32>>>,
}

/// A greedy request.
pub(crate) fn greedy(prompt: &str, max_tokens: u32) -> wire::GenerateRequest {
    wire::GenerateRequest {
        prompt: Some(wire::generate_request::Prompt::Text(prompt.to_owned())),
        sampling: Some(wire::SamplingParams { temperature: Some(0.0), ..Default::default() }),
        max_tokens: Some(max_tokens),
        ..Default::default()
    }
}

/// Has a router complete `request` and keeps what it says.
pub(crate) async fn generate(router: &str, request: wire::GenerateRequest) -> Result<Traced, Status> {
    generate_watched(router, request, |_| ()).await
}

/// As [`generate`]; `watch` is told after each token how many there are.
pub(crate) async fn generate_watched(
    router: &str,
    request: wire::GenerateRequest,
    mut watch: impl FnMut(usize),
) -> Result<Traced, Status> {
    let channel = channel::connect(router).await.map_err(|error| Status::unavailable(error.to_string()))?;
    let mut client = InferenceServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES);
    let mut events = client.generate(request).await?.into_inner();
    let mut traced = Traced::default();
    while let Some(response) = events.message().await? {
        match response.event {
            Some(Event::Token(token)) => {
                traced.ids.push(token.id);
                traced.text += &token.text;
                let (logits, _) = token.logits.as_chunks::<4>();
                traced.logits.push(logits.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect());
                let bits = |layer: &wire::LayerRouting| layer.weights.iter().map(|w| w.to_bits()).collect();
                traced.weights.push(token.routing.iter().map(bits).collect());
                traced.experts.push(token.routing.into_iter().map(|layer| layer.experts).collect());
                watch(traced.ids.len());
            }
            Some(Event::Finished(finished)) => {
                traced.text += &finished.text;
                return Ok(traced);
            }
            Some(Event::Started(_)) | None => {}
        }
    }
    Err(Status::data_loss("the stream ended before the completion did"))
}

/// The whole bundled model in this process.
pub(crate) struct Local {
    model: Model,
    experts: LocalExperts,
}

impl Local {
    pub(crate) fn load() -> Self {
        let checkpoint = Checkpoint::open(&repository("models/demo")).unwrap();
        let pool = Pool::new(2).unwrap();
        let model = Model::load(&checkpoint, RouterDevice::Cpu { pool: pool.clone(), kv_blocks: 16 }).unwrap();
        let experts = LocalExperts::load(&checkpoint, ExpertDtype::Bf16, pool).unwrap();
        Self { model, experts }
    }

    /// The same as [`generate`] for a greedy request, without text.
    pub(crate) fn generate(&mut self, prompt: &[u32], max_tokens: usize) -> Traced {
        let blocks: Vec<u32> = (0..16).collect();
        let mut tokens = prompt.to_vec();
        let (mut start, mut traced) = (0, Traced::default());
        for _ in 0..max_tokens {
            let chunk =
                SequenceChunk { blocks: &blocks, start, tokens: &tokens[start..], logits: Logits::Last, until: None };
            let step = block_on(self.model.forward(&[&[chunk]], &self.experts)).unwrap();
            let logits = &step.logits[0];
            let best = (0..logits.len()).fold(0, |best, id| if logits[id] > logits[best] { id } else { best });
            start = tokens.len();
            tokens.push(best as u32);
            traced.ids.push(best as u32);
            traced.logits.push(logits.iter().map(|x| x.to_bits()).collect());
            let experts = |layer: &sirocco_types::Routing| layer.experts.iter().map(|e| e.0).collect();
            traced.experts.push(step.routing.iter().map(experts).collect());
            let weights = |layer: &sirocco_types::Routing| layer.weights.iter().map(|w| w.to_bits()).collect();
            traced.weights.push(step.routing.iter().map(weights).collect());
        }
        traced
    }
}
