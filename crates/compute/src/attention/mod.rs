//! Grouped-query attention over a paged KV cache.
//!
//! A query sees the keys of its sequence in chunks of [`CHUNK_TOKENS`], aligned to absolute positions. Each chunk has a softmax of
//! its own; the chunks' results are folded in ascending order. What a query computes depends on its position alone, so cutting a
//! prompt into pieces, reusing blocks, batching with others or spreading chunks over threads changes no bit. Within a block keys
//! lie transposed, so that the lanes of a vector are different keys.

mod cache;
mod kernel;
#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::ops::Range;

use crate::Pool;
use crate::disjoint::Disjoint;
use crate::norm::LANES;
use crate::wide::wide;
use kernel::{Task, fold, record_len};

pub use cache::KvLayer;

/// Tokens in one block of the cache.
pub const BLOCK_TOKENS: usize = 32;

/// Tokens that share one softmax; a multiple of [`BLOCK_TOKENS`].
const CHUNK_TOKENS: usize = 256;

/// The heads of an attention layer.
#[derive(Clone, Copy, Debug)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; each serves `heads / kv_heads` query heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// A token sees only this many tokens, itself included.
    pub window: Option<usize>,
}

impl AttentionShape {
    /// f32 elements that the keys of one block take; its values take as many.
    fn block_len(&self) -> usize {
        self.kv_heads * self.padded_dim() * BLOCK_TOKENS
    }

    /// Query heads that share one key and value head.
    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Elements of a value, with the zeros that fill its last vector.
    fn padded_dim(&self) -> usize {
        self.head_dim.next_multiple_of(LANES)
    }

    /// Multiply-adds that `queries` take.
    fn work(&self, queries: &Queries) -> usize {
        let seen = (queries.start..queries.start + queries.len).map(|position| self.seen(position).len());
        seen.sum::<usize>() * self.heads * self.head_dim * 2
    }

    /// The positions that a token at `position` sees.
    fn seen(&self, position: usize) -> Range<usize> {
        let end = position + 1;
        self.window.map_or(0, |window| end.saturating_sub(window))..end
    }
}

/// Consecutive tokens of a sequence that attend.
#[derive(Clone, Copy, Debug)]
pub struct Queries<'a> {
    /// The blocks of the sequence, by position.
    pub blocks: &'a [u32],
    /// Position of the first one.
    pub start: usize,
    /// How many there are.
    pub len: usize,
}

/// Attends each of `queries`, whose vectors are `q`, `[queries, heads, head_dim]`; writes the same shape to `out`. Keys and
/// values of every position up to each query's own must have been stored.
pub fn attend(layer: &KvLayer, q: &[f32], queries: &[Queries], out: &mut [f32], pool: &Pool) {
    thread_local! {
        /// Kept, for what a thread frees the system takes back at a cost.
        static RECORDS: RefCell<Vec<f32>> = RefCell::default();
    }
    RECORDS.with_borrow_mut(|records| attend_in(layer, q, queries, records, out, pool));
}

/// Attends with `records` to keep the tasks' results in.
fn attend_in(layer: &KvLayer, q: &[f32], queries: &[Queries], records: &mut Vec<f32>, out: &mut [f32], pool: &Pool) {
    let shape = layer.shape();
    let width = shape.heads * shape.head_dim;
    let tiles = tiles(shape, queries, pool.threads());
    let tasks: Vec<Task> = tiles.iter().flat_map(|tile| tile.tasks(layer, q)).collect();
    let mut starts = vec![0]; // of the tasks' results among all
    starts.extend(tasks.iter().scan(0, |end, task| {
        *end += task.len();
        Some(*end)
    }));

    records.resize(starts[tasks.len()], 0.0);
    let work = queries.iter().map(|queries| shape.work(queries)).sum();
    let targets = Disjoint::new(records);
    pool.for_each(tasks.len(), work, |index| {
        // SAFETY: every index is handed out once, and its part of the records is its own.
        let out = unsafe { targets.slice(starts[index], starts[index + 1] - starts[index]) };
        tasks[index].run(pool.isa(), out);
    });

    let mut places = Vec::with_capacity(out.len() / width); // of each query: its tile, the tile's records, its place there
    let mut first_task = 0;
    for tile in &tiles {
        let tasks = tile.parts.len() * shape.kv_heads / tile.heads;
        let records = &records[starts[first_task]..starts[first_task + tasks]];
        places.extend((0..tile.queries.len).map(|query| (tile, records, query)));
        first_task += tasks;
    }
    pool.for_each_row(out, width, records.len(), |index, out| {
        let (tile, records, query) = places[index];
        finish(shape, tile, records, query, out);
    });
}

