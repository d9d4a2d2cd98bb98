use proptest::prelude::*;

use super::*;
use crate::Isa;
use crate::exp::exp;

/// A sequence's queries, keys and values: `[tokens, heads, head_dim]` and twice `[tokens, kv_heads, head_dim]`.
struct Sequence {
    q: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
}

/// A sequence of `len` tokens in which one number in `special` is NaN, an infinity, a denormal or a zero.
fn sequence(shape: &AttentionShape, len: usize, seed: u64, special: Option<u64>) -> Sequence {
    let mut state = seed | 1;
    let mut next = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state >> 33
    };
    let mut number = move || match special {
        Some(special) if next() % special == 0 => {
            let all = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MIN_POSITIVE / 8.0, -1e-45, -0.0, 0.0, -1e30];
            all[(next() % 8) as usize]
        }
        _ => next() as f32 / (1_u32 << 30) as f32 - 1.0,
    };
    let mut numbers = |count: usize| (0..count).map(|_| number()).collect();
    let (width, kv_width) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
    Sequence { q: numbers(len * width), keys: numbers(len * kv_width), values: numbers(len * kv_width) }
}

/// What one head of one query computes, a number at a time: the oracle.
fn oracle(shape: &AttentionShape, q: &[f32], keys: &[&[f32]], values: &[&[f32]], position: usize) -> Vec<f32> {
    let scale = 1.0 / (shape.head_dim as f32).sqrt();
    let seen = shape.seen(position);
    let mut all: Option<(f32, f32, Vec<f32>)> = None;
    for chunk in (0..seen.end).step_by(CHUNK_TOKENS) {
        let tokens = chunk.max(seen.start)..(chunk + CHUNK_TOKENS).min(seen.end);
        if tokens.is_empty() {
            continue;
        }
        let score = |t: usize| q.iter().zip(keys[t]).fold(0.0_f32, |sum, (q, k)| (q * scale).mul_add(*k, sum));
        let max = tokens.clone().map(score).fold(f32::NEG_INFINITY, f32::max);
        let mut sums = [0.0_f32; 16];
        let mut out = vec![0.0_f32; shape.head_dim];
        for t in tokens {
            let weight = exp(score(t) - max);
            sums[t % 16] += weight;
            for (out, value) in out.iter_mut().zip(values[t]) {
                *out = weight.mul_add(*value, *out);
            }
        }
        for width in [8, 4, 2, 1] {
            for i in 0..width {
                sums[i] += sums[i + width];
            }
        }
        all = Some(match all {
            None => (max, sums[0], out),
            Some((old_max, old_sum, old)) => {
                let larger = old_max.max(max);
                let (a, b) = (exp(old_max - larger), exp(max - larger));
                let out = old.iter().zip(&out).map(|(old, new)| new.mul_add(b, old * a)).collect();
                (larger, sums[0].mul_add(b, old_sum * a), out)
            }
        });
    }
    let (_, sum, out) = all.expect("a token sees itself");
    out.into_iter().map(|value| value / sum).collect()
}

/// A cache that holds one sequence, garbage where nothing is stored; and its blocks.
fn stored(shape: &AttentionShape, sequence: &Sequence) -> (KvLayer, Vec<u32>) {
    let width = shape.kv_heads * shape.head_dim;
    let len = sequence.keys.len() / width;
    // in reverse order of allocation, to see the table used
    let blocks: Vec<u32> = (0..=len.div_ceil(BLOCK_TOKENS) as u32).rev().collect();
    let mut layer = KvLayer::new(*shape, blocks.len());
    let garbage = vec![f32::NAN; width];
    for t in 0..blocks.len() * BLOCK_TOKENS {
        let row = t * width..(t + 1) * width;
        let key = sequence.keys.get(row.clone()).unwrap_or(&garbage);
        layer.store(blocks[t / BLOCK_TOKENS], t % BLOCK_TOKENS, key, sequence.values.get(row).unwrap_or(&garbage));
    }
    (layer, blocks)
}

