//! The bundled model, and a second tiny Mixtral, against what Hugging Face transformers computes from the same files.

use std::path::PathBuf;

use futures::executor::block_on;
use serde_json::Value;
use sirocco_compute::{Pool, RouterDevice};
use sirocco_model::{Checkpoint, Detokenizer, LocalExperts, Logits, Model, SequenceChunk, StepOutput, Tokenizer};
use sirocco_types::ExpertDtype;

/// How far a logit may be from transformers' own.
const LOGIT_TOLERANCE: f64 = 1e-3;

struct Setup {
    checkpoint: Checkpoint,
    model: Model,
    experts: LocalExperts,
}

fn path(relative: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..").join(relative)
}

fn open(folder: &str, threads: usize) -> Setup {
    open_as(folder, ExpertDtype::Bf16, threads)
}

fn open_as(folder: &str, dtype: ExpertDtype, threads: usize) -> Setup {
    let checkpoint = Checkpoint::open(&path(folder)).unwrap();
    let pool = Pool::new(threads).unwrap();
    let model = Model::load(&checkpoint, RouterDevice::Cpu { pool: pool.clone(), kv_blocks: 16 }).unwrap();
    let experts = LocalExperts::load(&checkpoint, dtype, pool).unwrap();
    Setup { checkpoint, model, experts }
}

fn golden(file: &str) -> Value {
    serde_json::from_slice(&std::fs::read(path(file)).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn floats(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

/// The ids and values of the five highest logits.
fn top5(logits: &[f32]) -> (Vec<u32>, Vec<f64>) {
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    order.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]));
    order.truncate(5);
    (order.clone(), order.iter().map(|id| f64::from(logits[*id as usize])).collect())
}

fn assert_close(got: &[f64], want: &[f64], tolerance: f64, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (got, want) in got.iter().zip(want) {
        assert!((got - want).abs() <= tolerance, "{what}: {got} is not {want}");
    }
}

/// Computes the prompt, then `new` greedy tokens; returns each step.
fn greedy(setup: &mut Setup, prompt: &[u32], new: usize) -> (Vec<u32>, Vec<StepOutput>) {
    let blocks: Vec<u32> = (0..16).collect();
    let mut tokens = prompt.to_vec();
    let (mut start, mut steps) = (0, Vec::new());
    for _ in 0..new {
        let chunk =
            SequenceChunk { blocks: &blocks, start, tokens: &tokens[start..], logits: Logits::Last, until: None };
        let step = block_on(setup.model.forward(&[&[chunk]], &setup.experts)).unwrap();
        start = tokens.len();
        tokens.push(top5(&step.logits[0]).0[0]);
        steps.push(step);
    }
    (tokens.split_off(prompt.len()), steps)
}

fn assert_top5(steps: &[StepOutput], want: &Value, what: &str) {
    for (step, want) in steps.iter().zip(want.as_array().unwrap()) {
        let (order, values) = top5(&step.logits[0]);
        assert_eq!(order, ids(&want["ids"]), "{what}");
        assert_close(&values, &floats(&want["values"]), LOGIT_TOLERANCE, what);
    }
}

fn assert_routing(step: &StepOutput, layer: usize, want_ids: &Value, want_weights: &Value, what: &str) {
    let routing = &step.routing[layer];
    for (token, (want_ids, want_weights)) in
        want_ids.as_array().unwrap().iter().zip(want_weights.as_array().unwrap()).enumerate()
    {
        let (experts, weights) = routing.of(token);
        assert_eq!(experts.iter().map(|e| e.0).collect::<Vec<_>>(), ids(want_ids), "{what}, token {token}");
        let weights: Vec<f64> = weights.iter().map(|w| f64::from(*w)).collect();
        assert_close(&weights, &floats(want_weights), 1e-5, what);
    }
}

#[test]
fn the_bundled_model_says_what_transformers_says() {
    let mut setup = open("models/demo", 2);
    let tokenizer = Tokenizer::load(setup.checkpoint.folder(), setup.checkpoint.spec()).unwrap();
    let golden = golden("tests/data/demo/golden.json");
    for case in golden["prompts"].as_array().unwrap() {
        let text = case["prompt"].as_str().unwrap();
        let prompt = tokenizer.encode(text, true).unwrap();
        assert_eq!(prompt, ids(&case["input_ids"]), "{text}");

        let want = ids(&case["greedy_ids"]);
        let (tokens, steps) = greedy(&mut setup, &prompt, want.len());
        assert_eq!(tokens, want, "{text}");
        assert_top5(&steps, &case["top5"], text);
        for (layer, router) in case["router"].as_array().unwrap().iter().enumerate() {
            assert_routing(&steps[0], layer, &router["ids"], &router["weights"], &format!("{text}, layer {layer}"));
        }

        let mut detokenizer = Detokenizer::default();
        let mut shown: String = tokens.iter().map(|id| detokenizer.push(*id, &tokenizer)).collect();
        shown += &detokenizer.finish(&tokenizer);
        assert_eq!(shown, case["greedy_text"].as_str().unwrap());
    }
}

