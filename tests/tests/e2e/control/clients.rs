//! Clients that complete prompts one after the other and check every byte.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use sirocco_proto::wire::inference as wire;
use tokio::task::JoinSet;

use super::until;
use crate::support::{generate, goldens, greedy};

/// A prompt, how many tokens are asked for, and what they must be where that is known.
#[derive(Clone)]
struct Prompt {
    text: String,
    max_tokens: u32,
    expected: Option<(Vec<u32>, String)>,
}

/// Clients at work; dropping them ends them.
pub(super) struct Clients {
    stop: Arc<AtomicBool>,
    record: Arc<Record>,
    tasks: JoinSet<()>,
}

#[derive(Default)]
struct Record {
    completed: AtomicUsize,
    slowest: Mutex<Duration>,
    /// A sentence for each request that failed or whose completion was another.
    wrong: Mutex<Vec<String>>,
}

/// What came of the clients' work.
pub(super) struct Tally {
    pub(super) completed: usize,
    pub(super) slowest: Duration,
}

impl Clients {
    /// `count` clients of `routers`, in turn, that complete the golden prompts, each beginning with another.
    pub(super) fn of_goldens(routers: &[&str], count: usize) -> Self {
        let golden = goldens().into_iter().map(|golden| Prompt {
            text: golden.prompt,
            max_tokens: golden.greedy_ids.len() as u32,
            expected: Some((golden.greedy_ids, golden.greedy_text)),
        });
        Self::start(routers, count, &golden.collect::<Vec<_>>())
    }

    /// `count` clients of `router` that have it read `texts` and say a few tokens more.
    pub(super) fn of_texts(router: &str, count: usize, texts: &[String]) -> Self {
        let prompt = |text: &String| Prompt { text: text.clone(), max_tokens: 4, expected: None };
        Self::start(&[router], count, &texts.iter().map(prompt).collect::<Vec<_>>())
    }

    fn start(routers: &[&str], count: usize, prompts: &[Prompt]) -> Self {
        let (stop, record, mut tasks) = (Arc::<AtomicBool>::default(), Arc::<Record>::default(), JoinSet::new());
        for client in 0..count {
            let router = routers[client % routers.len()].to_owned();
            let mut prompts = prompts.to_vec();
            let first = client * prompts.len() / count;
            prompts.rotate_left(first);
            let (stop, record) = (Arc::clone(&stop), Arc::clone(&record));
            tasks.spawn(async move {
                for prompt in prompts.iter().cycle() {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    record.note(&router, prompt).await;
                }
            });
        }
        Self { stop, record, tasks }
    }

    /// How many requests were completed.
    pub(super) fn completed(&self) -> usize {
        self.record.completed.load(Ordering::Relaxed)
    }

    /// Waits until `count` more requests were completed.
    pub(super) async fn progress(&self, count: usize) {
        let enough = self.completed() + count;
        until(&format!("{count} completions"), async || (self.completed() >= enough).then_some(())).await;
    }

    /// Lets each client finish its request. Panics when any request failed or any completion was another.
    pub(super) async fn stop(mut self) -> Tally {
        self.stop.store(true, Ordering::Relaxed);
        while let Some(ended) = self.tasks.join_next().await {
            ended.unwrap();
        }
        let wrong = self.record.wrong.lock().unwrap();
        assert!(
            wrong.is_empty(),
            "{} of {} requests: {:?}",
            wrong.len(),
            self.completed() + wrong.len(),
            wrong.first()
        );
        Tally { completed: self.completed(), slowest: *self.record.slowest.lock().unwrap() }
    }
}

impl Record {
    async fn note(&self, router: &str, prompt: &Prompt) {
        let began = Instant::now();
        // What is traced is computed whole every time, so that the load stays what the texts make it.
        let trace = prompt.expected.is_none().then_some(wire::Trace { logits: false, routing: true });
        let request = wire::GenerateRequest { trace, ..greedy(&prompt.text, prompt.max_tokens) };
        let result = generate(router, request).await;
        let took = began.elapsed();
        let wrong = match result {
            Err(status) => Some(format!("after {took:?}: {status}")),
            Ok(traced) => match &prompt.expected {
                Some((ids, text)) if traced.ids != *ids || traced.text != *text => {
                    Some(format!("{:?} is continued by {:?}, not by {text:?}", prompt.text, traced.text))
                }
                _ => None,
            },
        };
        match wrong {
            Some(wrong) => self.wrong.lock().unwrap().push(wrong),
            None => drop(self.completed.fetch_add(1, Ordering::Relaxed)),
        }
        let mut slowest = self.slowest.lock().unwrap();
        *slowest = took.max(*slowest);
    }
}
