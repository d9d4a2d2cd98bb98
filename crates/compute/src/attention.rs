//! Grouped-query attention over a paged KV cache.
//!
//! A query walks the keys of its sequence in ascending blocks of [`BLOCK_TOKENS`], aligned to absolute positions, with one
//! online softmax. What it computes depends on its position alone, so cutting a prompt into chunks, reusing blocks or
//! batching with others changes no bit. Within a block keys lie transposed, so that the lanes of a vector are different keys.

use crate::Pool;
use crate::exp::exp;
use crate::wide::wide;

/// Tokens in one block of the cache.
pub const BLOCK_TOKENS: usize = 16;

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
        self.kv_heads * self.head_dim * BLOCK_TOKENS
    }
}

/// One layer's keys and values: blocks of `[kv_heads, head_dim, BLOCK_TOKENS]` and `[kv_heads, BLOCK_TOKENS, head_dim]`.
#[derive(Clone, Copy, Debug)]
pub struct KvBlocks<'a> {
    /// `[blocks, block_len]`
    pub keys: &'a [f32],
    /// `[blocks, block_len]`
    pub values: &'a [f32],
}

/// One token that attends.
#[derive(Clone, Copy, Debug)]
pub struct Query<'a> {
    /// Its position in its sequence.
    pub position: usize,
    /// The blocks of its sequence, by position.
    pub blocks: &'a [u32],
}

/// Writes one token's `key` and `value`, `[kv_heads, head_dim]` each, to `slot` of a block.
pub fn store_kv(
    shape: &AttentionShape,
    (keys, values): (&mut [f32], &mut [f32]),
    slot: usize,
    (key, value): (&[f32], &[f32]),
) {
    let dim = shape.head_dim;
    for (i, k) in key.iter().enumerate() {
        keys[i * BLOCK_TOKENS + slot] = *k;
    }
    for (head, v) in value.chunks_exact(dim).enumerate() {
        values[(head * BLOCK_TOKENS + slot) * dim..][..dim].copy_from_slice(v);
    }
}

/// Attends each of `queries`, whose vectors are `q`, `[queries, heads, head_dim]`; returns the same shape. Keys and values
/// of every position up to each query's own must have been stored.
pub fn attend(shape: &AttentionShape, q: &[f32], queries: &[Query], kv: KvBlocks, pool: &Pool) -> Vec<f32> {
    let width = shape.heads * shape.head_dim;
    let work = queries.iter().map(|query| (query.position + 1) * width * 2).sum();
    let mut out = vec![0.0; q.len()]; // [queries, heads, head_dim]
    pool.for_each_row(&mut out, width, work, |index, row| {
        one(shape, &q[index * width..][..width], &queries[index], kv, row);
    });
    out
}

wide! {
    /// Attends one token.
    fn one(shape: &AttentionShape, q: &[f32], query: &Query, kv: KvBlocks, out: &mut [f32]) = heads
}

#[expect(clippy::inline_always, reason = "compiled once per instruction set, inside the caller that enables it")]
#[inline(always)]
fn heads(shape: &AttentionShape, q: &[f32], query: &Query, kv: KvBlocks, out: &mut [f32]) {
    let dim = shape.head_dim;
    let group = shape.heads / shape.kv_heads;
    for (head, (q, out)) in q.chunks_exact(dim).zip(out.chunks_exact_mut(dim)).enumerate() {
        one_head(shape, q, query, head / group, kv, out);
    }
}

