//! What consecutive queries of a sequence draw from its chunks: scores, softmax, weighted values. The query heads of one key and
//! value head are rows that share each load of a key and of a value.

use std::cell::RefCell;
use std::ops::Range;

use super::cache::VALUE_PANEL;
use super::{AttentionShape, BLOCK_TOKENS, CHUNK_TOKENS, KvLayer, Queries};
use crate::Isa;
use crate::exp::exp;
use crate::matmul::lanes::Lanes;
use crate::norm::{LANES, add_up};
use crate::pages::LINE;

/// f32 between the scores of one row and those of the next; no power of two, so that rows do not evict each other.
const STRIDE: usize = CHUNK_TOKENS + LANES;

/// How many f32 ahead of its use memory is asked for that is read in one pass.
const AHEAD: usize = 512;

/// Rows of a head that go through a chunk together: few enough that their scores stay near.
const ROWS: usize = 48;

/// A piece of work: queries, and which of their sequence's heads and chunks they look at.
#[derive(Clone, Debug)]
pub(super) struct Task<'a> {
    pub(super) layer: &'a KvLayer,
    pub(super) queries: Queries<'a>,
    /// `[queries, heads, head_dim]`
    pub(super) q: &'a [f32],
    /// Key and value heads.
    pub(super) heads: Range<usize>,
    pub(super) chunks: Range<usize>,
}

/// Length of what a row has drawn from some chunks: its values summed by their weights, `[padded_dim]`, then the largest score and
/// the sum of weights. A sum of 0 says that the row saw nothing.
pub(super) fn record_len(shape: &AttentionShape) -> usize {
    shape.padded_dim() + 2
}

