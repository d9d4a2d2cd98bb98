//! Decides what the next step computes: which sequences run, how many tokens of each, and in which blocks of the KV cache.
//!
//! A step carries one token of every sequence that decodes and, with what is left of its token budget, chunks of prompts. Who
//! was given least goes first ([`flows`]). A sequence is admitted when the cache has room for all its tokens so far, and takes
//! blocks as it grows; when there are none left, the sequence that was admitted last gives its own back and is computed again
//! later, mostly from what is still cached ([`blocks`]). What is cached is not computed again, and what two sequences
//! have in common only by the first of them.
//!
//! Pure: it knows tokens and blocks, never weights, clients' channels or clocks. Nothing it decides changes a byte.

mod blocks;
mod flows;
#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, HashMap, HashSet};

pub(crate) use flows::{ClientId, Flow};

use blocks::{Blocks, Prefix};
use flows::{Flows, Turn};

/// Names a sequence within one engine, in order of arrival.
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

/// A sequence to compute.
#[derive(Debug)]
pub(crate) struct Submission {
    pub(crate) id: SequenceId,
    pub(crate) flow: Flow,
    /// At least one.
    pub(crate) tokens: Vec<u32>,
    /// Tokens it may grow by.
    pub(crate) max_new: usize,
    /// Take from the cache what is there of it.
    pub(crate) reuse: bool,
}

/// One step. Copies of blocks come first, in order.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Step {
    /// From and to.
    pub(crate) copies: Vec<(u32, u32)>,
    pub(crate) chunks: Vec<Chunk>,
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

/// What the scheduler holds now, and what it has done since it began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) waiting: usize,
    pub(crate) running: usize,
    pub(crate) blocks: usize,
    /// Blocks that sequences hold.
    pub(crate) blocks_held: usize,
    /// Blocks that nobody holds, kept for those that begin alike.
    pub(crate) blocks_cached: usize,
    /// Times a running sequence had to give its blocks back.
    pub(crate) preemptions: u64,
    /// Tokens that were looked for in the cache.
    pub(crate) prefix_queried: u64,
    /// Tokens that were found there.
    pub(crate) prefix_found: u64,
}

#[derive(Debug)]
pub(crate) struct Scheduler {
    limits: Limits,
    blocks: Blocks,
    flows: Flows,
    sequences: HashMap<SequenceId, Sequence>,
    /// The senior first.
    running: Vec<SequenceId>,
    /// Those that wait after they have run, by seniority.
    preempted: BTreeSet<(u64, SequenceId)>,
    totals: Counts,
}

#[derive(Debug)]
struct Sequence {
    flow: Flow,
    /// What its flow had been given when it was first admitted: with its id, its seniority.
    rank: Option<u64>,
    reuse: bool,
    /// The prompt and what was sampled.
    tokens: Vec<u32>,
    /// Tokens in the KV cache after the steps scheduled so far.
    computed: usize,
    /// Its blocks, by position.
    table: Vec<u32>,
    /// Blocks of the table that are published, and the prefix that ends with them.
    published: (usize, Prefix),
    /// Tokens its flow has paid for.
    charged: usize,
    /// Tokens it found in the cache when it was first admitted.
    found: usize,
}

impl Sequence {
    fn left(&self) -> usize {
        self.tokens.len() - self.computed
    }
}

impl Scheduler {
    pub(crate) fn new(limits: Limits) -> Self {
        Self {
            limits,
            blocks: Blocks::new(limits.kv_blocks),
            flows: Flows::default(),
            sequences: HashMap::new(),
            running: Vec::new(),
            preempted: BTreeSet::new(),
            totals: Counts::default(),
        }
    }

    /// Queues a sequence.
    pub(crate) fn submit(&mut self, submission: Submission) -> Result<(), TooLarge> {
        let Submission { id, flow, tokens, max_new, reuse } = submission;
        let needed = tokens.len() + max_new;
        if self.blocks_of(needed) > self.limits.kv_blocks {
            return Err(TooLarge { needed, available: self.limits.kv_blocks * self.limits.block_tokens });
        }
        let sequence = Sequence {
            flow,
            rank: None,
            reuse,
            tokens,
            computed: 0,
            table: Vec::new(),
            published: (0, Prefix::EMPTY),
            charged: 0,
            found: 0,
        };
        self.sequences.insert(id, sequence);
        self.flows.enqueue(flow, id);
        Ok(())
    }

    /// The next step; without chunks only when no sequence waits or runs. Its tokens count as computed from here on, and
    /// [`Scheduler::finish`] must be told when they are.
    pub(crate) fn schedule(&mut self) -> Step {
        let mut step = Step::default();
        self.admit(&mut step);
        // Those who decode first, then who was given least.
        let mut order = self.running.clone();
        order.sort_by_cached_key(|id| {
            let sequence = &self.sequences[id];
            (sequence.left() > 1, self.flows.served(sequence.flow), sequence.rank, *id)
        });
        let mut budget = self.limits.step_tokens;
        let mut beginnings = HashSet::new();
        for id in order {
            if budget == 0 {
                break;
            }
            if let Some(chunk) = self.chunk(id, budget, &mut beginnings, &step) {
                budget -= chunk.len;
                step.chunks.push(chunk);
            }
        }
        step
    }

