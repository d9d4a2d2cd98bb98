//! A sequence's bits depend on its own tokens alone: any way of cutting sequences into chunks, batching them and spreading the
//! work over batches and threads gives what each gives alone in one piece.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::{Duration, Instant};

use futures::executor::block_on;
use proptest::prelude::*;
use safetensors::{SafeTensors, serialize_to_file};
use serde_json::Value;
use sirocco_compute::{BLOCK_TOKENS, Draw, Drawn, Pool, RouterDevice, sample};
use sirocco_model::{Checkpoint, Experts, ExpertsError, LocalExperts, Logits, Model, SequenceChunk};
use sirocco_types::{ExpertDtype, LayerId, Routing};

const WEIGHTS: &str = "model.safetensors";

struct Setup {
    model: Model,
    experts: LocalExperts,
}

/// Tests take turns with it.
type Shared = Mutex<Setup>;

/// For each sequence, the bits of its last logits, and each layer's experts and weights' bits of all its tokens.
type Results = Vec<(Vec<u32>, Vec<Vec<(u32, u32)>>)>;

fn tiny() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/families/mixtral")
}

fn open(folder: &Path, dtype: ExpertDtype, threads: usize) -> Shared {
    let checkpoint = Checkpoint::open(folder).unwrap();
    let pool = Pool::new(threads).unwrap();
    let model = Model::load(&checkpoint, RouterDevice::Cpu { pool: pool.clone(), kv_blocks: 64 }).unwrap();
    let experts = LocalExperts::load(&checkpoint, dtype, pool).unwrap();
    Mutex::new(Setup { model, experts })
}

/// The tiny model with another configuration and, when tied, without its output projection.
fn altered(change: impl FnOnce(&mut Value), tied: bool) -> Shared {
    let dir = tempfile::tempdir().unwrap();
    let mut config: Value = serde_json::from_slice(&std::fs::read(tiny().join("config.json")).unwrap()).unwrap();
    change(&mut config);
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let bytes = std::fs::read(tiny().join(WEIGHTS)).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let kept = tensors.tensors().into_iter().filter(|(name, _)| !(tied && name == "lm_head.weight"));
    serialize_to_file(kept, None, &dir.path().join(WEIGHTS)).unwrap();
    open(dir.path(), ExpertDtype::Bf16, 1)
}

/// The tiny model whose tokens see only the last 12.
static WINDOWED: LazyLock<Shared> = LazyLock::new(|| altered(|config| config["sliding_window"] = 12.into(), false));
static ONE_THREAD: LazyLock<Shared> = LazyLock::new(|| open(&tiny(), ExpertDtype::Bf16, 1));
static THREADS: LazyLock<Shared> = LazyLock::new(|| open(&tiny(), ExpertDtype::Bf16, 3));
/// With quantised experts, on one thread and on several.
static QUANTISED: LazyLock<[[Shared; 2]; 2]> = LazyLock::new(|| {
    [ExpertDtype::Int8, ExpertDtype::Int4].map(|dtype| [1, 3].map(|threads| open(&tiny(), dtype, threads)))
});

fn take(setup: &Shared) -> MutexGuard<'_, Setup> {
    setup.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Blocks enough for the longest sequence.
const TABLE: u32 = 5;

