//! Asks, and notes when what came back. Never judges.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use sirocco_proto::inference::InferenceServiceClient;
use sirocco_proto::tonic::transport::Channel;
use sirocco_proto::tonic::{Code, Status};
use sirocco_proto::wire::inference as wire;
use sirocco_proto::wire::inference::generate_response::Event;
use tokio::task::JoinSet;

use crate::random::Random;

/// What to ask, and when.
pub(super) struct Plan {
    /// At least one; used in turn.
    pub(super) clients: Vec<InferenceServiceClient<Channel>>,
    pub(super) arrivals: Arrivals,
    pub(super) duration: Duration,
    pub(super) asked: Asked,
    pub(super) seed: u64,
}

/// When requests come.
pub(super) enum Arrivals {
    /// The next one as soon as one is answered, in each of so many streams.
    AsAnswered { streams: usize },
    /// At random moments, so many a second.
    Random { rate: f64 },
}

/// What every request asks.
#[derive(Clone, Copy)]
pub(super) struct Asked {
    pub(super) prompt_tokens: u32,
    pub(super) shared_tokens: u32,
    pub(super) max_tokens: u32,
    pub(super) vocab_size: u32,
}

/// What became of one request.
pub(super) struct Outcome {
    /// When it was sent, since the beginning.
    pub(super) sent: Duration,
    /// When each token came, since the beginning.
    pub(super) tokens: Vec<Duration>,
    /// When it ended, since the beginning.
    pub(super) ended: Duration,
    pub(super) end: End,
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Completed,
    /// The router has too much to do.
    Refused,
    Failed,
}

/// Puts the load on; returns when everything that was asked has ended.
pub(super) async fn run(plan: Plan) -> Vec<Outcome> {
    let Plan { clients, arrivals, duration, asked, seed } = plan;
    let began = Instant::now();
    let next = Arc::new(AtomicU64::new(0));
    let mut tasks: JoinSet<Vec<Outcome>> = JoinSet::new();
    match arrivals {
        Arrivals::AsAnswered { streams } => {
            for stream in 0..streams {
                let (client, next) = (clients[stream % clients.len()].clone(), Arc::clone(&next));
                tasks.spawn(async move {
                    let mut outcomes = Vec::new();
                    while began.elapsed() < duration {
                        let number = next.fetch_add(1, Ordering::Relaxed);
                        outcomes.push(ask(client.clone(), asked, (seed, number), began).await);
                    }
                    outcomes
                });
            }
        }
        Arrivals::Random { rate } => {
            let mut moments = Random(seed ^ 0x5bd1_e995);
            let mut at = Duration::ZERO;
            while at < duration {
                tokio::time::sleep_until((began + at).into()).await;
                let number = next.fetch_add(1, Ordering::Relaxed);
                let client = clients[number as usize % clients.len()].clone();
                tasks.spawn(async move { vec![ask(client, asked, (seed, number), began).await] });
                // Exponential gaps: as many requests in any second as in any other, on average.
                at += Duration::from_secs_f64(-(1.0 - moments.uniform()).ln() / rate);
            }
        }
    }
    let mut outcomes = Vec::new();
    while let Some(ended) = tasks.join_next().await {
        outcomes.extend(ended.unwrap_or_default());
    }
    outcomes
}

/// Sends request `number` of a run and waits for its end.
async fn ask(
    mut client: InferenceServiceClient<Channel>,
    asked: Asked,
    (seed, number): (u64, u64),
    began: Instant,
) -> Outcome {
    let request = wire::GenerateRequest {
        prompt: Some(wire::generate_request::Prompt::TokenIds(wire::TokenIds { ids: prompt(asked, seed, number) })),
        sampling: Some(wire::SamplingParams { seed: Some(number), ..Default::default() }),
        max_tokens: Some(asked.max_tokens),
        ignore_eos: true,
        ..Default::default()
    };
    let sent = began.elapsed();
    let mut tokens = Vec::with_capacity(asked.max_tokens as usize);
    let result: Result<(), Status> = async {
        let mut stream = client.generate(request).await?.into_inner();
        while let Some(message) = stream.message().await? {
            match message.event {
                Some(Event::Token(_)) => tokens.push(began.elapsed()),
                Some(Event::Finished(_)) => return Ok(()),
                _ => {}
            }
        }
        Err(Status::data_loss("the stream ended before the completion did"))
    }
    .await;
    let end = match result {
        Ok(()) => End::Completed,
        Err(status) if status.code() == Code::ResourceExhausted => End::Refused,
        Err(_) => End::Failed,
    };
    Outcome { sent, tokens, ended: began.elapsed(), end }
}

/// The token ids of prompt `number`: the first ones are the same for all of a seed.
fn prompt(asked: Asked, seed: u64, number: u64) -> Vec<u32> {
    let mut shared = Random(seed.wrapping_mul(3));
    let mut own = Random(seed.wrapping_mul(3).wrapping_add(number.wrapping_add(1) << 20));
    let mut draw = |index| {
        let random = if index < asked.shared_tokens { &mut shared } else { &mut own };
        (random.next() % u64::from(asked.vocab_size.max(1))) as u32
    };
    (0..asked.prompt_tokens).map(&mut draw).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_have_in_common_what_they_should_and_no_more() {
        let asked = Asked { prompt_tokens: 50, shared_tokens: 20, max_tokens: 1, vocab_size: 4096 };
        let (first, second) = (prompt(asked, 7, 0), prompt(asked, 7, 1));
        assert_eq!(first[..20], second[..20]);
        assert_ne!(first[20..], second[20..]);
        assert_eq!(first, prompt(asked, 7, 0));
        assert_ne!(first[..20], prompt(asked, 8, 0)[..20]);
        assert!(first.iter().all(|id| *id < 4096));
    }
}