/// Bits, all NaN alike.
fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| if v.is_nan() { f32::NAN.to_bits() } else { v.to_bits() }).collect()
}

fn shapes() -> impl Strategy<Value = AttentionShape> {
    let dims = prop_oneof![Just(8_usize), Just(16), Just(24), Just(40), Just(64), Just(80), Just(128), Just(256)];
    let window = proptest::option::of(prop_oneof![1_usize..40, 400_usize..1100]);
    (1_usize..3, 1_usize..8, dims, window).prop_map(|(kv_heads, group, head_dim, window)| AttentionShape {
        heads: kv_heads * group,
        kv_heads,
        head_dim,
        window,
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn every_kernel_thread_count_and_cut_gives_the_oracles_bits(
        shape in shapes(), len in prop_oneof![1_usize..70, 500_usize..1100], cut in 1_usize..60, seed in any::<u64>(),
        special in proptest::option::of(30_u64..100_000),
    ) {
        let sequence = sequence(&shape, len, seed, special);
        let (width, dim, group) = (shape.heads * shape.head_dim, shape.head_dim, shape.group());
        let kv_width = shape.kv_heads * dim;
        let start = len.saturating_sub(cut);
        let mut expected = Vec::new();
        for position in start..len {
            for head in 0..shape.heads {
                let of_head = |t| t * kv_width + head / group * dim..t * kv_width + (head / group + 1) * dim;
                let keys: Vec<_> = (0..len).map(|t| &sequence.keys[of_head(t)]).collect();
                let values: Vec<_> = (0..len).map(|t| &sequence.values[of_head(t)]).collect();
                let q = &sequence.q[position * width + head * dim..][..dim];
                expected.extend(oracle(&shape, q, &keys, &values, position));
            }
        }
        let (layer, blocks) = stored(&shape, &sequence);
        let q = &sequence.q[start * width..];
        let whole = [Queries { blocks: &blocks, start, len: len - start }];
        let first = (len - start) / 3;
        let pieces = [
            Queries { blocks: &blocks, start, len: first },
            Queries { blocks: &blocks, start: start + first, len: len - start - first },
        ];
        for isa in Isa::available() {
            for (threads, queries) in [(1, &whole[..]), (2, &pieces), (3, &whole), (9, &whole)] {
                let mut got = vec![f32::NAN; q.len()];
                attend(&layer, q, queries, &mut got, &Pool::with_isa(threads, isa).unwrap());
                prop_assert_eq!(bits(&got), bits(&expected));
            }
        }
    }

    #[test]
    fn it_is_softmax_attention(len in 1_usize..1300, window in proptest::option::of(1_usize..1300), seed in any::<u64>()) {
        let shape = AttentionShape { heads: 4, kv_heads: 2, head_dim: 8, window };
        let sequence = sequence(&shape, len, seed, None);
        let (layer, blocks) = stored(&shape, &sequence);
        let q = &sequence.q[(len - 1) * 32..];
        let mut got = vec![f32::NAN; q.len()];
        attend(&layer, q, &[Queries { blocks: &blocks, start: len - 1, len: 1 }], &mut got, &Pool::new(1).unwrap());
        for (head, (q, got)) in q.chunks(8).zip(got.chunks(8)).enumerate() {
            let of_head = |row: &[f32]| -> Vec<f64> { row[head / 2 * 8..][..8].iter().map(|x| f64::from(*x)).collect() };
            let mut sum = 0.0;
            let mut want = [0.0; 8];
            for t in shape.seen(len - 1) {
                let score: f64 = of_head(&sequence.keys[t * 16..]).iter().zip(q).map(|(k, q)| k * f64::from(*q)).sum();
                let weight = (score / 8_f64.sqrt()).exp();
                sum += weight;
                for (want, value) in want.iter_mut().zip(of_head(&sequence.values[t * 16..])) {
                    *want += weight * value;
                }
            }
            for (got, want) in got.iter().zip(want) {
                prop_assert!((f64::from(*got) - want / sum).abs() < 1e-5);
            }
        }
    }
}