/// Computes `sequences` in steps; in step `i`, sequence `s` goes on by `steps[i][s]` tokens, and after the last step by the rest.
/// Steps whose number is odd come in two batches.
fn run(setup: &Shared, sequences: &[Vec<u32>], steps: &[Vec<usize>]) -> Results {
    let Setup { model, experts } = &mut *take(setup);
    let blocks: Vec<u32> = (0..TABLE * sequences.len() as u32).rev().collect();
    let tables: Vec<&[u32]> = blocks.chunks(TABLE as usize).collect();
    let layers = model.spec().num_hidden_layers;
    let mut done = vec![0; sequences.len()];
    let mut results: Results = vec![(Vec::new(), vec![Vec::new(); layers]); sequences.len()];
    let rest = vec![usize::MAX; sequences.len()];
    for (number, step) in steps.iter().chain([&rest]).enumerate() {
        let mut chunks = Vec::new();
        let mut owners = Vec::new();
        for (s, tokens) in sequences.iter().enumerate() {
            let end = done[s] + step[s].min(tokens.len() - done[s]);
            if end > done[s] {
                let (start, tokens) = (done[s], &tokens[done[s]..end]);
                // Logits in the middle of a prompt are wanted too, by every other sequence.
                let logits = if end == sequences[s].len() || s % 2 == 0 { Logits::Last } else { Logits::None };
                chunks.push(SequenceChunk { blocks: tables[s], start, tokens, logits, until: None });
                owners.push(s);
                done[s] = end;
            }
        }
        if chunks.is_empty() {
            continue;
        }
        let (first, second) = chunks.split_at(if number % 2 == 1 { chunks.len() / 2 } else { 0 });
        let output = block_on(model.forward(&[first, second], experts)).unwrap();
        let mut logits = output.logits.iter();
        let mut token = 0;
        for (chunk, owner) in chunks.iter().zip(owners) {
            let (last, routing) = &mut results[owner];
            if chunk.logits == Logits::Last {
                *last = logits.next().unwrap().iter().map(|x| x.to_bits()).collect();
            }
            for (routing, layer) in routing.iter_mut().zip(&output.routing) {
                for t in token..token + chunk.tokens.len() {
                    let (experts, weights) = layer.of(t);
                    routing.extend(experts.iter().zip(weights).map(|(expert, weight)| (expert.0, weight.to_bits())));
                }
            }
            token += chunk.tokens.len();
        }
        assert!(logits.next().is_none());
    }
    results
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_schedule_gives_what_each_sequence_gives_alone(
        sequences in proptest::collection::vec(proptest::collection::vec(0_u32..256, 1..70), 1..5),
        steps in proptest::collection::vec(proptest::collection::vec(0_usize..24, 4), 0..12),
    ) {
        let [int8, int4] = &*QUANTISED;
        let pairs = [(&*ONE_THREAD, &*THREADS), (&WINDOWED, &WINDOWED), (&int8[0], &int8[1]), (&int4[0], &int4[1])];
        for (alone, together) in pairs {
            let expected: Results =
                sequences.iter().flat_map(|tokens| run(alone, std::slice::from_ref(tokens), &[])).collect();
            prop_assert_eq!(run(together, &sequences, &steps), expected);
        }
    }
}

#[test]
fn a_sliding_window_is_felt_by_the_first_token_beyond_it_and_by_none_before() {
    let tokens: Vec<u32> = (0..40).map(|i| (i * 37 + 11) % 256).collect();
    for len in 1..=40 {
        let prompt = [tokens[..len].to_vec()];
        let same = run(&WINDOWED, &prompt, &[]) == run(&ONE_THREAD, &prompt, &[]);
        assert_eq!(same, len <= 12, "{len} tokens");
    }
}

#[test]
fn tied_embeddings_serve_as_the_output_projection() {
    let setup = altered(|config| config["tie_word_embeddings"] = true.into(), true);
    let prompt = [vec![5, 80, 200, 3]];
    let (tied, own) = (run(&setup, &prompt, &[]), run(&ONE_THREAD, &prompt, &[]));
    assert_eq!(tied[0].1, own[0].1, "the layers are the same");
    assert_eq!(tied[0].0.len(), 256);
    assert_ne!(tied[0].0, own[0].0, "the output projection is another");
}