#[expect(clippy::inline_always, reason = "compiled once per instruction set, inside the caller that enables it")]
#[inline(always)]
fn one_head(shape: &AttentionShape, q: &[f32], query: &Query, kv_head: usize, kv: KvBlocks, out: &mut [f32]) {
    let dim = shape.head_dim;
    let scale = 1.0 / (dim as f32).sqrt();
    let end = query.position + 1;
    let first = shape.window.map_or(0, |window| end.saturating_sub(window));
    let (mut max, mut sum) = (f32::NEG_INFINITY, 0.0_f32);
    out.fill(0.0);
    for (index, &block) in query.blocks.iter().enumerate().take(end.div_ceil(BLOCK_TOKENS)).skip(first / BLOCK_TOKENS) {
        let start = block as usize * shape.block_len() + kv_head * dim * BLOCK_TOKENS;
        let keys = &kv.keys[start..][..dim * BLOCK_TOKENS]; // [head_dim, BLOCK_TOKENS]
        let values = &kv.values[start..][..dim * BLOCK_TOKENS]; // [BLOCK_TOKENS, head_dim]
        let base = index * BLOCK_TOKENS;
        let seen = first.saturating_sub(base)..(end - base).min(BLOCK_TOKENS);

        let mut scores = [0.0_f32; BLOCK_TOKENS];
        for (q, keys) in q.iter().zip(keys.as_chunks::<BLOCK_TOKENS>().0) {
            for (score, key) in scores.iter_mut().zip(keys) {
                *score = q.mul_add(*key, *score);
            }
        }
        for score in &mut scores {
            *score *= scale;
        }
        let new_max = scores[seen.clone()].iter().copied().fold(max, f32::max);
        let shrink = exp(max - new_max);
        max = new_max;
        sum *= shrink;
        for out in out.iter_mut() {
            *out *= shrink;
        }
        // All at once; what is not seen is not read below. A loop, for `map` of an array is not inlined into wide code.
        for score in &mut scores {
            *score = exp(*score - max);
        }
        for (weight, value) in scores[seen.clone()].iter().zip(values[seen.start * dim..].chunks_exact(dim)) {
            sum += weight;
            for (out, value) in out.iter_mut().zip(value) {
                *out = weight.mul_add(*value, *out);
            }
        }
    }
    for out in out {
        *out /= sum;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Softmax attention in f64, straight from the definition.
    fn definition(shape: &AttentionShape, q: &[f32], keys: &[Vec<f32>], values: &[Vec<f32>]) -> Vec<f64> {
        let (dim, group) = (shape.head_dim, shape.heads / shape.kv_heads);
        let first = shape.window.map_or(0, |window| keys.len().saturating_sub(window));
        let mut out = Vec::new();
        for (head, q) in q.chunks(dim).enumerate() {
            let range = head / group * dim..(head / group + 1) * dim;
            let dot = |k: &Vec<f32>| -> f64 { q.iter().zip(&k[range.clone()]).map(|(a, b)| f64::from(a * b)).sum() };
            let weights: Vec<f64> = keys[first..].iter().map(|k| (dot(k) / (dim as f64).sqrt()).exp()).collect();
            let sum: f64 = weights.iter().sum();
            for i in range {
                out.push(weights.iter().zip(&values[first..]).map(|(w, v)| w * f64::from(v[i])).sum::<f64>() / sum);
            }
        }
        out
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn paged_attention_is_softmax_attention(
            len in 1usize..70, window in proptest::option::of(1usize..40), kv_heads in 1usize..3, seed in 0u32..1000,
        ) {
            let shape = AttentionShape { heads: kv_heads * 2, kv_heads, head_dim: 8, window };
            let noise = |i: usize| ((i as f32 + seed as f32) * 12.9898).sin();
            let row = |t: usize, salt: usize| -> Vec<f32> { (0..kv_heads * 8).map(|i| noise(t * 31 + i * 7 + salt)).collect() };
            let (keys, values): (Vec<_>, Vec<_>) = (0..len).map(|t| (row(t, 1), row(t, 500))).unzip();
            let q: Vec<f32> = (0..shape.heads * 8).map(|i| noise(i * 3 + 90)).collect();

            // blocks in reverse order of allocation, to see the table used
            let blocks: Vec<u32> = (0..len.div_ceil(BLOCK_TOKENS) as u32).rev().collect();
            let mut cache = vec![0.0; blocks.len() * shape.block_len()];
            let mut cache_v = cache.clone();
            for t in 0..len {
                let at = blocks[t / BLOCK_TOKENS] as usize * shape.block_len();
                let block = (&mut cache[at..][..shape.block_len()], &mut cache_v[at..][..shape.block_len()]);
                store_kv(&shape, block, t % BLOCK_TOKENS, (&keys[t], &values[t]));
            }
            let kv = KvBlocks { keys: &cache, values: &cache_v };
            let query = Query { position: len - 1, blocks: &blocks };
            let out = attend(&shape, &q, &[query], kv, &Pool::new(1).unwrap());
            for (got, want) in out.iter().zip(definition(&shape, &q, &keys, &values)) {
                prop_assert!((f64::from(*got) - want).abs() < 1e-4);
            }
            let mut plain = vec![0.0; q.len()];
            heads(&shape, &q, &query, kv, &mut plain);
            prop_assert!(plain.iter().zip(&out).all(|(a, b)| a.to_bits() == b.to_bits()), "instructions change no bit");
        }
    }
}