impl Task<'_> {
    /// Length of its result, `[kv_heads, queries, group, record_len]`.
    pub(super) fn len(&self) -> usize {
        let shape = self.layer.shape();
        self.heads.len() * self.queries.len * shape.group() * record_len(shape)
    }

    /// Computes it in `isa`, which this machine has, into `out`.
    pub(super) fn run(&self, isa: Isa, out: &mut [f32]) {
        thread_local! {
            /// Kept, for what a thread frees the system takes back at a cost.
            static SCRATCH: RefCell<Scratch> = RefCell::default();
        }
        out.fill(0.0);
        // SAFETY: the instruction set is there.
        SCRATCH.with_borrow_mut(|scratch| unsafe {
            match isa {
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 => avx512(self, scratch, out),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 => avx2(self, scratch, out),
                #[cfg(target_arch = "aarch64")]
                Isa::Neon => run::<std::arch::aarch64::float32x4_t, 8>(self, scratch, out),
                _ => run::<f32, 4>(self, scratch, out),
            }
        });
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn avx512(task: &Task, scratch: &mut Scratch, out: &mut [f32]) {
    // SAFETY: this function enables what it needs.
    unsafe { run::<std::arch::x86_64::__m512, 12>(task, scratch, out) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn avx2(task: &Task, scratch: &mut Scratch, out: &mut [f32]) {
    // SAFETY: this function enables what it needs.
    unsafe { run::<std::arch::x86_64::__m256, 6>(task, scratch, out) }
}

/// Some queries of a task, at one of its chunks.
struct Piece<'a> {
    task: &'a Task<'a>,
    chunk: usize,
    /// What each row of a head, `[queries, group]`, sees, counted from the start of the chunk.
    seen: Vec<Range<usize>>,
}

impl<'a> Piece<'a> {
    fn new(task: &'a Task<'a>, queries: Range<usize>, chunk: usize) -> Self {
        let shape = task.layer.shape();
        let clip = |position: usize| position.saturating_sub(chunk * CHUNK_TOKENS).min(CHUNK_TOKENS);
        let seen = |query| {
            let seen = shape.seen(task.queries.start + query);
            std::iter::repeat_n(clip(seen.start)..clip(seen.end), shape.group())
        };
        Self { task, chunk, seen: queries.flat_map(seen).collect() }
    }

    /// What `rows` see together, in blocks of the chunk.
    fn blocks(&self, rows: Range<usize>) -> Range<usize> {
        self.seen[rows.start].start / BLOCK_TOKENS..self.seen[rows.end - 1].end.div_ceil(BLOCK_TOKENS)
    }

    /// The block that is number `index` of the chunk.
    fn block(&self, index: usize) -> u32 {
        self.task.queries.blocks[self.chunk * (CHUNK_TOKENS / BLOCK_TOKENS) + index]
    }

    /// Each block that a row sees, its place in the chunk and each head in it, as they lie in memory.
    fn walk(&self) -> impl Iterator<Item = (usize, u32, usize)> {
        let heads = self.task.heads.clone();
        let blocks = self.blocks(0..self.seen.len());
        blocks.flat_map(move |index| heads.clone().map(move |head| (index, self.block(index), head)))
    }
}

/// Calls `$function` for `$rows` rows, a number that is known when it is compiled.
macro_rules! by_rows {
    ($rows:expr, $function:ident::<$lanes:ty, _ $(, $n:literal)?>($($argument:expr),*)) => {
        match $rows {
            1 => $function::<$lanes, 1 $(, $n)?>($($argument),*),
            2 => $function::<$lanes, 2 $(, $n)?>($($argument),*),
            3 => $function::<$lanes, 3 $(, $n)?>($($argument),*),
            4 => $function::<$lanes, 4 $(, $n)?>($($argument),*),
            5 => $function::<$lanes, 5 $(, $n)?>($($argument),*),
            6 => $function::<$lanes, 6 $(, $n)?>($($argument),*),
            7 => $function::<$lanes, 7 $(, $n)?>($($argument),*),
            8 => $function::<$lanes, 8 $(, $n)?>($($argument),*),
            9 => $function::<$lanes, 9 $(, $n)?>($($argument),*),
            10 => $function::<$lanes, 10 $(, $n)?>($($argument),*),
            11 => $function::<$lanes, 11 $(, $n)?>($($argument),*),
            12 => $function::<$lanes, 12 $(, $n)?>($($argument),*),
            rows => unreachable!("{rows} rows at once"),
        }
    };
}

/// What a task writes besides its result.
#[derive(Default)]
struct Scratch {
    /// See [`pack_q`].
    q: Vec<f32>,
    /// Scores, then weights: `[kv_heads, queries, group, STRIDE]`
    weights: Vec<f32>,
    /// What a chunk gives: `[kv_heads, queries, group, record_len]`
    part: Vec<f32>,
}

/// Computes a task, `R` rows at once.
///
/// SAFETY: the machine has the instruction set of `V`.
#[expect(clippy::inline_always, reason = "compiled once per instruction set, inside the caller that enables it")]
#[inline(always)]
unsafe fn run<V: Lanes, const R: usize>(task: &Task, scratch: &mut Scratch, out: &mut [f32]) {
    let shape = task.layer.shape();
    let (group, heads, len) = (shape.group(), task.heads.len(), record_len(shape));
    let at_once = (ROWS / group).max(1);
    scratch.q.clear();
    for first in (0..task.queries.len).step_by(at_once) {
        pack_q::<R>(task, first..(first + at_once).min(task.queries.len), &mut scratch.q);
    }
    let most = heads * at_once.min(task.queries.len) * group;
    scratch.weights.resize(most * STRIDE, 0.0);
    scratch.part.resize(most * len, 0.0);
    for chunk in task.chunks.clone() {
        for first in (0..task.queries.len).step_by(at_once) {
            let piece = Piece::new(task, first..(first + at_once).min(task.queries.len), chunk);
            let rows = piece.seen.len(); // of a head
            let q = &scratch.q[first * group * heads * shape.head_dim..];
            let weights = &mut scratch.weights[..heads * rows * STRIDE];
            let part = &mut scratch.part[..heads * rows * len];
            // SAFETY: by this function's contract.
            unsafe { scores::<V, R>(&piece, q, weights) };
            part.fill(0.0);
            for (weights, part) in weights.chunks_exact_mut(rows * STRIDE).zip(part.chunks_exact_mut(rows * len)) {
                let rows = weights.chunks_exact_mut(STRIDE).zip(part.chunks_exact_mut(len));
                for ((weights, part), seen) in rows.zip(&piece.seen) {
                    soften(weights, seen, &mut part[len - 2..]);
                }
            }
            // SAFETY: by this function's contract.
            unsafe { draw::<V, R>(&piece, weights, part) };
            let of_heads = out.chunks_exact_mut(task.queries.len * group * len);
            for (out, part) in of_heads.zip(part.chunks_exact(rows * len)) {
                let out = &mut out[first * group * len..][..rows * len];
                for (out, part) in out.chunks_exact_mut(len).zip(part.chunks_exact(len)) {
                    fold(out, part);
                }
            }
        }
    }
}

/// Adds the rows of some queries to `packed`, each times 1 / sqrt(head_dim): for each head `R` rows at a time, those as
/// `[head_dim, rows]`.
fn pack_q<const R: usize>(task: &Task, queries: Range<usize>, packed: &mut Vec<f32>) {
    let shape = task.layer.shape();
    let (dim, group) = (shape.head_dim, shape.group());
    let scale = 1.0 / (dim as f32).sqrt();
    for head in task.heads.clone() {
        let rows = queries.clone().flat_map(|query| (0..group).map(move |g| query * shape.heads + head * group + g));
        let rows: Vec<&[f32]> = rows.map(|row| &task.q[row * dim..][..dim]).collect();
        for rows in rows.chunks(R) {
            let start = packed.len();
            packed.resize(start + rows.len() * dim, 0.0);
            for (place, row) in rows.iter().enumerate() {
                for (packed, q) in packed[start + place..].iter_mut().step_by(rows.len()).zip(*row) {
                    *packed = q * scale;
                }
            }
        }
    }
}

/// Writes scores to `out`, `[kv_heads, rows, STRIDE]`: for all tokens of every block of which a row sees something.
///
/// SAFETY: the machine has the instruction set of `V`.
#[expect(clippy::inline_always, reason = "compiled once per instruction set, inside the caller that enables it")]
#[inline(always)]
unsafe fn scores<V: Lanes, const R: usize>(piece: &Piece, q: &[f32], out: &mut [f32]) {
    let layer = piece.task.layer;
    let (rows, dim) = (piece.seen.len(), layer.shape().head_dim);
    for (index, block, head) in piece.walk() {
        let keys = layer.keys(block, head);
        let place = head - piece.task.heads.start;
        for first in (0..rows).step_by(R) {
            let count = R.min(rows - first);
            if !piece.blocks(first..first + count).contains(&index) {
                continue;
            }
            let q = &q[(place * rows + first) * dim..][..count * dim];
            let out = &mut out[(place * rows + first) * STRIDE + index * BLOCK_TOKENS..];
            assert!(out.len() >= (count - 1) * STRIDE + BLOCK_TOKENS && keys.len() >= dim * BLOCK_TOKENS, "shapes fit");
            let (q, keys, out) = (q.as_ptr(), keys.as_ptr(), out.as_mut_ptr());
            // SAFETY: by this function's contract; the slices hold what `count` rows take.
            unsafe { by_rows!(count, score_block::<V, _>(q, keys, dim, out)) };
        }
    }
}

/// Scores of `R` rows for the keys of a block: `q` `[dim, R]`, `keys` `[dim, BLOCK_TOKENS]`, `out` `[R, BLOCK_TOKENS]` in rows of
/// [`STRIDE`]. Each is one chain of fused multiply-adds over ascending elements, from zero.
///
/// SAFETY: the machine has the instruction set of `V`; the pointers lead to that many f32.
#[expect(clippy::inline_always, reason = "compiled once per instruction set, inside the caller that enables it")]
#[inline(always)]
unsafe fn score_block<V: Lanes, const R: usize>(q: *const f32, keys: *const f32, dim: usize, out: *mut f32) {
    for first in (0..BLOCK_TOKENS).step_by(2 * V::COUNT) {
        // SAFETY: by this function's contract; BLOCK_TOKENS is a multiple of two vectors.
        unsafe {
            let mut sums = [[V::splat(&0.0); 2]; R];
            for d in 0..dim {
                let at = d * BLOCK_TOKENS + first;
                fetch::<V, 2>(keys, (dim, BLOCK_TOKENS), (d, first));
                let keys = [V::load(keys.add(at)), V::load(keys.add(at + V::COUNT))];
                for (r, sums) in sums.iter_mut().enumerate() {
                    let q = V::splat(q.add(d * R + r));
                    *sums = [sums[0].add_product(q, keys[0]), sums[1].add_product(q, keys[1])];
                }
            }
            for (r, sums) in sums.into_iter().enumerate() {
                sums[0].store(out.add(r * STRIDE + first));
                sums[1].store(out.add(r * STRIDE + first + V::COUNT));
            }
        }
    }
}

/// Asks for what will be read after a panel `at`, `[rows, width]`, of which `N` vectors are read in each row, from column `first`
/// on; `row` is the row that is being read. All columns' rows together ask for as much as the panel has.
///
/// SAFETY: the machine has the instruction set of `V`.
#[expect(clippy::inline_always, reason = "compiled once per instruction set, inside the caller that enables it")]
#[inline(always)]
unsafe fn fetch<V: Lanes, const N: usize>(at: *const f32, (rows, width): (usize, usize), (row, first): (usize, usize)) {
    // For several passes a panel must be near before the first.
    let ahead = if N * V::COUNT == width { AHEAD } else { rows * width };
    let done = first * rows + row * N * V::COUNT;
    for line in (0..N * V::COUNT).step_by(LINE / size_of::<f32>()) {
        // SAFETY: by this function's contract; what is fetched need not be valid.
        unsafe { V::fetch(at.wrapping_add(ahead + done + line).cast()) };
    }
}

/// Replaces the scores that are seen by e^(score - largest) and what else is in their groups of [`LANES`] by 0; gives the
/// largest and the sum. Lane `i` of a group is summed with lane `i` of the others in ascending order; then the lanes are, by
/// halves.
#[expect(clippy::inline_always, reason = "compiled once per instruction set, inside the caller that enables it")]
#[inline(always)]
fn soften(scores: &mut [f32], seen: &Range<usize>, max_and_sum: &mut [f32]) {
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
    max_and_sum.copy_from_slice(&[max, add_up(sums)]);
}

/// Adds values times their weights, `[kv_heads, rows, STRIDE]`, to `out`, `[kv_heads, rows, record_len]`. Each is one chain of fused
/// multiply-adds over the tokens that the row sees, ascending.
///
/// SAFETY: the machine has the instruction set of `V`.
#[expect(clippy::inline_always, reason = "compiled once per instruction set, inside the caller that enables it")]
#[inline(always)]
unsafe fn draw<V: Lanes, const R: usize>(piece: &Piece, weights: &[f32], out: &mut [f32]) {
    let layer = piece.task.layer;
    let (rows, dim, len) = (piece.seen.len(), layer.shape().padded_dim(), record_len(layer.shape()));
    for (index, block, head) in piece.walk() {
        let values = layer.values(block, head);
        let place = head - piece.task.heads.start;
        let base = index * BLOCK_TOKENS;
        let in_block = |row: usize| {
            let clip = |position: usize| position.saturating_sub(base).min(BLOCK_TOKENS);
            clip(piece.seen[row].start)..clip(piece.seen[row].end)
        };
        let mut first = 0;
        while first < rows {
            let seen = in_block(first);
            let alike = (first + 1..rows.min(first + R)).take_while(|row| in_block(*row) == seen).count();
            let count = 1 + alike;
            if !seen.is_empty() {
                let weights = &weights[(place * rows + first) * STRIDE + base + seen.start..];
                assert!(weights.len() >= (count - 1) * STRIDE + seen.len(), "shapes fit");
                let out = &mut out[(place * rows + first) * len..][..count * len];
                for d in (0..dim).step_by(2 * V::COUNT) {
                    let panel = d / VALUE_PANEL * VALUE_PANEL;
                    let width = VALUE_PANEL.min(dim - panel);
                    let values = values[panel * BLOCK_TOKENS..][seen.start * width..seen.end * width].as_ptr();
                    let (weights, out) = (weights.as_ptr(), out[d..].as_mut_ptr());
                    let (shape, first) = ((seen.len(), width), d - panel);
                    // SAFETY: by this function's contract; the slices hold what `count` rows take.
                    unsafe {
                        if dim - d == V::COUNT {
                            by_rows!(count, draw_block::<V, _, 1>(weights, values, shape, first, out, len));
                        } else {
                            by_rows!(count, draw_block::<V, _, 2>(weights, values, shape, first, out, len));
                        }
                    }
                }
            }
            first += count;
        }
    }
}

/// Adds a panel's `values`, `[tokens, width]`, `N` vectors of each from column `first` on, times the weights of `R` rows,
/// `[R, tokens]` in rows of [`STRIDE`], to `out`, `R` rows of `N` vectors in rows of `len`.
///
/// SAFETY: the machine has the instruction set of `V`; the pointers lead to that many f32.
#[expect(clippy::inline_always, reason = "compiled once per instruction set, inside the caller that enables it")]
#[inline(always)]
unsafe fn draw_block<V: Lanes, const R: usize, const N: usize>(
    weights: *const f32,
    values: *const f32,
    (tokens, width): (usize, usize),
    first: usize,
    out: *mut f32,
    len: usize,
) {
    // SAFETY: by this function's contract.
    unsafe {
        let place = |r: usize, n: usize| out.add(r * len + n * V::COUNT);
        let mut sums = std::array::from_fn::<_, R, _>(|r| std::array::from_fn::<_, N, _>(|n| V::load(place(r, n))));
        for t in 0..tokens {
            fetch::<V, N>(values, (tokens, width), (t, first));
            let values = std::array::from_fn::<_, N, _>(|n| V::load(values.add(t * width + first + n * V::COUNT)));
            for (r, sums) in sums.iter_mut().enumerate() {
                let weight = V::splat(weights.add(r * STRIDE + t));
                for (sum, value) in sums.iter_mut().zip(values) {
                    *sum = sum.add_product(weight, value);
                }
            }
        }
        for (r, sums) in sums.into_iter().enumerate() {
            for (n, sum) in sums.into_iter().enumerate() {
                sum.store(place(r, n));
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