#[test]
fn a_copied_block_goes_on_as_the_block_it_was_copied_from() {
    let Setup { model, experts } = &mut *take(&ONE_THREAD);
    let from = BLOCK_TOKENS + 9;
    let tokens: Vec<u32> = (0..2 * BLOCK_TOKENS as u32 + 8).map(|i| (i * 37 + 11) % 256).collect();
    let compute = |model: &mut Model, blocks: &[u32], from: usize| {
        let chunk = SequenceChunk { blocks, start: from, tokens: &tokens[from..], logits: Logits::All, until: None };
        block_on(model.forward(&[&[chunk]], experts)).unwrap().logits
    };
    let whole = compute(model, &[0, 1, 2], 0);
    assert_eq!(whole.len(), tokens.len());
    model.copy_block(1, 4).unwrap();
    assert_eq!(compute(model, &[0, 4, 5], from), whole[from..]);
}

#[test]
fn what_is_drawn_is_drawn_from_the_logits_whoever_else_asks_for_what() {
    let Setup { model, experts } = &mut *take(&ONE_THREAD);
    let prompts: [&[u32]; 3] = [&[1, 2, 3], &[4, 5], &[6, 7, 8, 9]];
    let tables = [[0], [1], [2]];
    let mut forward = |asked: [Logits; 3], first: usize| {
        let chunks = [0, 1, 2].map(|index| SequenceChunk {
            blocks: &tables[index],
            start: 0,
            tokens: prompts[index],
            logits: asked[index],
            until: None,
        });
        let (first, second) = chunks.split_at(first);
        block_on(model.forward(&[first, second], experts)).unwrap()
    };
    let (greedy, biased) = (Draw::default(), Draw { bias: vec![(7, 100.0)], report: Some(2), ..Draw::default() });
    let random = Draw { temperature: 2.0, top_p: 0.9, uniform: 1 << 63, ..Draw::default() };
    let draws = [&greedy, &biased, &random];
    let logits = forward([Logits::Last; 3], 3).logits;
    let drawn: Vec<Option<Drawn>> =
        logits.iter().zip(draws).map(|(logits, draw)| sample(&mut logits.clone(), draw)).collect();
    assert_eq!(drawn[1].as_ref().unwrap().id, 7);
    for cut in 0..4 {
        let plain = forward(draws.map(Logits::Drawn), cut);
        assert_eq!((plain.drawn, plain.logits.len()), (drawn.clone(), 0));
        let mixed = forward([Logits::Drawn(&greedy), Logits::DrawnAndTold(&biased), Logits::Drawn(&random)], cut);
        assert_eq!((mixed.drawn, &mixed.logits[..]), (drawn.clone(), &logits[1..2]));
        let mixed = forward([Logits::All, Logits::None, Logits::Drawn(&random)], cut);
        assert_eq!((mixed.drawn, &mixed.logits[2..]), (drawn[2..].to_vec(), &logits[..1]));
    }
}

/// Experts that take a while, and how many batches wait for them at once.
struct Distant<'a> {
    experts: &'a LocalExperts,
    waiting: AtomicUsize,
    most: AtomicUsize,
}

impl Experts for Distant<'_> {
    async fn forward(
        &self,
        layer: LayerId,
        hidden: &[f32],
        routing: &Routing,
        until: Option<Instant>,
    ) -> Result<Vec<f32>, ExpertsError> {
        self.most.fetch_max(self.waiting.fetch_add(1, Ordering::Relaxed) + 1, Ordering::Relaxed);
        let mut asked = false;
        std::future::poll_fn(|context| {
            context.waker().wake_by_ref();
            if std::mem::replace(&mut asked, true) { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        self.experts.forward(layer, hidden, routing, until).await
    }
}

#[test]
fn while_one_batch_waits_for_its_experts_another_goes_on() {
    let Setup { model, experts } = &mut *take(&ONE_THREAD);
    let mut run = |together: bool| {
        let experts = Distant { experts, waiting: AtomicUsize::new(0), most: AtomicUsize::new(0) };
        let chunk = |block: &'static [u32]| SequenceChunk {
            blocks: block,
            start: 0,
            tokens: &[1, 2],
            logits: Logits::Last,
            until: None,
        };
        let chunks = [chunk(&[0]), chunk(&[1])];
        let (first, second) = chunks.split_at(1);
        let batches: &[&[SequenceChunk]] = if together { &[&chunks] } else { &[first, second] };
        let output = block_on(model.forward(batches, &experts)).unwrap();
        (output.logits, experts.most.into_inner())
    };
    let (one, two) = (run(true), run(false));
    assert_eq!((one.1, two.1), (1, 2));
    assert_eq!(one.0, two.0);
}

/// Experts that note how long they may take.
struct Patient<'a> {
    experts: &'a LocalExperts,
    untils: Mutex<Vec<Option<Instant>>>,
}

