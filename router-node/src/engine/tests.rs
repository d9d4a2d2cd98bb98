use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::Duration;

use serde_json::Value;
use sirocco_compute::{Draw, Drawn, GpuGauge, Pool, Queries, RouterBackend, RouterDevice};
use sirocco_model::{Checkpoint, LocalExperts};
use sirocco_proto::inference::{Finished, Token};
use sirocco_types::{ExpertDtype, FinishReason, Routing};
use tokio::runtime::Runtime;

use super::*;
use crate::scheduler::ClientId;

/// Enough for every test's sequences at once.
const PLENTY: usize = 512;
const LIMITS: EngineLimits = EngineLimits { sequences: 32, queue: 64, step_tokens: 512, overlap_rows: 16 };

fn path(relative: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(relative)
}

/// The bundled model in an engine of its own, with all experts beside it.
struct Setup {
    engine: Option<Engine>,
    thread: Option<JoinHandle<()>>,
    runtime: Runtime,
}

impl Setup {
    fn start(limits: EngineLimits, kv_blocks: usize) -> Self {
        Self::with(&path("models/demo"), limits, kv_blocks)
    }

    fn with(folder: &Path, limits: EngineLimits, kv_blocks: usize) -> Self {
        Self::changed(folder, limits, kv_blocks, |router| router).0
    }

    /// With what `change` makes of the router, and what the engine cancels when its device is lost.
    fn changed(
        folder: &Path,
        limits: EngineLimits,
        kv_blocks: usize,
        change: impl FnOnce(Box<dyn RouterBackend>) -> Box<dyn RouterBackend>,
    ) -> (Self, CancellationToken) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let driven = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let checkpoint = Checkpoint::open(folder).unwrap();
        let pool = Pool::new(2).unwrap();
        let lost = CancellationToken::new();
        let model = Model::load(&checkpoint, RouterDevice::Cpu { pool: pool.clone(), kv_blocks }).unwrap();
        let parts = Parts {
            model: model.with_router(change),
            tokenizer: Arc::new(Tokenizer::load(checkpoint.folder(), checkpoint.spec()).unwrap()),
            experts: LocalExperts::load(&checkpoint, ExpertDtype::Bf16, pool).unwrap(),
            limits,
            metrics: crate::metrics::tests::metrics().0,
            lost: lost.clone(),
        };
        let (engine, thread) = Engine::start(parts, driven, TaskTracker::new()).unwrap();
        (Self { engine: Some(engine), thread: Some(thread), runtime }, lost)
    }

    fn engine(&self) -> &Engine {
        self.engine.as_ref().unwrap()
    }

    /// What becomes of `asked`, all submitted at once.
    fn run(&self, asked: Vec<Asked>) -> Vec<Answer> {
        let (requests, streams): (Vec<_>, Vec<_>) = asked.into_iter().map(Asked::request).unzip();
        self.engine().submit(requests).unwrap();
        streams.into_iter().map(|stream| self.runtime.block_on(Answer::of(stream))).collect()
    }
}

impl Drop for Setup {
    fn drop(&mut self) {
        self.engine = None;
        if let Some(Err(panic)) = self.thread.take().map(JoinHandle::join) {
            std::panic::resume_unwind(panic);
        }
    }
}

#[derive(Clone, Debug)]
struct Asked {
    prompt: Vec<u32>,
    generated: Vec<u32>,
    sampling: SamplingParams,
    trace: Trace,
    client: u64,
}

impl Asked {
    /// A greedy completion of 48 tokens, with its logits.
    fn greedy(prompt: Vec<u32>) -> Self {
        let sampling =
            SamplingParams { temperature: 0.0, max_tokens: 48, ignore_eos: true, ..SamplingParams::default() };
        let trace = Trace { logits: true, ..Trace::default() };
        Self { prompt, generated: Vec::new(), sampling, trace, client: 0 }
    }

