//! Grouped-query attention over a paged KV cache.
//!
//! A query sees the keys of its sequence in chunks of [`CHUNK_TOKENS`], aligned to absolute positions. Each chunk has a softmax of
//! its own; the chunks' results are folded in ascending order. What a query computes depends on its position alone, so cutting a
//! prompt into pieces, reusing blocks, batching with others or spreading chunks over threads changes no bit. Within a block keys
//! lie transposed, so that the lanes of a vector are different keys.

mod kernel;
mod simd;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use crate::Pool;
use crate::wide::wide;
use kernel::{Kernel, Task, fold, kernels, record_len};

/// Tokens in one block of the cache.
pub const BLOCK_TOKENS: usize = 32;

/// Tokens that share one softmax; a multiple of [`BLOCK_TOKENS`].
const CHUNK_TOKENS: usize = 512;

/// Tokens whose scores are treated alike, and to which the vectors of values are padded.
const LANES: usize = 16;

/// Rows of a task: enough that a chunk's keys and values are read from cache, few enough that its scores stay there.
const TASK_ROWS: usize = 48;

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
    pub fn block_len(&self) -> usize {
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

    /// How many positions `queries` see, all together.
    fn all_seen(&self, queries: &Queries) -> usize {
        (queries.start..queries.start + queries.len).map(|position| self.seen(position).len()).sum()
    }

    /// The positions that a token at `position` sees.
    fn seen(&self, position: usize) -> Range<usize> {
        let end = position + 1;
        self.window.map_or(0, |window| end.saturating_sub(window))..end
    }
}

/// One layer's keys and values: blocks of `[kv_heads][head_dim, BLOCK_TOKENS]` and `[kv_heads][BLOCK_TOKENS, head_dim]`, both with
/// `head_dim` padded to a multiple of 16 by zeros.
#[derive(Clone, Copy, Debug)]
pub struct KvBlocks<'a> {
    /// `[blocks, block_len]`
    pub keys: &'a [f32],
    /// `[blocks, block_len]`
    pub values: &'a [f32],
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

/// Writes one token's `key` and `value`, `[kv_heads, head_dim]` each, to `slot` of a block.
pub fn store_kv(
    shape: &AttentionShape,
    (keys, values): (&mut [f32], &mut [f32]),
    slot: usize,
    (key, value): (&[f32], &[f32]),
) {
    let (dim, len) = (shape.head_dim, shape.padded_dim() * BLOCK_TOKENS);
    let heads = key.chunks_exact(dim).zip(value.chunks_exact(dim));
    for ((key, value), (keys, values)) in heads.zip(keys.chunks_exact_mut(len).zip(values.chunks_exact_mut(len))) {
        for (k, keys) in key.iter().zip(keys.chunks_exact_mut(BLOCK_TOKENS)) {
            keys[slot] = *k;
        }
        values[slot * shape.padded_dim()..][..dim].copy_from_slice(value);
    }
}

/// Attends each of `queries`, whose vectors are `q`, `[queries, heads, head_dim]`; returns the same shape. Keys and values
/// of every position up to each query's own must have been stored.
pub fn attend(shape: &AttentionShape, q: &[f32], queries: &[Queries], kv: KvBlocks, pool: &Pool) -> Vec<f32> {
    attend_by(kernels()[0], shape, q, queries, kv, pool)
}

