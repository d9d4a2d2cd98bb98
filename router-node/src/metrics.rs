//! Every metric of a router node: what it is called and means, and the one method that whoever measures it calls.
//!
//! What the engine and the placement know anyway is read when somebody scrapes ([`Metrics::watch`]). The rest takes atomics only,
//! no lock and no memory, but for what belongs to one expert node ([`Hop`]): that is made when a placement brings the node and
//! forgotten when one leaves it out. Never shows a prompt, a completion or a caller.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use sirocco_model::StepTimes;
use sirocco_process::metrics::{Counter, CounterFamily, Histogram, HistogramFamily, LATENCIES, Page, Seconds};
use sirocco_proto::expert::RefusalReason;
use sirocco_types::NodeId;
use tokio::sync::watch;

use crate::engine::{Engine, GenerateError, SubmitError};
use crate::intake::Refusal;
use crate::topology::Topology;

/// Upper bounds for one node's answer, in seconds: a network's microseconds to an expert's timeout.
const HOPS: &[f64] = &[0.000_25, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 10.0, 60.0];

/// Upper bounds for the tokens of a step.
const STEP_TOKENS: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0];

/// The metrics of one router, but for those that are read at each scrape.
#[derive(Debug)]
pub(crate) struct Metrics {
    /// By API and outcome.
    requests: Vec<Counter>,
    request_seconds: Histogram,
    queue_seconds: Histogram,
    first_token_seconds: Histogram,
    inter_token_seconds: Histogram,
    prompt_tokens: Counter,
    cached_tokens: Counter,
    completion_tokens: Counter,
    step_seconds: Histogram,
    step_tokens: Histogram,
    /// Attention, dispatch, combine, logits, sample.
    parts: [Seconds; 5],
    hop_seconds: HistogramFamily,
    hop_rows: CounterFamily,
    hop_retries: CounterFamily,
    hop_late: CounterFamily,
    hop_refusals: CounterFamily,
    hops: Mutex<HashMap<NodeId, Arc<Hop>>>,
}

/// Through which API a request came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Front {
    Grpc,
    Http,
}

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Answered to its end.
    Ok,
    /// Its client left.
    Cancelled,
    /// Not taken in, or found impossible: it must change to succeed.
    Invalid,
    /// Not taken in: another model is served here.
    UnknownModel,
    /// Not taken in: nobody knows who asks.
    Unidentified,
    /// Not taken in: the caller has reached a limit of its own.
    RateLimited,
    /// Not taken in: the queue is full.
    QueueFull,
    /// Not taken in: the router is not ready.
    NotReady,
    /// Not taken in, or broken off: experts do not answer.
    Unavailable,
    /// Broken off, or never begun: its time was up.
    Overdue,
    /// Something is broken.
    Internal,
}

impl Outcome {
    /// All of them, in the order of their values.
    const ALL: [Self; 11] = [
        Self::Ok,
        Self::Cancelled,
        Self::Invalid,
        Self::UnknownModel,
        Self::Unidentified,
        Self::RateLimited,
        Self::QueueFull,
        Self::NotReady,
        Self::Unavailable,
        Self::Overdue,
        Self::Internal,
    ];

    /// The values of the labels `outcome` and `reason`.
    fn labels(self) -> (&'static str, &'static str) {
        match self {
            Self::Ok => ("ok", ""),
            Self::Cancelled => ("cancelled", ""),
            Self::Invalid => ("refused", "invalid"),
            Self::UnknownModel => ("refused", "unknown_model"),
            Self::Unidentified => ("refused", "unidentified"),
            Self::RateLimited => ("refused", "rate_limited"),
            Self::QueueFull => ("refused", "queue_full"),
            Self::NotReady => ("refused", "not_ready"),
            Self::Unavailable => ("failed", "unavailable"),
            Self::Overdue => ("failed", "overdue"),
            Self::Internal => ("failed", "internal"),
        }
    }
}

impl From<&Refusal> for Outcome {
    fn from(refusal: &Refusal) -> Self {
        match refusal {
            Refusal::UnknownModel { .. } => Self::UnknownModel,
            Refusal::Invalid(_) | Refusal::Grammar(_) | Refusal::Submit(SubmitError::TooMany { .. }) => Self::Invalid,
            Refusal::Unidentified(_) => Self::Unidentified,
            Refusal::Limited(_) => Self::RateLimited,
            Refusal::Overdue(_) => Self::Overdue,
            Refusal::Submit(SubmitError::Full(_)) => Self::QueueFull,
            Refusal::NotReady(_) | Refusal::Submit(SubmitError::Stopped) => Self::NotReady,
            Refusal::Internal(_) => Self::Internal,
        }
    }
}