    fn request(self) -> (Request, mpsc::Receiver<Result<Event, GenerateError>>) {
        let Self { prompt, generated, sampling, trace, client } = self;
        let (events, stream) = mpsc::channel(sampling.max_tokens as usize + 2);
        let flow = Flow { client: ClientId(client), ..Flow::default() };
        let (id, arrived) = (String::new(), Instant::now());
        let deadline = Deadline::new(arrived, Duration::from_hours(1), []);
        (Request { id, flow, prompt, generated, sampling, constraint: None, trace, arrived, deadline, events }, stream)
    }
}

#[derive(Debug, PartialEq)]
struct Answer {
    tokens: Vec<Token>,
    finished: Finished,
}

impl Answer {
    async fn of(mut stream: mpsc::Receiver<Result<Event, GenerateError>>) -> Self {
        let mut tokens = Vec::new();
        loop {
            match stream.recv().await.unwrap().unwrap() {
                Event::Token(token) => tokens.push(token),
                Event::Finished(finished) => return Self { tokens, finished },
                Event::Started(_) => unreachable!("the engine sends none"),
            }
        }
    }

    fn ids(&self) -> Vec<u32> {
        self.tokens.iter().map(|token| token.id).collect()
    }

    fn text(&self) -> String {
        self.tokens.iter().map(|token| token.text.as_str()).chain([self.finished.text.as_str()]).collect()
    }

    /// Fails unless ids and logits are those of `other`, bit for bit.
    fn assert_same(&self, other: &Self, what: &str) {
        assert_eq!(self.ids(), other.ids(), "{what}");
        for (own, other) in self.tokens.iter().zip(&other.tokens) {
            let same = own.logits.iter().zip(&other.logits).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same && own.logits.len() == other.logits.len(), "{what}, token {}", own.index);
        }
    }
}

/// The prompts of the goldens, and their greedy tokens by transformers.
fn goldens() -> Vec<(Vec<u32>, Vec<u32>)> {
    let golden: Value = serde_json::from_slice(&std::fs::read(path("tests/data/demo/golden.json")).unwrap()).unwrap();
    let ids = |value: &Value| value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
    golden["prompts"]
        .as_array()
        .unwrap()
        .iter()
        .map(|case| (ids(&case["input_ids"]), ids(&case["greedy_ids"])))
        .collect()
}

#[test]
fn batch_mates_chunks_cache_hits_and_preemption_change_no_bit() {
    let goldens = goldens();
    let alone: Vec<Answer> = goldens
        .iter()
        .map(|(prompt, greedy)| {
            let answer = Setup::start(LIMITS, PLENTY).run(vec![Asked::greedy(prompt.clone())]).swap_remove(0);
            assert_eq!(answer.ids(), *greedy);
            answer
        })
        .collect();
    for step_tokens in [1, 7, 64, 512] {
        // With one token a step there is one sequence of each client under way.
        let few = (if step_tokens == 1 { 96 } else { 192 }) / BLOCK_TOKENS;
        for kv_blocks in [PLENTY, few] {
            let setup = Setup::start(EngineLimits { step_tokens, ..LIMITS }, kv_blocks);
            for (visit, shuffle) in [("first", 37), ("again", 23)] {
                // Each golden, and others that begin as one of them and go on differently.
                let mut order: Vec<usize> = (0..32).collect();
                order.sort_by_key(|index| ((index + 5) * (shuffle + step_tokens)) % 61);
                let asked = order.iter().map(|index| {
                    let mut prompt = goldens[index % goldens.len()].0.clone();
                    if *index >= goldens.len() {
                        prompt.truncate(prompt.len() - index % 5);
                        prompt.extend((0..*index as u32).map(|i| (i * 97 + *index as u32) % 4096));
                    }
                    Asked { client: *index as u64 % 3, ..Asked::greedy(prompt) }
                });
                let answers = setup.run(asked.collect());
                let what = format!("{step_tokens} tokens a step, {kv_blocks} blocks, {visit}");
                for (index, answer) in order.iter().zip(&answers).filter(|(index, _)| **index < goldens.len()) {
                    answer.assert_same(&alone[*index], &format!("golden {index}: {what}"));
                }
                if visit == "again" && kv_blocks == PLENTY {
                    let found = |answer: &Answer| answer.finished.usage.cached_tokens;
                    assert!(answers.iter().all(|answer| found(answer) > 0), "{what}");
                }
            }
            let counts = setup.engine().counts();
            assert_eq!(counts.preemptions > 0, kv_blocks != PLENTY, "{step_tokens} tokens a step: {counts:?}");
        }
    }
}