/// [`attend`] by one of the kernels.
fn attend_by(
    kernel: Kernel,
    shape: &AttentionShape,
    q: &[f32],
    queries: &[Queries],
    kv: KvBlocks,
    pool: &Pool,
) -> Vec<f32> {
    let width = shape.heads * shape.head_dim;
    let mut out = vec![0.0; q.len()]; // [queries, heads, head_dim]
    let work = queries.iter().map(|queries| shape.all_seen(queries)).sum::<usize>() * width * 2;
    let tiles = tiles(shape, queries, work / (4 * pool.threads()));
    let tasks: Vec<Task> = tiles.iter().flat_map(|tile| tile.tasks(shape, q, kv)).collect();

    let len = record_len(shape);
    let mut records = vec![0.0; tasks.iter().map(Task::rows).sum::<usize>() * len];
    let mut rest = records.as_mut_slice();
    let targets: Vec<_> = tasks
        .iter()
        .map(|task| {
            let (own, others) = std::mem::take(&mut rest).split_at_mut(task.rows() * len);
            rest = others;
            Mutex::new(own)
        })
        .collect();
    pool.for_each(tasks.len(), work, |index| {
        kernel(&tasks[index], &mut targets[index].lock().unwrap_or_else(PoisonError::into_inner));
    });
    drop(targets);

    let mut rest = records.as_slice();
    let mut of_query = Vec::with_capacity(out.len() / width); // a query's tile, the tile's records, its place in the tile
    for tile in &tiles {
        let (own, others) = rest.split_at(shape.kv_heads * tile.parts.len() * tile.queries.len * shape.group() * len);
        rest = others;
        of_query.extend((0..tile.queries.len).map(|place| (tile, own, place)));
    }
    pool.for_each_row(&mut out, width, records.len(), |index, out| {
        let (tile, records, place) = of_query[index];
        finish(shape, tile.parts.len(), tile.queries.len, records, place, out);
    });
    out
}

/// Consecutive queries of a sequence that are computed together.
struct Tile<'a> {
    /// Number of its first query.
    first: usize,
    queries: Queries<'a>,
    /// The chunks they see, in the parts that are computed apart: all together, or each alone.
    parts: Vec<Range<usize>>,
}

/// Cuts `queries` into tiles; one whose work for a key and value head is more than `most` takes each chunk apart.
fn tiles<'a>(shape: &AttentionShape, queries: &[Queries<'a>], most: usize) -> Vec<Tile<'a>> {
    let at_once = (TASK_ROWS / shape.group()).max(1);
    let mut tiles = Vec::new();
    let mut first = 0;
    for all in queries {
        for done in (0..all.len).step_by(at_once) {
            let queries = Queries { start: all.start + done, len: at_once.min(all.len - done), ..*all };
            let last = shape.seen(queries.start + queries.len - 1);
            let chunks = shape.seen(queries.start).start / CHUNK_TOKENS..last.end.div_ceil(CHUNK_TOKENS);
            let work = shape.all_seen(&queries) * shape.group() * shape.head_dim * 2;
            let parts = if work > most { chunks.map(|chunk| chunk..chunk + 1).collect() } else { vec![chunks] };
            tiles.push(Tile { first, queries, parts });
            first += queries.len;
        }
    }
    tiles
}

impl<'a> Tile<'a> {
    /// Its tasks, in the order of their records: `[kv_heads, parts]`.
    fn tasks(&self, shape: &'a AttentionShape, q: &'a [f32], kv: KvBlocks<'a>) -> impl Iterator<Item = Task<'a>> {
        let width = shape.heads * shape.head_dim;
        let Queries { blocks, start, len } = self.queries;
        let q = &q[self.first * width..][..len * width];
        (0..shape.kv_heads).flat_map(move |kv_head| {
            self.parts.iter().map(move |chunks| Task { shape, kv, blocks, q, start, kv_head, chunks: chunks.clone() })
        })
    }
}

wide! {
    /// Folds the parts of one query; `records` is `[kv_heads, parts, queries, group, record_len]`, `out` `[heads, head_dim]`.
    fn finish(shape: &AttentionShape, parts: usize, queries: usize, records: &[f32], query: usize, out: &mut [f32]) = folded
}

#[expect(clippy::inline_always, reason = "compiled once per instruction set, inside the caller that enables it")]
#[inline(always)]
fn folded(shape: &AttentionShape, parts: usize, queries: usize, records: &[f32], query: usize, out: &mut [f32]) {
    let (len, group) = (record_len(shape), shape.group());
    let mut all = vec![0.0; len];
    for (head, out) in out.chunks_exact_mut(shape.head_dim).enumerate() {
        all.fill(0.0);
        for part in 0..parts {
            let record = ((head / group * parts + part) * queries + query) * group + head % group;
            fold(&mut all, &records[record * len..][..len]);
        }
        let sum = all[len - 1];
        for (out, value) in out.iter_mut().zip(&all) {
            *out = value / sum;
        }
    }
}
