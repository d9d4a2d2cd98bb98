//! The same bits on every kind of processor: what each of its kernels makes of the same numbers, kept as a digest. `cargo xtask test`
//! looks on the machine it runs on, `cargo xtask neon` on an emulated 64-bit Arm.

use half::bf16;
use sirocco_compute::{
    AttentionShape, BLOCK_TOKENS, ExpertMatrix, ExpertPacker, Isa, KvLayer, PackedMatrix, Pool, Queries, Rotary,
    attend, exp_relative, matmul, rms_norm, softmax, weighted_sum,
};
use sirocco_types::ExpertDtype;

/// Numbers of -1 to 1 that follow from `seed`.
fn numbers(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

fn bf16_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect()
}

/// FNV-1a of the values' bits, which must be numbers: what a NaN looks like is the processor's own.
fn digest(values: &[f32]) -> u64 {
    assert!(values.iter().all(|value| value.is_finite()));
    let bytes = values.iter().flat_map(|value| value.to_bits().to_le_bytes());
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

fn product(pool: &Pool, rows: usize) -> Vec<f32> {
    let (outputs, inputs) = (150, 333);
    let matrix = PackedMatrix::from_bf16(&bf16_bytes(&numbers(1, outputs * inputs)), outputs, inputs).unwrap();
    let mut out = vec![f32::NAN; rows * outputs];
    matmul(&numbers(2, rows * inputs), &matrix, &mut out, pool);
    out
}

fn expert(pool: &Pool, dtype: ExpertDtype, rows: usize) -> Vec<f32> {
    let (hidden, inter) = (100, 210);
    let mut packer = ExpertPacker::new(dtype, hidden, inter);
    for matrix in ExpertMatrix::ALL {
        packer.push_rows(matrix, &bf16_bytes(&numbers(3 + matrix as u64, hidden * inter)));
    }
    packer.finish().unwrap().forward(&numbers(7, rows * hidden), pool)
}

/// The last of 600 tokens look back over three chunks, their queries and keys rotated.
fn attention(pool: &Pool, queries: usize) -> Vec<f32> {
    let (len, dim) = (600, 48);
    let shape = AttentionShape { heads: 6, kv_heads: 2, head_dim: dim, window: None };
    let rotary = Rotary::new(dim, 10_000.0);
    let angles: Vec<_> = (0..len).map(|position| rotary.angles(position)).collect();
    let (mut keys, values) = (numbers(8, len * 2 * dim), numbers(9, len * 2 * dim));
    Rotary::rotate(&mut keys, &angles, pool);
    let blocks: Vec<u32> = (0..len.div_ceil(BLOCK_TOKENS) as u32).collect();
    let mut layer = KvLayer::new(shape, blocks.len());
    for (token, (key, value)) in keys.chunks(2 * dim).zip(values.chunks(2 * dim)).enumerate() {
        layer.store(blocks[token / BLOCK_TOKENS], token % BLOCK_TOKENS, key, value);
    }
    let start = len - queries;
    let mut q: Vec<f32> = numbers(10, queries * 6 * dim).into_iter().map(|x| x * 4.0).collect();
    Rotary::rotate(&mut q, &angles[start..], pool);
    let mut out = vec![f32::NAN; q.len()];
    attend(&layer, &q, &[Queries { blocks: &blocks, start, len: queries }], &mut out, pool);
    out
}

fn norm(pool: &Pool) -> Vec<f32> {
    let mut out = vec![f32::NAN; 5 * 333];
    rms_norm(&numbers(11, 5 * 333), &numbers(12, 333), 1e-5, &mut out, pool);
    out
}

fn exponentials() -> Vec<f32> {
    let mut values = numbers(13, 10_000);
    exp_relative(&mut values, 0.9, 0.03);
    values
}

fn probabilities() -> Vec<f32> {
    let mut values: Vec<f32> = numbers(14, 1000).into_iter().map(|x| x * 20.0).collect();
    softmax(&mut values);
    values
}

#[test]
fn every_kind_of_processor_comes_to_these_bits() {
    for (isa, threads) in Isa::available().into_iter().flat_map(|isa| [(isa, 1), (isa, 3)]) {
        let pool = Pool::with_isa(threads, isa).unwrap();
        let experts = |dtype| [1, 2, 3, 29].map(|rows| expert(&pool, dtype, rows)).concat();
        let got = [
            ("matmul", [1, 2, 3, 29].map(|rows| product(&pool, rows)).concat()),
            ("bf16", experts(ExpertDtype::Bf16)),
            ("int8", experts(ExpertDtype::Int8)),
            ("int4", experts(ExpertDtype::Int4)),
            ("attention", [1, 40].map(|queries| attention(&pool, queries)).concat()),
            ("rms_norm", norm(&pool)),
            ("exp_relative", exponentials()),
            ("softmax", probabilities()),
            ("weighted_sum", weighted_sum(&numbers(15, 4 * 3 * 333), &numbers(16, 4 * 3), 3, 333)),
        ];
        let got = got.map(|(name, values)| (name, format!("{:016x}", digest(&values))));
        let got: Vec<(&str, &str)> = got.iter().map(|(name, digest)| (*name, digest.as_str())).collect();
        assert_eq!(got, DIGESTS, "{isa:?}, {threads} threads");
    }
}

/// As computed by [`Isa::Portable`] on x86-64. They change when a rule of summation does, and then for all.
const DIGESTS: [(&str, &str); 9] = [
    ("matmul", "7bbda197b66c051d"),
    ("bf16", "33db0a554400a27d"),
    ("int8", "f8e223e66f290489"),
    ("int4", "08140b8a0ffc3343"),
    ("attention", "d33c15a5200b657a"),
    ("rms_norm", "46800a119ba67793"),
    ("exp_relative", "588b9874b6e5b3bd"),
    ("softmax", "730776be5fd112cc"),
    ("weighted_sum", "45bf40d85a382939"),
];