#[test]
fn a_preempted_sequence_reports_the_experts_it_would_have_reported_alone() {
    let goldens = goldens();
    let asked = |prompt: &Vec<u32>| {
        let trace = Trace { routing: true, ..Trace::default() };
        Asked { trace, ..Asked::greedy(prompt.clone()) }
    };
    let setup = Setup::start(LIMITS, 96 / BLOCK_TOKENS);
    let together = setup.run(goldens.iter().map(|(prompt, _)| asked(prompt)).collect());
    let counts = setup.engine().counts();
    assert!(counts.preemptions > 0, "{counts:?}");
    for ((prompt, _), together) in goldens.iter().zip(together) {
        let alone = setup.run(vec![asked(prompt)]).swap_remove(0);
        assert_eq!(together.tokens, alone.tokens);
        assert_eq!(together.tokens[0].routing[0].tokens(), prompt.len());
    }
}

#[test]
fn a_completion_goes_on_from_any_token_with_the_same_bytes() {
    let (prompt, _) = goldens().swap_remove(3);
    let sampling = SamplingParams {
        temperature: 0.9,
        seed: 11,
        max_tokens: 40,
        repetition_penalty: 1.1,
        frequency_penalty: 0.4,
        logprobs: Some(3),
        stop: vec!["qqq".into(), "e".repeat(6)],
        ..SamplingParams::default()
    };
    let trace = Trace { logits: true, ..Trace::default() };
    let asked = Asked { prompt, generated: Vec::new(), sampling, trace, client: 0 };
    let whole = Setup::start(LIMITS, PLENTY).run(vec![asked.clone()]).swap_remove(0);
    let other = Setup::start(EngineLimits { step_tokens: 5, ..LIMITS }, PLENTY);
    for from in 0..=whole.tokens.len() {
        let generated = whole.ids()[..from].to_vec();
        let rest = other.run(vec![Asked { generated, ..asked.clone() }]).swap_remove(0);
        assert_eq!(rest.tokens, whole.tokens[from..], "from token {from}");
        assert_eq!((&rest.finished.text, rest.finished.reason), (&whole.finished.text, whole.finished.reason));
        let completion_tokens = whole.tokens.len() as u32;
        assert_eq!(rest.finished.usage.completion_tokens, completion_tokens);
    }
}

#[test]
fn a_completion_that_ended_before_it_was_resumed_ends_the_same_way() {
    let (prompt, _) = goldens().swap_remove(0);
    let setup = Setup::start(LIMITS, PLENTY);
    let whole = setup.run(vec![Asked::greedy(prompt.clone())]).swap_remove(0);
    let stop: String = whole.text().chars().skip(20).take(4).collect();
    let mut asked = Asked::greedy(prompt);
    asked.sampling.stop = vec![stop];
    let stopped = setup.run(vec![asked.clone()]).swap_remove(0);
    assert_eq!(stopped.finished.reason, FinishReason::Stop);
    let resumed = setup.run(vec![Asked { generated: stopped.ids(), ..asked }]).swap_remove(0);
    assert_eq!((resumed.tokens.len(), resumed.finished.reason), (0, FinishReason::Stop));
    assert_eq!(resumed.finished.usage.completion_tokens, stopped.finished.usage.completion_tokens);
}

