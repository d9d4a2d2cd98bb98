//! Streams that complete the same prompts over and over, at any of several routers, check every byte and keep when each token
//! came.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use sirocco_proto::generation::{Generation, GenerationError};
use sirocco_proto::wire::inference as wire;
use sirocco_proto::wire::inference::generate_response::Event;
use tokio::task::JoinSet;

use crate::control::until_within;
use crate::support::{goldens, greedy};

/// Longest wait for completions: what waits for experts waits for a minute.
const PATIENCE: Duration = Duration::from_mins(3);

/// Tokens of a completion that is drawn at random.
const DRAWN: u32 = 96;

/// A request and what an undisturbed cluster answers.
#[derive(Clone)]
struct Work {
    request: wire::GenerateRequest,
    answer: Answer,
}

#[derive(Clone, Debug, Default, PartialEq)]
struct Answer {
    ids: Vec<u32>,
    text: String,
}

/// Streams at work. Dropping it ends them.
pub(super) struct Load {
    stop: Arc<AtomicBool>,
    record: Arc<Mutex<Record>>,
    tasks: JoinSet<()>,
}

#[derive(Default)]
struct Record {
    tokens: Vec<Token>,
    /// By stream, when its last token came, or its request began.
    waiting: Vec<Waiting>,
    completed: usize,
    relayed: usize,
    /// A sentence for each request that failed or whose completion was another.
    wrong: Vec<String>,
}

struct Token {
    at: Instant,
    gap: Duration,
    /// The first of its completion, whose gap is that to the request.
    first: bool,
}

#[derive(Clone, Copy)]
struct Waiting {
    since: Instant,
    /// For the first token of a completion.
    first: bool,
}

/// How tokens came in some time.
#[derive(Clone, Debug)]
pub(super) struct Window {
    pub(super) tokens_per_s: f64,
    /// Longest time between two tokens of a completion, one that had not ended yet included.
    pub(super) longest: Duration,
    /// The same for first tokens, from the request.
    pub(super) longest_first: Duration,
    /// What 99 of a hundred gaps between tokens were at most.
    pub(super) p99: Duration,
}

/// What came of all streams' work so far.
#[derive(Clone, Debug)]
pub(super) struct Tally {
    pub(super) completed: usize,
    /// How often a completion went on at another router.
    pub(super) relayed: usize,
    pub(super) wrong: Vec<String>,
}

impl Load {
    /// Has `routers` complete everything once, undisturbed, then starts `streams` streams that go on until they are stopped.
    ///
    /// Half of the completions are greedy, and known from the goldens; the others are drawn with a seed.
    pub(super) async fn start(routers: &[String], streams: usize) -> Self {
        let goldens = goldens();
        let request = |seed: usize, golden: &crate::support::Golden| wire::GenerateRequest {
            sampling: Some(wire::SamplingParams {
                temperature: Some(1.0),
                seed: Some(seed as u64),
                ..Default::default()
            }),
            ignore_eos: true,
            ..greedy(&golden.prompt, DRAWN)
        };
        let known = goldens.iter().map(|golden| Work {
            request: greedy(&golden.prompt, golden.greedy_ids.len() as u32),
            answer: Answer { ids: golden.greedy_ids.clone(), text: golden.greedy_text.clone() },
        });
        let mut works: Vec<Work> = known.collect();
        let drawn = goldens.iter().enumerate().map(|(seed, golden)| request(seed, golden));
        let mut quiet = JoinSet::new();
        for request in drawn {
            let routers = routers.to_vec();
            quiet.spawn(async move {
                let answer = complete(&mut Generation::new(routers, request.clone()), |_| ()).await.unwrap();
                Work { request, answer }
            });
        }
        works.extend(quiet.join_all().await);
        let now = Waiting { since: Instant::now(), first: true };
        let record = Record { waiting: vec![now; streams], ..Record::default() };
        let (stop, record, mut tasks) = (Arc::<AtomicBool>::default(), Arc::new(Mutex::new(record)), JoinSet::new());
        for stream in 0..streams {
            let (mut works, mut routers) = (works.clone(), routers.to_vec());
            let (work, router) = (stream * works.len() / streams, stream % routers.len());
            works.rotate_left(work);
            routers.rotate_left(router);
            let (stop, record) = (Arc::clone(&stop), Arc::clone(&record));
            tasks.spawn(async move {
                for work in works.iter().cycle() {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    follow(stream, &routers, work, &record).await;
                }
            });
        }
        Self { stop, record, tasks }
    }

