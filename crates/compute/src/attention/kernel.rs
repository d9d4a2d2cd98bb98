//! What a few queries of one sequence draw from its chunks: scores, softmax, weighted values. The query heads of one key and value
//! head are rows that share each load of a key and of a value.

use std::ops::Range;

#[cfg(target_arch = "aarch64")]
use super::simd::Neon;
#[cfg(target_arch = "x86_64")]
use super::simd::{Avx2, Avx512};
use super::simd::{Plain, Simd};
use super::{AttentionShape, BLOCK_TOKENS, CHUNK_TOKENS, KvBlocks, LANES};
use crate::exp::exp;

/// f32 between the scores of one row and those of the next; no power of two, so that rows do not evict each other.
const STRIDE: usize = CHUNK_TOKENS + LANES;

/// A piece of work: all query heads of one key and value head, of consecutive queries of a sequence, over some of its chunks.
#[derive(Clone, Debug)]
pub(super) struct Task<'a> {
    pub(super) shape: &'a AttentionShape,
    pub(super) kv: KvBlocks<'a>,
    /// The blocks of the sequence, by position.
    pub(super) blocks: &'a [u32],
    /// `[queries, heads, head_dim]`
    pub(super) q: &'a [f32],
    /// Position of the first query.
    pub(super) start: usize,
    pub(super) kv_head: usize,
    pub(super) chunks: Range<usize>,
}

impl Task<'_> {
    /// Rows of the result: queries times the query heads that one key and value head serves.
    pub(super) fn rows(&self) -> usize {
        self.q.len() / (self.shape.kv_heads * self.shape.head_dim)
    }

    /// The positions that `row` sees, counted from the start of `chunk`.
    fn seen(&self, row: usize, chunk: usize) -> Range<usize> {
        let seen = self.shape.seen(self.start + row / self.shape.group());
        let clip = |position: usize| position.saturating_sub(chunk * CHUNK_TOKENS).min(CHUNK_TOKENS);
        clip(seen.start)..clip(seen.end)
    }

    /// Where block `index` of `chunk` starts, for this key and value head, in keys and in values.
    fn block(&self, chunk: usize, index: usize) -> Range<usize> {
        let block = self.blocks[chunk * (CHUNK_TOKENS / BLOCK_TOKENS) + index] as usize;
        let len = self.shape.padded_dim() * BLOCK_TOKENS;
        let start = block * self.shape.block_len() + self.kv_head * len;
        start..start + len
    }
}

/// What a row has drawn from some chunks: its values summed by their weights, then the largest score and the sum of weights. A sum
/// of 0 says that the row saw nothing.
///
/// `[padded_dim + 2]`
pub(super) fn record_len(shape: &AttentionShape) -> usize {
    shape.padded_dim() + 2
}

/// Computes a task; writes `[rows, record_len]`.
pub(super) type Kernel = fn(&Task, &mut [f32]);