#[test]
fn sequences_leave_with_their_clients_and_no_block_stays_held() {
    let setup = Setup::start(EngineLimits { sequences: 4, ..LIMITS }, 640 / BLOCK_TOKENS);
    let goldens = goldens();
    let mut streams = Vec::new();
    for (index, (prompt, _)) in goldens.iter().enumerate() {
        let (request, stream) = Asked { client: index as u64, ..Asked::greedy(prompt.clone()) }.request();
        setup.engine().submit(vec![request]).unwrap();
        streams.push(stream);
    }
    let mut counts = setup.engine().counts.clone();
    streams.truncate(1);
    setup.runtime.block_on(Answer::of(streams.swap_remove(0)));
    let idle = |counts: &Counts| counts.running == 0 && counts.waiting == 0 && counts.blocks_held == 0;
    setup.runtime.block_on(counts.wait_for(idle)).unwrap();
}

#[test]
fn a_prompt_may_fill_a_context_of_32k_tokens() {
    const CONTEXT: usize = 32 << 10;
    let family = path("tests/data/families/mixtral");
    let folder = tempfile::tempdir().unwrap();
    let mut config: Value = serde_json::from_slice(&std::fs::read(family.join("config.json")).unwrap()).unwrap();
    config["max_position_embeddings"] = CONTEXT.into();
    // A token attends to so many only, or this would take a minute.
    config["sliding_window"] = 1024.into();
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    std::fs::copy(family.join("model.safetensors"), folder.path().join("model.safetensors")).unwrap();
    // Only its ids count here; the family has no tokenizer of its own.
    let tokenizer = r#"{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}"#;
    std::fs::write(folder.path().join("tokenizer.json"), tokenizer).unwrap();

    let setup = Setup::with(folder.path(), LIMITS, CONTEXT / BLOCK_TOKENS);
    let prompt: Vec<u32> = (0..CONTEXT as u32 - 4).map(|i| (i * 97 + i / 7) % 256).collect();
    let mut asked = Asked::greedy(prompt);
    asked.sampling.max_tokens = 4;
    let first = setup.run(vec![asked.clone()]).swap_remove(0);
    let again = setup.run(vec![asked]).swap_remove(0);
    again.assert_same(&first, "from the cache");
    let full_blocks = CONTEXT - BLOCK_TOKENS;
    assert_eq!(again.finished.usage.cached_tokens as usize, full_blocks);
}

/// A copy of the bundled model in which the embedding of `token` is infinite.
fn overflowing_model(token: usize) -> tempfile::TempDir {
    let (from, folder) = (path("models/demo"), tempfile::tempdir().unwrap());
    let mut patched = false;
    for entry in std::fs::read_dir(from).unwrap().map(Result::unwrap) {
        let to = folder.path().join(entry.file_name());
        if entry.path().extension().is_none_or(|extension| extension != "safetensors") {
            std::fs::copy(entry.path(), to).unwrap();
            continue;
        }
        let mut bytes = std::fs::read(entry.path()).unwrap();
        let data = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header: Value = serde_json::from_slice(&bytes[8..data]).unwrap();
        if let Some(embedding) = header.get("model.embed_tokens.weight") {
            let start = embedding["data_offsets"][0].as_u64().unwrap() as usize;
            let width = embedding["shape"][1].as_u64().unwrap() as usize;
            let row = &mut bytes[data + start + token * width * 2..][..width * 2];
            row.as_chunks_mut::<2>().0.fill(0x7f80_u16.to_le_bytes());
            patched = true;
        }
        std::fs::write(to, bytes).unwrap();
    }
    assert!(patched);
    folder
}