/// Consecutive queries of a sequence that are computed together.
struct Tile<'a> {
    /// Number of its first query.
    first: usize,
    queries: Queries<'a>,
    /// Key and value heads of a task: one or all.
    heads: usize,
    /// The chunks of each task: all together, or each alone.
    parts: Vec<Range<usize>>,
}

/// Cuts `queries` into tiles, and these into tasks that keep `threads` threads equally busy.
fn tiles<'a>(shape: &AttentionShape, queries: &[Queries<'a>], threads: usize) -> Vec<Tile<'a>> {
    /// From so many rows on a head's keys and values are used often enough, once they are near, to go through heads one by one.
    const MANY_ROWS: usize = 32;
    /// Queries of a tile at most.
    const MOST: usize = 64;
    let all: usize = queries.iter().map(|queries| queries.len).sum();
    let at_once = (all * shape.kv_heads / (8 * threads)).clamp(1, MOST);
    let most = queries.iter().map(|queries| shape.work(queries)).sum::<usize>() / (2 * threads);
    let mut tiles = Vec::new();
    let mut first = 0;
    for all in queries {
        for done in (0..all.len).step_by(at_once) {
            let queries = Queries { start: all.start + done, len: at_once.min(all.len - done), ..*all };
            let last = shape.seen(queries.start + queries.len - 1);
            let chunks = shape.seen(queries.start).start / CHUNK_TOKENS..last.end.div_ceil(CHUNK_TOKENS);
            let work = shape.work(&queries);
            let mut heads = if queries.len * shape.group() < MANY_ROWS { shape.kv_heads } else { 1 };
            let apart = work * heads / shape.kv_heads > most && chunks.len() > 1;
            if apart && work * heads / shape.kv_heads / chunks.len() > most {
                heads = 1;
            }
            let parts = if apart { chunks.map(|chunk| chunk..chunk + 1).collect() } else { vec![chunks] };
            tiles.push(Tile { first, queries, heads, parts });
            first += queries.len;
        }
    }
    tiles
}

impl<'a> Tile<'a> {
    /// Its tasks, in the order of their results, `[kv_heads / heads, parts]`.
    fn tasks(&self, layer: &'a KvLayer, q: &'a [f32]) -> impl Iterator<Item = Task<'a>> {
        let AttentionShape { heads: q_heads, kv_heads, head_dim, .. } = *layer.shape();
        let width = q_heads * head_dim;
        let q = &q[self.first * width..][..self.queries.len * width];
        (0..kv_heads).step_by(self.heads).flat_map(move |head| {
            let task = move |chunks: &Range<usize>| Task {
                layer,
                queries: self.queries,
                q,
                heads: head..head + self.heads,
                chunks: chunks.clone(),
            };
            self.parts.iter().map(task)
        })
    }
}

wide! {
    /// Folds the parts of one query of `tile`, whose results are `records`, into `out`, `[heads, head_dim]`.
    fn finish(shape: &AttentionShape, tile: &Tile, records: &[f32], query: usize, out: &mut [f32]) = folded
}

#[expect(clippy::inline_always, reason = "compiled once per instruction set, inside the caller that enables it")]
#[inline(always)]
fn folded(shape: &AttentionShape, tile: &Tile, records: &[f32], query: usize, out: &mut [f32]) {
    let (len, group) = (record_len(shape), shape.group());
    let mut all = vec![0.0; len];
    for (head, out) in out.chunks_exact_mut(shape.head_dim).enumerate() {
        let (kv_head, member) = (head / group, head % group);
        all.fill(0.0);
        for part in 0..tile.parts.len() {
            // [kv_heads / heads, parts, heads, queries, group]
            let task = kv_head / tile.heads * tile.parts.len() + part;
            let record = ((task * tile.heads + kv_head % tile.heads) * tile.queries.len + query) * group + member;
            fold(&mut all, &records[record * len..][..len]);
        }
        let sum = all[len - 1];
        for (out, value) in out.iter_mut().zip(&all) {
            *out = value / sum;
        }
    }
}