    pub(super) fn tally(&self) -> Tally {
        let record = self.record.lock().unwrap();
        Tally { completed: record.completed, relayed: record.relayed, wrong: record.wrong.clone() }
    }

    /// Waits until each stream has ended what it is at, and `more` completions more are done.
    pub(super) async fn progress(&self, more: usize) {
        let streams = self.record.lock().unwrap().waiting.len();
        let enough = self.tally().completed + streams + more;
        let done = || {
            let tally = self.tally();
            tally.completed + tally.wrong.len()
        };
        until_within(PATIENCE, "completions", async || (done() >= enough).then_some(())).await;
    }

    /// How tokens come from now on for as long as `time`.
    pub(super) async fn during(&self, time: Duration) -> Window {
        let began = Instant::now();
        until_within(time + PATIENCE, "time to pass", async || (began.elapsed() >= time).then_some(())).await;
        self.window(began, began + time)
    }

    /// How tokens came between `from` and `to`, which must not be in the future.
    pub(super) fn window(&self, from: Instant, to: Instant) -> Window {
        let record = self.record.lock().unwrap();
        let tokens: Vec<&Token> = record.tokens.iter().filter(|token| (from..to).contains(&token.at)).collect();
        let open = record.waiting.iter().map(|waiting| (waiting.first, to.saturating_duration_since(waiting.since)));
        let gaps = |first: bool| {
            let mut gaps: Vec<Duration> = tokens.iter().filter(|t| t.first == first).map(|t| t.gap).collect();
            gaps.sort_unstable();
            gaps
        };
        let longest = |gaps: &[Duration], first: bool| {
            let open = open.clone().filter(|(of, _)| *of == first).map(|(_, since)| since);
            gaps.last().copied().into_iter().chain(open).max().unwrap_or_default()
        };
        let between = gaps(false);
        Window {
            tokens_per_s: tokens.len() as f64 / (to - from).as_secs_f64(),
            longest: longest(&between, false),
            longest_first: longest(&gaps(true), true),
            p99: between.get(between.len() * 99 / 100).copied().unwrap_or_default(),
        }
    }

    /// Lets each stream end what it is at.
    pub(super) async fn stop(mut self) -> Tally {
        self.stop.store(true, Ordering::Relaxed);
        while let Some(ended) = self.tasks.join_next().await {
            ended.unwrap();
        }
        self.tally()
    }
}

/// Completes `work` and notes what comes of it.
async fn follow(stream: usize, routers: &[String], work: &Work, record: &Mutex<Record>) {
    let began = Instant::now();
    record.lock().unwrap().waiting[stream] = Waiting { since: began, first: true };
    let mut generation = Generation::new(routers.to_vec(), work.request.clone());
    let answer = complete(&mut generation, |tokens| {
        let (now, mut record) = (Instant::now(), record.lock().unwrap());
        let since = record.waiting[stream].since;
        record.tokens.push(Token { at: now, gap: now - since, first: tokens == 1 });
        record.waiting[stream] = Waiting { since: now, first: false };
    })
    .await;
    let mut record = record.lock().unwrap();
    record.relayed += usize::from(generation.router() != routers[0]);
    record.waiting[stream] = Waiting { since: Instant::now(), first: true };
    match answer {
        Ok(answer) if answer == work.answer => record.completed += 1,
        Ok(other) => {
            let same = other.ids.iter().zip(&work.answer.ids).take_while(|(a, b)| a == b).count();
            record.wrong.push(format!("stream {stream} differs from token {same} on"));
        }
        Err(error) => {
            let error: &dyn std::error::Error = &error;
            record.wrong.push(format!("stream {stream} fails after {:.1?}: {error}", began.elapsed()));
        }
    }
}

/// Follows `generation` to its end; `at` is told after each token how many there are.
async fn complete(generation: &mut Generation, mut at: impl FnMut(usize)) -> Result<Answer, GenerationError> {
    let mut answer = Answer::default();
    loop {
        match generation.event().await? {
            Event::Started(_) => {}
            Event::Token(token) => {
                answer.ids.push(token.id);
                answer.text += &token.text;
                at(answer.ids.len());
            }
            Event::Finished(finished) => {
                answer.text += &finished.text;
                return Ok(answer);
            }
        }
    }
}