#[test]
fn a_request_that_overflows_fails_alone_and_names_its_layer() {
    const TOKEN: u32 = 3071;
    let model = overflowing_model(TOKEN as usize);
    let goldens: Vec<Vec<u32>> =
        goldens().into_iter().map(|(prompt, _)| prompt).filter(|prompt| !prompt.contains(&TOKEN)).take(4).collect();
    let alone: Vec<Answer> = goldens
        .iter()
        .map(|prompt| Setup::with(model.path(), LIMITS, PLENTY).run(vec![Asked::greedy(prompt.clone())]).swap_remove(0))
        .collect();
    for step_tokens in [16, 512] {
        // Few blocks, so that those of the failed are used again.
        let setup = Setup::with(model.path(), EngineLimits { step_tokens, ..LIMITS }, 24);
        let mut counts = setup.engine().counts.clone();
        let sick = |prompt: &[u32]| [prompt, &[TOKEN; 40]].concat();
        for round in 0..3 {
            let (request, mut stream) = Asked::greedy(sick(&[])).request();
            setup.engine().submit(vec![request]).unwrap();
            setup.runtime.block_on(stream.recv()).unwrap().unwrap_err();
            let rests = |counts: &Counts| counts.running == 0 && counts.blocks_held == 0;
            let cached = setup.runtime.block_on(counts.wait_for(rests)).unwrap().blocks_cached;
            assert!(cached == 0 || round > 0, "{cached} of its blocks are kept for others");

            let asked = goldens.iter().flat_map(|prompt| [sick(prompt), prompt.clone()]);
            let (requests, streams): (Vec<_>, Vec<_>) = asked.map(|prompt| Asked::greedy(prompt).request()).unzip();
            setup.engine().submit(requests).unwrap();
            for (index, mut stream) in streams.into_iter().enumerate() {
                if index % 2 == 0 {
                    let error = setup.runtime.block_on(stream.recv()).unwrap().unwrap_err();
                    assert_eq!(error, GenerateError::Internal("the activations of layer 0 are not finite".into()));
                } else {
                    let answer = setup.runtime.block_on(Answer::of(stream));
                    answer.assert_same(&alone[index / 2], &format!("{step_tokens} tokens a step, round {round}"));
                }
            }
        }
    }
}

#[test]
fn greedy_sequences_get_the_tokens_that_logits_give_whether_they_are_told_or_not() {
    let setup = Setup::start(EngineLimits { step_tokens: 40, ..LIMITS }, PLENTY);
    let plain = |prompt: &Vec<u32>| Asked { trace: Trace::default(), ..Asked::greedy(prompt.clone()) };
    let goldens = goldens();
    // Alone in their steps, and beside sequences that ask for logits.
    for mates in [false, true] {
        let asked = goldens.iter().flat_map(|(prompt, _)| {
            let mate = mates.then(|| Asked::greedy(prompt.clone()));
            mate.into_iter().chain([plain(prompt)])
        });
        let answers = setup.run(asked.collect());
        for (answers, (_, greedy)) in answers.chunks(1 + usize::from(mates)).zip(&goldens) {
            for answer in answers {
                assert_eq!(answer.ids(), *greedy);
            }
            assert!(answers.last().unwrap().tokens.iter().all(|token| token.logits.is_empty()));
        }
    }
}

/// A router that fails in one of the layers that it attends, and after that too when its device is lost.
#[derive(Debug)]
struct Odd {
    router: Box<dyn RouterBackend>,
    /// Layers until it fails.
    left: u32,
    error: DeviceError,
}