impl From<&GenerateError> for Outcome {
    fn from(error: &GenerateError) -> Self {
        match error {
            GenerateError::TooLarge(_) | GenerateError::Grammar(_) => Self::Invalid,
            GenerateError::Unavailable(_) => Self::Unavailable,
            GenerateError::Overdue(_) => Self::Overdue,
            GenerateError::Internal(_) => Self::Internal,
        }
    }
}

impl Metrics {
    /// Puts a router's metrics on `page`.
    pub(crate) fn new(page: &Page) -> Self {
        let named = |front| Outcome::ALL.map(|outcome| [front, outcome.labels().0, outcome.labels().1]);
        Self {
            requests: page.counters(
                (
                    "sirocco_router_requests_total",
                    "Requests for completions that have ended; one with several choices counts once.",
                ),
                ["api", "outcome", "reason"],
                [named("grpc"), named("http")].concat(),
            ),
            request_seconds: page.histogram(
                ("sirocco_router_request_seconds", "From a request's arrival to its end, refused ones left out."),
                LATENCIES,
            ),
            queue_seconds: page
                .histogram(("sirocco_router_queue_seconds", "From a sequence's arrival to its first step."), LATENCIES),
            first_token_seconds: page.histogram(
                ("sirocco_router_time_to_first_token_seconds", "From a sequence's arrival to its first token."),
                LATENCIES,
            ),
            inter_token_seconds: page.histogram(
                ("sirocco_router_inter_token_seconds", "From one token of a sequence to its next."),
                LATENCIES,
            ),
            prompt_tokens: page.counter((
                "sirocco_router_prompt_tokens_total",
                "Tokens of prompts whose sequences have begun, those found in the cache included.",
            )),
            cached_tokens: page.counter((
                "sirocco_router_prompt_tokens_cached_total",
                "Tokens of prompts that were found in the cache when their sequences began.",
            )),
            completion_tokens: page
                .counter(("sirocco_router_completion_tokens_total", "Tokens that were generated here.")),
            step_seconds: page
                .histogram(("sirocco_router_step_seconds", "Duration of a step of the engine."), LATENCIES),
            step_tokens: page
                .histogram(("sirocco_router_step_tokens", "Tokens computed in a step of the engine."), STEP_TOKENS),
            parts: page.seconds_by(
                (
                    "sirocco_router_step_part_seconds_total",
                    "Time in each part of the steps; of a step computed in halves, dispatch overlaps the others.",
                ),
                "part",
                ["attention", "dispatch", "combine", "logits", "sample"],
            ),
            hop_seconds: page.histogram_family(
                ("sirocco_router_hop_seconds", "From asking an expert node for a layer's rows to its answer."),
                &["node"],
                HOPS,
            ),
            hop_rows: page.counter_family(
                ("sirocco_router_rows_sent_total", "Hidden states sent to an expert node, once for each layer."),
                &["node"],
            ),
            hop_retries: page.counter_family(
                (
                    "sirocco_router_retries_total",
                    "Experts of a layer asked of a node after an earlier attempt there or elsewhere had failed.",
                ),
                &["node"],
            ),
            hop_late: page.counter_family(
                (
                    "sirocco_router_late_calls_total",
                    "Calls that an expert node did not answer in the time that is usual; others are asked then, if there are others.",
                ),
                &["node"],
            ),
            hop_refusals: page.counter_family(
                (
                    "sirocco_router_expert_refusals_total",
                    "Calls that an expert node did not answer, and single experts that it did not run.",
                ),
                &["node", "reason"],
            ),
            hops: Mutex::default(),
        }
    }