/// What quantised experts say has no outside reference: this program's own completions of the same prompts, kept when the
/// distance to bf16's logits was looked at.
#[test]
fn quantised_experts_say_what_they_said_and_stay_near_bf16() {
    let prompts = golden("tests/data/demo/golden.json");
    let prompts: Vec<Vec<u32>> =
        prompts["prompts"].as_array().unwrap().iter().map(|case| ids(&case["input_ids"])).collect();
    let kept = golden("tests/data/demo/quantised.json");
    let mut exact = open("models/demo", 2);
    for (dtype, nearest, furthest) in [(ExpertDtype::Int8, 0.001, 0.03), (ExpertDtype::Int4, 0.02, 0.3)] {
        let mut setup = open_as("models/demo", dtype, 2);
        let (mut said, mut distance, mut length) = (Vec::new(), 0.0_f64, 0.0_f64);
        for prompt in &prompts {
            let (tokens, steps) = greedy(&mut setup, prompt, 48);
            said.push(tokens);
            let reference = greedy(&mut exact, prompt, 1).1;
            for (got, want) in steps[0].logits[0].iter().zip(&reference[0].logits[0]) {
                distance += f64::from(got - want).powi(2);
                length += f64::from(*want).powi(2);
            }
        }
        let relative = (distance / length).sqrt();
        assert!((nearest..furthest).contains(&relative), "{dtype}: logits are {relative} from bf16's");
        assert_eq!(serde_json::json!(said), kept[dtype.to_string()], "{dtype}");
    }
}

#[test]
fn another_mixtral_says_what_transformers_says() {
    let mut setup = open("tests/data/families/mixtral", 1);
    let golden = golden("tests/data/families/mixtral/golden.json");
    for case in golden["prompts"].as_array().unwrap() {
        let want = ids(&case["greedy_ids"]);
        let (tokens, steps) = greedy(&mut setup, &ids(&case["input_ids"]), want.len());
        assert_eq!(tokens, want);
        let last: Vec<f64> = steps[0].logits[0].iter().map(|x| f64::from(*x)).collect();
        assert_close(&last, &floats(&case["logits_last"]), LOGIT_TOLERANCE, "logits_last");
        assert_top5(&steps, &case["top5"], "the tiny model");
        for layer in 0..setup.checkpoint.spec().num_hidden_layers {
            let router = &case["router"][format!("model.layers.{layer}.mlp.gate")];
            assert_routing(&steps[0], layer, &router["expert_ids"], &router["weights"], &format!("layer {layer}"));
        }
    }
}

/// The bits of the logits after the whole prompt, computed in chunks that end at `cuts`.
fn logits_in_chunks(setup: &mut Setup, prompt: &[u32], cuts: &[usize], mate: Option<&[u32]>) -> Vec<u32> {
    // Tables differ from run to run.
    let mut order: Vec<u32> = (0..16).collect();
    order.rotate_left(cuts.len());
    let (blocks, others) = order.split_at(8);
    let mut start = 0;
    for end in cuts.iter().copied().chain([prompt.len()]) {
        let mut chunks = Vec::new();
        if let Some(tokens) = mate.filter(|_| start == 0) {
            chunks.push(SequenceChunk { blocks: others, start: 0, tokens, logits: Logits::None, until: None });
        }
        chunks.push(SequenceChunk { blocks, start, tokens: &prompt[start..end], logits: Logits::Last, until: None });
        let step = block_on(setup.model.forward(&[&chunks], &setup.experts)).unwrap();
        if end == prompt.len() {
            return step.logits[0].iter().map(|x| x.to_bits()).collect();
        }
        start = end;
    }
    unreachable!("the last cut is the end of the prompt")
}

#[test]
fn chunks_batch_mates_and_threads_change_no_bit() {
    let (mut one, mut two) = (open("models/demo", 1), open("models/demo", 2));
    let prompt: Vec<u32> = (0..45).map(|i| (i * 97 + 5) % 4096).collect();
    let mate: Vec<u32> = (0..23).map(|i| (i * 31 + 900) % 4096).collect();
    let whole = logits_in_chunks(&mut one, &prompt, &[], None);
    assert_eq!(logits_in_chunks(&mut two, &prompt, &[], None), whole);
    assert_eq!(logits_in_chunks(&mut one, &prompt, &[1, 16, 17, 40], None), whole);
    assert_eq!(logits_in_chunks(&mut one, &prompt, &[44], None), whole);
    assert_eq!(logits_in_chunks(&mut two, &prompt, &[20], Some(&mate)), whole);
    assert_eq!(logits_in_chunks(&mut two, &prompt, &[], Some(&mate)), whole);
}