impl RouterBackend for Odd {
    fn kind(&self) -> &'static str {
        self.router.kind()
    }

    fn name(&self) -> String {
        self.router.name()
    }

    fn gauge(&self) -> Option<GpuGauge> {
        self.router.gauge()
    }

    fn weight_bytes(&self) -> usize {
        self.router.weight_bytes()
    }

    fn kv_blocks(&self) -> usize {
        self.router.kv_blocks()
    }

    fn copy_block(&mut self, from: u32, to: u32) -> Result<(), DeviceError> {
        self.router.copy_block(from, to)
    }

    fn begin(&mut self, lane: usize, tokens: &[u32], queries: &[Queries]) -> Result<(), DeviceError> {
        self.router.begin(lane, tokens, queries)
    }

    fn attend(&mut self, lane: usize, layer: LayerId, normed: &mut Vec<f32>) -> Result<Routing, DeviceError> {
        let fails = match self.left.checked_sub(1) {
            Some(left) => std::mem::replace(&mut self.left, left) == 1,
            None => matches!(self.error, DeviceError::Lost { .. }),
        };
        if fails { Err(self.error.clone()) } else { self.router.attend(lane, layer, normed) }
    }

    fn add_experts(&mut self, lane: usize, layer: LayerId, combined: &[f32]) -> Result<(), DeviceError> {
        self.router.add_experts(lane, layer, combined)
    }

    fn overflows(&mut self, lane: usize) -> Result<Vec<Option<LayerId>>, DeviceError> {
        self.router.overflows(lane)
    }

    fn logits(&mut self, lane: usize, rows: &[u32]) -> Result<Vec<f32>, DeviceError> {
        self.router.logits(lane, rows)
    }

    fn sample(&mut self, lane: usize, rows: &[u32], draws: &[&Draw]) -> Result<Vec<Option<Drawn>>, DeviceError> {
        self.router.sample(lane, rows, draws)
    }
}

#[test]
fn a_step_that_fails_fails_its_requests_and_only_a_lost_device_is_the_end_of_the_router() {
    let device = || "cuda:0".to_owned();
    let of_memory = DeviceError::OutOfMemory { device: device(), what: "a batch", bytes: 7 };
    let call = DeviceError::Call { device: device(), call: "cuLaunchKernel", problem: "no".into() };
    let gone = DeviceError::Lost { device: device(), call: "cuStreamSynchronize", problem: "gone".into() };
    let cases = [
        (of_memory.clone(), GenerateError::Unavailable(of_memory.to_string()), false),
        (call.clone(), GenerateError::Internal(call.to_string()), false),
        (gone.clone(), GenerateError::Unavailable(gone.to_string()), true),
    ];
    let goldens = goldens();
    for (error, expected, is_lost) in cases {
        // In the first layer of the prompts, and in the middle of the completions.
        for left in [1, 42] {
            let odd = |router| Box::new(Odd { router, left, error: error.clone() }) as Box<dyn RouterBackend>;
            let (setup, lost) = Setup::changed(&path("models/demo"), LIMITS, PLENTY, odd);
            let (requests, streams): (Vec<_>, Vec<_>) =
                goldens.iter().map(|(prompt, _)| Asked::greedy(prompt.clone()).request()).unzip();
            setup.engine().submit(requests).unwrap();
            // Who came a step later has to fail only when there is nothing to go on with.
            let failure = async |mut stream: mpsc::Receiver<Result<Event, GenerateError>>| {
                while let Some(event) = stream.recv().await {
                    if let Err(error) = event {
                        return Some(error);
                    }
                }
                None
            };
            let failures: Vec<GenerateError> =
                streams.into_iter().filter_map(|stream| setup.runtime.block_on(failure(stream))).collect();
            let least = if is_lost { goldens.len() } else { 1 };
            assert!(failures.len() >= least && failures.iter().all(|failed| *failed == expected), "{failures:?}");
            assert_eq!(lost.is_cancelled(), is_lost, "{error}");
            if is_lost {
                let (request, mut stream) = Asked::greedy(goldens[0].0.clone()).request();
                setup.engine().submit(vec![request]).unwrap();
                assert_eq!(setup.runtime.block_on(stream.recv()).unwrap(), Err(expected.clone()));
            } else {
                let again = setup.run(goldens.iter().map(|(prompt, _)| Asked::greedy(prompt.clone())).collect());
                for (answer, (_, greedy)) in again.iter().zip(&goldens) {
                    assert_eq!(answer.ids(), *greedy, "{error}");
                }
            }
        }
    }
}