    /// Puts on `page` what `engine` and the placement say when somebody scrapes.
    pub(crate) fn watch(page: &Page, engine: &Engine, topology: watch::Receiver<Arc<Topology>>) {
        let of_engine = |read: fn(&Engine) -> f64| {
            let engine = engine.clone();
            move |samples: &mut sirocco_process::metrics::Samples| samples.add(&[], read(&engine))
        };
        let waiting = ("sirocco_router_sequences_waiting", "Sequences that wait for their first step.");
        page.gauge(waiting, &[], of_engine(|engine| engine.queued() as f64));
        let running = ("sirocco_router_sequences_running", "Sequences that the engine runs, as of its last step.");
        page.gauge(running, &[], of_engine(|engine| engine.counts().running as f64));
        let preemptions =
            ("sirocco_router_preemptions_total", "Times a running sequence gave its blocks of the KV cache back.");
        page.total(preemptions, &[], of_engine(|engine| engine.counts().preemptions as f64));
        let queried =
            ("sirocco_router_prefix_queried_tokens_total", "Tokens that were looked for in the prefix cache.");
        page.total(queried, &[], of_engine(|engine| engine.counts().prefix_queried as f64));
        let found = ("sirocco_router_prefix_found_tokens_total", "Tokens that were found in the prefix cache.");
        page.total(found, &[], of_engine(|engine| engine.counts().prefix_found as f64));
        let blocks = (
            "sirocco_router_kv_blocks",
            "Blocks of the KV cache: used by sequences, cached for prompts that begin alike, or free; their sum is the cache.",
        );
        let engine = engine.clone();
        page.gauge(blocks, &["state"], move |samples| {
            let counts = engine.counts();
            samples.add(&["used"], counts.blocks_held as f64);
            samples.add(&["cached"], counts.blocks_cached as f64);
            samples.add(&["free"], (counts.blocks - counts.blocks_held - counts.blocks_cached) as f64);
        });
        let epoch = ("sirocco_router_epoch", "The placement that rows are sent by; 0 while there is none.");
        page.gauge(epoch, &[], move |samples| samples.add(&[], topology.borrow().epoch().0 as f64));
    }

    /// A request has arrived.
    pub(crate) fn request(self: &Arc<Self>, front: Front) -> Tracked {
        let (metrics, arrived) = (Arc::clone(self), Instant::now());
        Tracked(Arc::new(UnderWay { metrics, front, arrived, ended: AtomicBool::new(false) }))
    }

    /// A sequence has its first step, after `queued`; of its `prompt` tokens `cached` need not be computed.
    pub(crate) fn began(&self, queued: Duration, prompt: usize, cached: usize) {
        self.queue_seconds.observe(queued.as_secs_f64());
        self.prompt_tokens.inc_by(prompt as u64);
        self.cached_tokens.inc_by(cached as u64);
    }

    /// A sequence has its first token, `after` its arrival.
    pub(crate) fn first_token(&self, after: Duration) {
        self.completion_tokens.inc();
        self.first_token_seconds.observe(after.as_secs_f64());
    }

    /// A sequence has one more token, `after` the one before.
    pub(crate) fn next_token(&self, after: Duration) {
        self.completion_tokens.inc();
        self.inter_token_seconds.observe(after.as_secs_f64());
    }

    /// A step with `tokens` took `whole`, of it `sample` after the forward pass.
    pub(crate) fn step(&self, tokens: usize, whole: Duration, times: StepTimes, sample: Duration) {
        self.step_tokens.observe(tokens as f64);
        self.step_seconds.observe(whole.as_secs_f64());
        let [attention, _, _, logits, sampled] = &self.parts;
        attention.inc_by(times.attention.as_secs_f64());
        logits.inc_by(times.logits.as_secs_f64());
        sampled.inc_by(sample.as_secs_f64());
    }

    /// A layer waited for its experts for `dispatch`, and took `combine` to put their rows together.
    pub(crate) fn layer(&self, dispatch: Duration, combine: Duration) {
        let [_, dispatched, combined, _, _] = &self.parts;
        dispatched.inc_by(dispatch.as_secs_f64());
        combined.inc_by(combine.as_secs_f64());
    }

    /// The metrics of expert node `node`.
    pub(crate) fn hop(&self, node: &NodeId) -> Arc<Hop> {
        let mut hops = self.hops.lock().unwrap_or_else(PoisonError::into_inner);
        let new = || {
            let name = node.as_str();
            Arc::new(Hop {
                seconds: self.hop_seconds.with_label_values(&[name]),
                rows: self.hop_rows.with_label_values(&[name]),
                retries: self.hop_retries.with_label_values(&[name]),
                late: self.hop_late.with_label_values(&[name]),
                refusals: RefusalReason::ALL.map(|r| self.hop_refusals.with_label_values(&[name, r.as_str()])),
            })
        };
        Arc::clone(hops.entry(node.clone()).or_insert_with(new))
    }

    /// Forgets the metrics of all expert nodes but those that `stay`.
    pub(crate) fn forget_hops(&self, stay: impl Fn(&NodeId) -> bool) {
        let mut hops = self.hops.lock().unwrap_or_else(PoisonError::into_inner);
        hops.retain(|node, _| {
            let (stays, name) = (stay(node), node.as_str());
            if !stays {
                // What is not there need not go.
                let _ = self.hop_seconds.remove_label_values(&[name]);
                let _ = self.hop_rows.remove_label_values(&[name]);
                let _ = self.hop_retries.remove_label_values(&[name]);
                let _ = self.hop_late.remove_label_values(&[name]);
                for reason in RefusalReason::ALL {
                    let _ = self.hop_refusals.remove_label_values(&[name, reason.as_str()]);
                }
            }
            stays
        });
    }
}

