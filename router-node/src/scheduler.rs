//! Decides what the next step computes: which sequences run, and how many tokens of each.
//!
//! Sequences are admitted in order of arrival as soon as the KV cache has room for all they may ever need, so a running one
//! is never taken back. A step carries one token of every sequence that decodes and, with what is left of its token budget,
//! chunks of prompts, oldest first. Pure: it knows lengths and blocks, never tokens, weights or clocks.

use std::collections::VecDeque;

/// Names a sequence within one engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct SequenceId(pub(crate) u64);

/// What a step and the sequences in it may take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Sequences that run at once.
    pub(crate) sequences: usize,
    /// Tokens computed in one step.
    pub(crate) step_tokens: usize,
    /// Blocks of the KV cache.
    pub(crate) kv_blocks: usize,
    /// Tokens a block holds.
    pub(crate) block_tokens: usize,
}

/// A sequence's part of one step: the tokens at `start..start + len`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Chunk {
    pub(crate) id: SequenceId,
    pub(crate) start: usize,
    pub(crate) len: usize,
    /// It ends at the last known token, so the next token can be sampled from it.
    pub(crate) samples: bool,
}

/// A sequence that could never run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the request may need {needed} tokens of KV cache, the router has {available}")]
pub(crate) struct TooLarge {
    needed: usize,
    available: usize,
}

#[derive(Debug)]
pub(crate) struct Scheduler {
    limits: Limits,
    free_blocks: usize,
    waiting: VecDeque<Sequence>,
    running: Vec<Sequence>,
}

#[derive(Debug)]
struct Sequence {
    id: SequenceId,
    /// Tokens in the KV cache after the steps scheduled so far.
    computed: usize,
    /// Tokens known: the prompt and what was sampled.
    known: usize,
    /// Blocks for all it may ever need.
    blocks: usize,
}

impl Scheduler {
    pub(crate) fn new(limits: Limits) -> Self {
        Self { limits, free_blocks: limits.kv_blocks, waiting: VecDeque::new(), running: Vec::new() }
    }

    /// Queues a sequence of `prompt` tokens that grows by at most `max_new`.
    pub(crate) fn submit(&mut self, id: SequenceId, prompt: usize, max_new: usize) -> Result<(), TooLarge> {
        let needed = prompt + max_new;
        let blocks = needed.div_ceil(self.limits.block_tokens);
        if blocks > self.limits.kv_blocks {
            return Err(TooLarge { needed, available: self.limits.kv_blocks * self.limits.block_tokens });
        }
        self.waiting.push_back(Sequence { id, computed: 0, known: prompt, blocks });
        Ok(())
    }

    /// The next step; empty when there is nothing to do. Its tokens count as computed from here on.
    pub(crate) fn schedule(&mut self) -> Vec<Chunk> {
        self.admit();
        let mut budget = self.limits.step_tokens;
        let mut chunks = Vec::with_capacity(self.running.len());
        for decoding in [true, false] {
            for sequence in &mut self.running {
                let left = sequence.known - sequence.computed;
                let len = left.min(budget);
                if len == 0 || (left == 1) != decoding {
                    continue;
                }
                chunks.push(Chunk { id: sequence.id, start: sequence.computed, len, samples: len == left });
                sequence.computed += len;
                budget -= len;
            }
        }
        chunks
    }

    /// A token was sampled for `id`.
    pub(crate) fn grew(&mut self, id: SequenceId) {
        if let Some(sequence) = self.running.iter_mut().find(|s| s.id == id) {
            sequence.known += 1;
        }
    }

    /// Forgets `id`, wherever it is, and frees its blocks.
    pub(crate) fn remove(&mut self, id: SequenceId) {
        self.waiting.retain(|s| s.id != id);
        if let Some(index) = self.running.iter().position(|s| s.id == id) {
            self.free_blocks += self.running.remove(index).blocks;
        }
    }

    /// Whether no sequence waits or runs.
    pub(crate) fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    fn admit(&mut self) {
        while self.running.len() < self.limits.sequences
            && let Some(next) = self.waiting.pop_front_if(|s| s.blocks <= self.free_blocks)
        {
            self.free_blocks -= next.blocks;
            self.running.push(next);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMITS: Limits = Limits { sequences: 4, step_tokens: 8, kv_blocks: 16, block_tokens: 4 };

    fn chunk(id: u64, start: usize, len: usize, samples: bool) -> Chunk {
        Chunk { id: SequenceId(id), start, len, samples }
    }

    #[test]
    fn a_long_prompt_is_computed_in_chunks_beside_decoding() {
        let mut scheduler = Scheduler::new(LIMITS);
        scheduler.submit(SequenceId(1), 3, 5).unwrap();
        scheduler.submit(SequenceId(2), 10, 5).unwrap();
        assert_eq!(scheduler.schedule(), [chunk(1, 0, 3, true), chunk(2, 0, 5, false)]);
        scheduler.grew(SequenceId(1));
        assert_eq!(scheduler.schedule(), [chunk(1, 3, 1, true), chunk(2, 5, 5, true)]);
        scheduler.remove(SequenceId(1));
        scheduler.grew(SequenceId(2));
        assert_eq!(scheduler.schedule(), [chunk(2, 10, 1, true)]);
    }

    #[test]
    fn what_cannot_fit_waits_and_what_never_can_is_refused() {
        let mut scheduler = Scheduler::new(LIMITS);
        assert!(scheduler.submit(SequenceId(0), 60, 5).unwrap_err().to_string().contains("65 tokens"));
        scheduler.submit(SequenceId(1), 4, 40).unwrap();
        scheduler.submit(SequenceId(2), 4, 40).unwrap();
        assert_eq!(scheduler.schedule(), [chunk(1, 0, 4, true)]);
        scheduler.remove(SequenceId(1));
        assert_eq!(scheduler.schedule(), [chunk(2, 0, 4, true)]);
        scheduler.remove(SequenceId(2));
        assert!(scheduler.is_idle());
    }

    proptest! {
        #[test]
        fn everything_submitted_is_computed_once_in_order_within_budget(
            requests in proptest::collection::vec((1usize..30, 1usize..20), 1..12),
        ) {
            let mut scheduler = Scheduler::new(LIMITS);
            for (i, &(prompt, new)) in requests.iter().enumerate() {
                scheduler.submit(SequenceId(i as u64), prompt, new).unwrap();
            }
            let mut computed = vec![0; requests.len()];
            for _ in 0..2000 {
                let chunks = scheduler.schedule();
                prop_assert!(chunks.len() <= LIMITS.sequences);
                prop_assert!(chunks.iter().map(|c| c.len).sum::<usize>() <= LIMITS.step_tokens);
                for chunk in chunks {
                    let index = chunk.id.0 as usize;
                    let (prompt, new) = requests[index];
                    prop_assert_eq!(chunk.start, computed[index]);
                    computed[index] += chunk.len;
                    if computed[index] == prompt + new - 1 {
                        scheduler.remove(chunk.id);
                    } else if chunk.samples {
                        scheduler.grew(chunk.id);
                    }
                }
            }
            prop_assert!(scheduler.is_idle());
            prop_assert_eq!(scheduler.free_blocks, LIMITS.kv_blocks);
            for (done, (prompt, new)) in computed.iter().zip(&requests) {
                prop_assert_eq!(*done, prompt + new - 1);
            }
        }
    }
}