/// The kernels that this machine has, the fastest first.
pub(super) fn kernels() -> Vec<Kernel> {
    let mut kernels: Vec<Kernel> = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: AVX-512 was just found.
            kernels.push(|task, out| unsafe { avx512(task, out) });
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: AVX2 and FMA were just found.
            kernels.push(|task, out| unsafe { avx2(task, out) });
        }
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: every such processor has NEON.
    kernels.push(|task, out| unsafe { run::<Neon>(task, out) });
    // SAFETY: it needs no instructions of its own.
    kernels.push(|task, out| unsafe { run::<Plain>(task, out) });
    kernels
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn avx512(task: &Task, out: &mut [f32]) {
    // SAFETY: this function enables what it needs.
    unsafe { run::<Avx512>(task, out) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn avx2(task: &Task, out: &mut [f32]) {
    // SAFETY: this function enables what it needs.
    unsafe { run::<Avx2>(task, out) }
}

/// Calls `$function` for as many rows as `$rows` says, known when it is compiled.
macro_rules! by_rows {
    ($rows:expr, $function:ident::<$simd:ty, _ $(, $n:literal)?>($($argument:expr),*)) => {
        match $rows {
            1 => $function::<$simd, 1 $(, $n)?>($($argument),*),
            2 => $function::<$simd, 2 $(, $n)?>($($argument),*),
            3 => $function::<$simd, 3 $(, $n)?>($($argument),*),
            4 => $function::<$simd, 4 $(, $n)?>($($argument),*),
            5 => $function::<$simd, 5 $(, $n)?>($($argument),*),
            6 => $function::<$simd, 6 $(, $n)?>($($argument),*),
            7 => $function::<$simd, 7 $(, $n)?>($($argument),*),
            8 => $function::<$simd, 8 $(, $n)?>($($argument),*),
            9 => $function::<$simd, 9 $(, $n)?>($($argument),*),
            10 => $function::<$simd, 10 $(, $n)?>($($argument),*),
            11 => $function::<$simd, 11 $(, $n)?>($($argument),*),
            12 => $function::<$simd, 12 $(, $n)?>($($argument),*),
            rows => unreachable!("{rows} rows at once"),
        }
    };
}

/// SAFETY: the machine has the instruction set of `S`.
#[expect(clippy::inline_always, reason = "compiled once per instruction set, inside the caller that enables it")]
#[inline(always)]
unsafe fn run<S: Simd>(task: &Task, out: &mut [f32]) {
    let len = record_len(task.shape);
    let q = packed_q(task, S::ROWS);
    let mut weights = vec![0.0; task.rows() * STRIDE]; // [rows, STRIDE]
    let mut part = vec![0.0; out.len()]; // [rows, record_len]
    out.fill(0.0);
    for chunk in task.chunks.clone() {
        // SAFETY: by this function's contract.
        unsafe { scores::<S>(task, chunk, &q, &mut weights) };
        part.fill(0.0);
        for (row, (weights, part)) in weights.chunks_exact_mut(STRIDE).zip(part.chunks_exact_mut(len)).enumerate() {
            soften(weights, task.seen(row, chunk), &mut part[len - 2..]);
        }
        // SAFETY: by this function's contract.
        unsafe { draw::<S>(task, chunk, &weights, &mut part) };
        for (out, part) in out.chunks_exact_mut(len).zip(part.chunks_exact(len)) {
            fold(out, part);
        }
    }
}

/// The queries' heads, each times 1 / sqrt(head_dim), in groups of at most `at_once` rows: `[groups][head_dim, rows of the group]`.
fn packed_q(task: &Task, at_once: usize) -> Vec<f32> {
    let AttentionShape { heads, head_dim: dim, .. } = *task.shape;
    let (rows, group) = (task.rows(), task.shape.group());
    let scale = 1.0 / (dim as f32).sqrt();
    let mut packed = vec![0.0; rows * dim];
    for row in 0..rows {
        let head = row / group * heads + task.kv_head * group + row % group;
        let first = row / at_once * at_once;
        let width = at_once.min(rows - first);
        let target = packed[first * dim..].iter_mut().skip(row - first).step_by(width);
        for (packed, q) in target.zip(&task.q[head * dim..][..dim]) {
            *packed = q * scale;
        }
    }
    packed
}

/// Writes the scores of `chunk` to `out`, `[rows, STRIDE]`: all of every block of which a row sees something.
///
/// SAFETY: the machine has the instruction set of `S`.
#[expect(clippy::inline_always, reason = "compiled once per instruction set, inside the caller that enables it")]
#[inline(always)]
unsafe fn scores<S: Simd>(task: &Task, chunk: usize, q: &[f32], out: &mut [f32]) {
    let (rows, dim) = (task.rows(), task.shape.head_dim);
    let seen = task.seen(0, chunk).start..task.seen(rows - 1, chunk).end;
    for index in seen.start / BLOCK_TOKENS..seen.end.div_ceil(BLOCK_TOKENS) {
        let keys = &task.kv.keys[task.block(chunk, index)];
        let base = index * BLOCK_TOKENS;
        for first in (0..rows).step_by(S::ROWS) {
            let count = S::ROWS.min(rows - first);
            let seen = task.seen(first, chunk).start..task.seen(first + count - 1, chunk).end;
            if base >= seen.end || base + BLOCK_TOKENS <= seen.start {
                continue;
            }
            let q = &q[first * dim..][..count * dim];
            let out = &mut out[first * STRIDE + base..][..(count - 1) * STRIDE + BLOCK_TOKENS];
            // SAFETY: by this function's contract; the slices hold what `count` rows take.
            unsafe { by_rows!(count, score_block::<S, _>(q.as_ptr(), keys.as_ptr(), dim, out.as_mut_ptr())) };
        }
    }
}

/// Scores of `R` rows for the keys of a block: `q` `[dim, R]`, `keys` `[dim, BLOCK_TOKENS]`, `out` `[R, BLOCK_TOKENS]` in rows of
/// [`STRIDE`]. Each is one chain of fused multiply-adds over ascending elements, from zero.
///
/// SAFETY: the machine has the instruction set of `S`; the pointers lead to that many f32.
#[expect(clippy::inline_always, reason = "compiled once per instruction set, inside the caller that enables it")]
#[inline(always)]
unsafe fn score_block<S: Simd, const R: usize>(q: *const f32, keys: *const f32, dim: usize, out: *mut f32) {
    for first in (0..BLOCK_TOKENS).step_by(2 * S::LANES) {
        // SAFETY: by this function's contract; BLOCK_TOKENS is a multiple of two registers.
        unsafe {
            let mut sums = [[S::splat(0.0); 2]; R];
            for d in 0..dim {
                let key = keys.add(d * BLOCK_TOKENS + first);
                let keys = [S::load(key), S::load(key.add(S::LANES))];
                for (r, sums) in sums.iter_mut().enumerate() {
                    let q = S::splat(*q.add(d * R + r));
                    *sums = [sums[0].add_product(q, keys[0]), sums[1].add_product(q, keys[1])];
                }
            }
            for (r, sums) in sums.into_iter().enumerate() {
                sums[0].store(out.add(r * STRIDE + first));
                sums[1].store(out.add(r * STRIDE + first + S::LANES));
            }
        }
    }
}

/// Replaces the scores that are seen by e^(score - largest) and what else is in their groups of [`LANES`] by 0; gives the largest
/// and the sum. Lane `i` of a group is summed with lane `i` of the others in ascending order; then the lanes are, by halves.
#[expect(clippy::inline_always, reason = "compiled once per instruction set, inside the caller that enables it")]
#[inline(always)]
fn soften(scores: &mut [f32], seen: Range<usize>, max_and_sum: &mut [f32]) {
    if seen.is_empty() {
        return;
    }
    let all = seen.start / LANES * LANES..seen.end.next_multiple_of(LANES);
    scores[all.start..seen.start].fill(f32::NEG_INFINITY);
    scores[seen.end..all.end].fill(f32::NEG_INFINITY);
    let groups = scores[all].as_chunks_mut::<LANES>().0;
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut max = [f32::NEG_INFINITY; LANES];
    for scores in &*groups {
        for (max, score) in max.iter_mut().zip(scores) {
            *max = larger(*max, *score);
        }
    }
    let max = max.into_iter().fold(f32::NEG_INFINITY, larger);
    let mut sums = [0.0_f32; LANES];
    for scores in groups {
        for (sum, score) in sums.iter_mut().zip(scores) {
            *score = exp(*score - max);
            *sum += *score;
        }
    }
    let mut width = LANES;
    while width > 1 {
        width /= 2;
        for i in 0..width {
            sums[i] += sums[i + width];
        }
    }
    max_and_sum.copy_from_slice(&[max, sums[0]]);
}

/// Adds the values of `chunk` times their weights, `[rows, STRIDE]`, to `out`, `[rows, record_len]`. Each is one chain of fused
/// multiply-adds over the tokens that the row sees, ascending.
///
/// SAFETY: the machine has the instruction set of `S`.
#[expect(clippy::inline_always, reason = "compiled once per instruction set, inside the caller that enables it")]
#[inline(always)]
unsafe fn draw<S: Simd>(task: &Task, chunk: usize, weights: &[f32], out: &mut [f32]) {
    let (rows, dim, len) = (task.rows(), task.shape.padded_dim(), record_len(task.shape));
    let seen = task.seen(0, chunk).start..task.seen(rows - 1, chunk).end;
    for index in seen.start / BLOCK_TOKENS..seen.end.div_ceil(BLOCK_TOKENS) {
        let values = &task.kv.values[task.block(chunk, index)];
        let base = index * BLOCK_TOKENS;
        let in_block = |row| {
            let clip = |position: usize| position.saturating_sub(base).min(BLOCK_TOKENS);
            let seen = task.seen(row, chunk);
            clip(seen.start)..clip(seen.end)
        };
        let mut first = 0;
        while first < rows {
            let seen = in_block(first);
            let alike = (first + 1..rows.min(first + S::ROWS)).take_while(|row| in_block(*row) == seen).count();
            let count = 1 + alike;
            if seen.is_empty() {
                first += count;
                continue;
            }
            let values = &values[seen.start * dim..seen.end * dim];
            let weights = &weights[first * STRIDE + base + seen.start..][..(count - 1) * STRIDE + seen.len()];
            let out = &mut out[first * len..][..count * len];
            for d in (0..dim).step_by(2 * S::LANES) {
                let (weights, values, out) = (weights.as_ptr(), values[d..].as_ptr(), out[d..].as_mut_ptr());
                // SAFETY: by this function's contract; the slices hold what `count` rows take.
                unsafe {
                    if dim - d == S::LANES {
                        by_rows!(count, draw_block::<S, _, 1>(weights, values, seen.len(), dim, out));
                    } else {
                        by_rows!(count, draw_block::<S, _, 2>(weights, values, seen.len(), dim, out));
                    }
                }
            }
            first += count;
        }
    }
}

/// Adds `tokens` values, `[N * LANES]` each in rows of `dim`, times the weights of `R` rows, `[R, tokens]` in rows of [`STRIDE`],
/// to `out`, `[R, N * LANES]` in rows of `dim + 2`.
///
/// SAFETY: the machine has the instruction set of `S`; the pointers lead to that many f32.
#[expect(clippy::inline_always, reason = "compiled once per instruction set, inside the caller that enables it")]
#[inline(always)]
unsafe fn draw_block<S: Simd, const R: usize, const N: usize>(
    weights: *const f32,
    values: *const f32,
    tokens: usize,
    dim: usize,
    out: *mut f32,
) {
    // SAFETY: by this function's contract.
    unsafe {
        let mut sums = [[S::splat(0.0); N]; R];
        for (r, sums) in sums.iter_mut().enumerate() {
            for (n, sum) in sums.iter_mut().enumerate() {
                *sum = S::load(out.add(r * (dim + 2) + n * S::LANES));
            }
        }
        for t in 0..tokens {
            let mut value = [S::splat(0.0); N];
            for (n, value) in value.iter_mut().enumerate() {
                *value = S::load(values.add(t * dim + n * S::LANES));
            }
            for (r, sums) in sums.iter_mut().enumerate() {
                let weight = S::splat(*weights.add(r * STRIDE + t));
                for (sum, value) in sums.iter_mut().zip(value) {
                    *sum = sum.add_product(weight, value);
                }
            }
        }
        for (r, sums) in sums.into_iter().enumerate() {
            for (n, sum) in sums.into_iter().enumerate() {
                sum.store(out.add(r * (dim + 2) + n * S::LANES));
            }
        }
    }
}

/// Adds to the record `all` that of later chunks.
#[expect(clippy::inline_always, reason = "compiled once per instruction set, inside the caller that enables it")]
#[inline(always)]
pub(super) fn fold(all: &mut [f32], part: &[f32]) {
    let last = all.len() - 2;
    let (max, sum) = (part[last], part[last + 1]);
    if sum == 0.0 {
        return;
    }
    if all[last + 1] == 0.0 {
        all.copy_from_slice(part);
        return;
    }
    let larger = if max > all[last] { max } else { all[last] };
    let (old, new) = (exp(all[last] - larger), exp(max - larger));
    for (all, part) in all.iter_mut().zip(part) {
        *all = part.mul_add(new, *all * old);
    }
    all[last] = larger;
}