impl Experts for Patient<'_> {
    async fn forward(
        &self,
        layer: LayerId,
        hidden: &[f32],
        routing: &Routing,
        until: Option<Instant>,
    ) -> Result<Vec<f32>, ExpertsError> {
        self.untils.lock().unwrap().push(until);
        self.experts.forward(layer, hidden, routing, until).await
    }
}

#[test]
fn a_batch_waits_as_long_as_the_most_patient_chunk_of_the_other() {
    let Setup { model, experts } = &mut *take(&ONE_THREAD);
    let soon = Instant::now();
    let later = soon + Duration::from_secs(9);
    for (own, other, most) in [(Some(soon), Some(later), Some(later)), (Some(soon), None, None)] {
        let chunk = |block: &'static [u32], until| {
            [SequenceChunk { blocks: block, start: 0, tokens: &[1, 2], logits: Logits::None, until }]
        };
        let experts = Patient { experts, untils: Mutex::default() };
        block_on(model.forward(&[&chunk(&[0], own), &chunk(&[1], other)], &experts)).unwrap();
        let untils = experts.untils.into_inner().unwrap();
        assert_eq!(untils, vec![most; 2 * model.spec().num_hidden_layers]);
    }
}

/// Experts of which those of one layer give `value` for some rows of its first batch.
struct Overflowing<'a> {
    experts: &'a LocalExperts,
    layer: LayerId,
    rows: Range<usize>,
    value: f32,
}

impl Experts for Overflowing<'_> {
    async fn forward(
        &self,
        layer: LayerId,
        hidden: &[f32],
        routing: &Routing,
        until: Option<Instant>,
    ) -> Result<Vec<f32>, ExpertsError> {
        assert!(hidden.iter().all(|value| value.is_finite()), "what overflowed is asked of nobody");
        let mut combined = self.experts.forward(layer, hidden, routing, until).await?;
        let width = combined.len() / routing.tokens();
        if layer == self.layer {
            combined[self.rows.start * width..self.rows.end * width].fill(self.value);
        }
        Ok(combined)
    }
}

#[test]
fn what_overflows_is_named_by_its_layer_and_changes_no_bit_of_its_batch_mates() {
    let Setup { model, experts } = &mut *take(&ONE_THREAD);
    let prompts: [&[u32]; 3] = [&[1, 2, 3], &[4, 5], &[6, 7, 8, 9]];
    let chunks = |blocks: &'static [[u32; 1]; 3]| {
        std::array::from_fn::<_, 3, _>(|index| SequenceChunk {
            blocks: &blocks[index],
            start: 0,
            tokens: prompts[index],
            logits: Logits::Last,
            until: None,
        })
    };
    let (before, after) = (&[[0], [1], [2]], &[[1], [2], [0]]);
    let well = block_on(model.forward(&[&chunks(before)], experts)).unwrap();
    assert_eq!(well.overflows, [None; 3]);
    for layer in model.spec().layers() {
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let overflowing = Overflowing { experts, layer, rows: 3..4, value };
            let sick = block_on(model.forward(&[&chunks(before)], &overflowing)).unwrap();
            assert_eq!(sick.overflows, [None, Some(layer), None], "{value}");
            assert_eq!((&sick.logits[0], &sick.logits[2]), (&well.logits[0], &well.logits[2]), "{value}");
            let again = block_on(model.forward(&[&chunks(after)], experts)).unwrap();
            assert_eq!(again.logits, well.logits, "in the blocks that it left");
        }
    }
}