/// What is counted of the calls to one expert node.
#[derive(Debug)]
pub(crate) struct Hop {
    seconds: Histogram,
    rows: Counter,
    retries: Counter,
    late: Counter,
    /// By reason.
    refusals: [Counter; RefusalReason::ALL.len()],
}

impl Hop {
    /// `rows` are sent, `retries` of the experts that they are for not the first time.
    pub(crate) fn asked(&self, rows: usize, retries: usize) {
        self.rows.inc_by(rows as u64);
        self.retries.inc_by(retries as u64);
    }

    /// The node takes longer than is usual.
    pub(crate) fn late(&self) {
        self.late.inc();
    }

    /// The node has answered, `after` it was asked.
    pub(crate) fn answered(&self, after: Duration) {
        self.seconds.observe(after.as_secs_f64());
    }

    /// How often [`Hop::refused`] was told.
    #[cfg(test)]
    pub(crate) fn refusals(&self) -> u64 {
        self.refusals.iter().map(Counter::get).sum()
    }

    /// The node did not answer, or did not run one of the experts.
    pub(crate) fn refused(&self, reason: RefusalReason) {
        self.refusals[reason as usize].inc();
    }
}

/// A request under way. Counted once: by the first [`Tracked::end`], or as left by its client when the last clone is dropped.
#[derive(Clone, Debug)]
pub(crate) struct Tracked(Arc<UnderWay>);

#[derive(Debug)]
struct UnderWay {
    metrics: Arc<Metrics>,
    front: Front,
    arrived: Instant,
    ended: AtomicBool,
}

impl Tracked {
    /// The request has ended.
    pub(crate) fn end(&self, outcome: Outcome) {
        self.0.end(outcome);
    }
}

impl UnderWay {
    fn end(&self, outcome: Outcome) {
        if self.ended.swap(true, Ordering::Relaxed) {
            return;
        }
        self.metrics.requests[self.front as usize * Outcome::ALL.len() + outcome as usize].inc();
        if outcome.labels().0 != "refused" {
            self.metrics.request_seconds.observe(self.arrived.elapsed().as_secs_f64());
        }
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.end(Outcome::Cancelled);
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use sirocco_process::http::Health;

    use super::*;

    /// Metrics and the page they are on.
    pub(crate) fn metrics() -> (Arc<Metrics>, Page) {
        let page = Page::new(&Health::new("router-node", "r"));
        (Arc::new(Metrics::new(&page)), page)
    }

    fn shows(page: &Page, line: &str) -> bool {
        page.render().unwrap().lines().any(|shown| shown == line)
    }

    #[test]
    fn a_request_is_counted_once_by_what_became_of_it_first() {
        let (metrics, page) = metrics();
        for outcome in Outcome::ALL {
            let tracked = metrics.request(Front::Http);
            let clone = tracked.clone();
            tracked.end(outcome);
            clone.end(Outcome::Internal);
        }
        drop(metrics.request(Front::Grpc));
        for outcome in Outcome::ALL {
            let (name, reason) = outcome.labels();
            let line = |api, count| {
                format!("sirocco_router_requests_total{{api=\"{api}\",outcome=\"{name}\",reason=\"{reason}\"}} {count}")
            };
            assert!(shows(&page, &line("http", 1)), "{outcome:?}");
            assert!(shows(&page, &line("grpc", u8::from(outcome == Outcome::Cancelled))), "{outcome:?}");
        }
        assert!(shows(&page, "sirocco_router_request_seconds_count 6"), "refused ones are left out");
    }

    #[test]
    fn a_node_that_has_left_the_placement_is_no_longer_shown() {
        let (metrics, page) = metrics();
        let [a, b] = ["a", "b"].map(|name| NodeId::new(name).unwrap());
        metrics.hop(&a).asked(5, 1);
        let left = metrics.hop(&b);
        left.refused(RefusalReason::Internal);
        assert!(shows(&page, "sirocco_router_expert_refusals_total{node=\"b\",reason=\"internal\"} 1"));
        metrics.forget_hops(|node| *node == a);
        left.answered(Duration::from_millis(1));
        assert!(!page.render().unwrap().contains("node=\"b\""));
        assert!(shows(&page, "sirocco_router_rows_sent_total{node=\"a\"} 5"));
        metrics.hop(&b);
        assert!(shows(&page, "sirocco_router_expert_refusals_total{node=\"b\",reason=\"internal\"} 0"));
    }
}