    /// `step` was computed: its full blocks can be used by others.
    pub(crate) fn finish(&mut self, step: &Step) {
        for chunk in &step.chunks {
            let Some(sequence) = self.sequences.get_mut(&chunk.id) else { continue };
            let size = self.limits.block_tokens;
            while (sequence.published.0 + 1) * size <= sequence.computed {
                let (index, prefix) = sequence.published;
                let tokens = &sequence.tokens[index * size..][..size];
                let (block, prefix) = self.blocks.publish(sequence.table[index], prefix, index, tokens);
                sequence.table[index] = block;
                sequence.published = (index + 1, prefix);
            }
        }
    }

    /// `token` was sampled for `id`.
    pub(crate) fn grew(&mut self, id: SequenceId, token: u32) {
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.tokens.push(token);
        }
    }

    /// Forgets `id`, wherever it is, and lets go of its blocks.
    pub(crate) fn remove(&mut self, id: SequenceId) {
        let Some(sequence) = self.sequences.remove(&id) else { return };
        if self.running.contains(&id) {
            self.running.retain(|running| *running != id);
            self.flows.ended(sequence.flow);
        } else if !sequence.rank.is_some_and(|rank| self.preempted.remove(&(rank, id))) {
            self.flows.dequeue(sequence.flow, id);
        }
        self.blocks.release(sequence.table);
    }

    /// Whether no sequence waits or runs.
    pub(crate) fn is_idle(&self) -> bool {
        self.sequences.is_empty()
    }

    /// The tokens of `id`, the prompt and what was sampled.
    pub(crate) fn tokens(&self, id: SequenceId) -> &[u32] {
        self.sequences.get(&id).map_or(&[], |sequence| &sequence.tokens)
    }

    /// The blocks of `id`, by position.
    pub(crate) fn table(&self, id: SequenceId) -> &[u32] {
        self.sequences.get(&id).map_or(&[], |sequence| &sequence.table)
    }

    /// How many tokens of `id` were found in the cache when it was first admitted.
    pub(crate) fn found(&self, id: SequenceId) -> usize {
        self.sequences.get(&id).map_or(0, |sequence| sequence.found)
    }

    pub(crate) fn counts(&self) -> Counts {
        Counts {
            waiting: self.sequences.len() - self.running.len(),
            running: self.running.len(),
            blocks: self.blocks.count(),
            blocks_held: self.blocks.count() - self.blocks.available(),
            blocks_cached: self.blocks.idle(),
            ..self.totals
        }
    }

    fn blocks_of(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.limits.block_tokens)
    }

    /// Lets sequences run, in order of what their flows were given, as long as there is room for the next one.
    fn admit(&mut self, step: &mut Step) {
        while let Some(Turn { rank, id, flow, .. }) = self.next() {
            while !(self.running.len() < self.limits.sequences && self.acquire(id, step)) {
                // A client with nothing running does not wait for the end of what another one runs.
                let donor = self.flows.donor(flow);
                let of_donor = |running: &&SequenceId| Some(self.sequences[*running].flow) == donor;
                let Some(&victim) = self.running.iter().rev().find(of_donor) else { return };
                self.preempt(victim);
            }
            if !self.preempted.remove(&(rank, id)) {
                self.flows.dequeue(flow, id);
            }
            let sequence = self.sequences.get_mut(&id).expect("it was waiting");
            if sequence.rank.is_none() {
                sequence.rank = Some(rank);
                sequence.found = sequence.computed;
            }
            self.flows.began(flow);
            let is_senior = |other: &SequenceId| (self.sequences[other].rank, *other) < (Some(rank), id);
            let place = self.running.partition_point(is_senior);
            self.running.insert(place, id);
        }
    }

    /// Who is to be admitted next, of those that have run before and those that have not.
    fn next(&self) -> Option<Turn> {
        let again = self.preempted.iter().map(|&(rank, id)| {
            let flow = self.sequences[&id].flow;
            Turn { runs: self.flows.runs(flow), rank, id, flow }
        });
        again.chain(self.flows.next()).min()
    }

    /// Gives a waiting sequence what the cache has of it, if there is room for the rest of its tokens too.
    fn acquire(&mut self, id: SequenceId, step: &mut Step) -> bool {
        self.reuse(id);
        let sequence = &self.sequences[&id];
        let missing = self.blocks_of(sequence.tokens.len()) - sequence.table.len();
        let promised = |id: &SequenceId| {
            let sequence = &self.sequences[id];
            // One more than its tokens need: it is going to grow.
            (self.blocks_of(sequence.tokens.len()) + 1).saturating_sub(sequence.table.len())
        };
        let promised: usize = self.running.iter().map(promised).sum();
        if !self.running.is_empty() && self.blocks.available() < missing + promised {
            self.give_back(id);
            return false;
        }
        self.copy_part(id, step);
        let sequence = &self.sequences[&id];
        self.totals.prefix_queried += if sequence.reuse { sequence.tokens.len() as u64 } else { 0 };
        self.totals.prefix_found += sequence.computed as u64;
        true
    }

    /// Shares the published blocks that a sequence goes on with; its last token is always computed, to sample from. Returns
    /// how many tokens they hold.
    fn reuse(&mut self, id: SequenceId) -> usize {
        let size = self.limits.block_tokens;
        let sequence = self.sequences.get_mut(&id).expect("only known sequences are scheduled");
        let before = sequence.computed;
        let at_a_border = sequence.computed == sequence.table.len() * size;
        while sequence.reuse && at_a_border && sequence.left() > size {
            let next = &sequence.tokens[sequence.computed..][..size];
            let Some((block, prefix)) = self.blocks.find(sequence.published.1, next) else { break };
            self.blocks.hold(block);
            sequence.table.push(block);
            sequence.published = (sequence.table.len(), prefix);
            sequence.computed += size;
        }
        sequence.computed - before
    }

    /// Copies the published block that begins as a sequence goes on.
    fn copy_part(&mut self, id: SequenceId, step: &mut Step) {
        let size = self.limits.block_tokens;
        let sequence = self.sequences.get_mut(&id).expect("only known sequences are scheduled");
        let rest = &sequence.tokens[sequence.computed..sequence.tokens.len() - 1];
        let rest = &rest[..rest.len().min(size)];
        if !sequence.reuse || rest.is_empty() {
            return;
        }
        let Some((from, agreeing)) = self.blocks.find_part(sequence.published.1, rest) else { return };
        let Some(to) = self.blocks.take() else { return };
        sequence.table.push(to);
        sequence.computed += agreeing;
        step.copies.push((from, to));
    }

    /// The next chunk of `id`, of up to `budget` tokens; none when it has to wait for blocks or for a sequence that computes
    /// the same.
    fn chunk(&mut self, id: SequenceId, budget: usize, beginnings: &mut Beginnings, step: &Step) -> Option<Chunk> {
        let size = self.limits.block_tokens;
        if !self.running.contains(&id) {
            return None;
        }
        self.totals.prefix_found += self.reuse(id) as u64;
        let sequence = &self.sequences[&id];
        let at_a_border = sequence.computed == sequence.published.0 * size;
        let beginning = (sequence.reuse && at_a_border && sequence.left() > size)
            .then(|| (sequence.published.1, sequence.tokens[sequence.computed..][..size].to_vec()));
        if beginning.as_ref().is_some_and(|beginning| beginnings.contains(beginning)) {
            return None;
        }
        let wanted = sequence.computed + sequence.left().min(budget);
        while self.sequences[&id].table.len() < self.blocks_of(wanted) {
            let Some(block) = self.take_for(id, step) else { break };
            self.sequences.get_mut(&id)?.table.push(block);
        }
        let sequence = self.sequences.get_mut(&id)?;
        let end = wanted.min(sequence.table.len() * size);
        let (start, len) = (sequence.computed, end - sequence.computed);
        if len == 0 {
            return None;
        }
        sequence.computed = end;
        let unpaid = end.saturating_sub(sequence.charged.max(start));
        sequence.charged = sequence.charged.max(end);
        let samples = sequence.left() == 0;
        let flow = sequence.flow;
        self.flows.charge(flow, unpaid);
        beginnings.extend(beginning);
        Some(Chunk { id, start, len, samples })
    }

    /// A block for `id`, if need be from a sequence that is its junior and not in `step`.
    fn take_for(&mut self, id: SequenceId, step: &Step) -> Option<u32> {
        loop {
            if let Some(block) = self.blocks.take() {
                return Some(block);
            }
            let junior = *self.running.last()?;
            if junior == id || step.chunks.iter().any(|chunk| chunk.id == junior) {
                return None;
            }
            self.preempt(junior);
        }
    }

    /// Takes a running sequence's blocks away and lets it wait.
    fn preempt(&mut self, id: SequenceId) {
        self.running.retain(|running| *running != id);
        self.give_back(id);
        let sequence = &self.sequences[&id];
        self.preempted.insert((sequence.rank.unwrap_or(0), id));
        self.flows.ended(sequence.flow);
        self.totals.preemptions += 1;
    }

    /// Lets go of all blocks of a sequence.
    fn give_back(&mut self, id: SequenceId) {
        let sequence = self.sequences.get_mut(&id).expect("only known sequences are scheduled");
        self.blocks.release(std::mem::take(&mut sequence.table));
        sequence.computed = 0;
        sequence.published = (0, Prefix::EMPTY);
    }
}

/// What sequences of a step go on with, so that no second one computes the same beside it.
type Beginnings = HashSet<(Prefix, Vec<u32>)>;
