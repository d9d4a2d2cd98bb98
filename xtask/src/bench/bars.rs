//! What the programs' figures must reach: ratios over floors of the same run, on two cores of a server with AVX2.

use super::figures::Bar;

/// Weight bytes, or multiply-adds, of an expert of hidden size 1024 and intermediate size 3584.
pub(super) const KERNELS: &[(&str, Bar)] = &[
    ("expert ffn bf16, 1 row, 2 threads", Bar::above(0.85).stretch(0.95)),
    ("expert ffn bf16, 16 rows, 2 threads", Bar::above(0.6).stretch(0.7)),
    ("expert ffn bf16, 256 rows, 2 threads", Bar::above(0.75).stretch(0.88)),
    ("expert ffn int8, 1 row", Bar::above(0.8).stretch(0.9)),
    ("expert ffn int4, 1 row", Bar::above(0.65).stretch(0.8)),
];

/// Bytes of keys and values.
pub(super) const ATTENTION: &[(&str, Bar)] = &[("attention decode, 1 sequence of 8k", Bar::above(0.7).stretch(0.9))];

/// Median round trips over bare TCP's.
pub(super) const HOP: &[(&str, Bar)] = &[
    ("hop 8 KiB", Bar::below(1.5).stretch(1.2)),
    ("hop 64 KiB", Bar::below(1.25).stretch(1.1)),
    ("hop 512 KiB", Bar::below(1.0).stretch(0.8)),
    ("hop 4 MiB", Bar::below(1.0).stretch(0.8)),
    ("hop to 8 nodes, 512 KiB in all", Bar::below(1.5).stretch(1.3)),
];

/// Tokens per second over rooflines, or a cluster's over one process's.
pub(super) const MODEL: &[(&str, Bar)] = &[
    ("decode of 1 sequence bf16", Bar::above(0.8).stretch(0.92)),
    ("decode of 1 sequence int8", Bar::above(0.75).stretch(0.88)),
    ("decode of 1 sequence int4", Bar::above(0.6).stretch(0.75)),
    ("decode of 16 sequences bf16", Bar::above(0.6).stretch(0.8)),
    ("decode of 16 sequences int8", Bar::above(0.5).stretch(0.7)),
    ("prefill of 512 bf16", Bar::above(0.65).stretch(0.8)),
    ("cluster decode of 1 sequence", Bar::above(0.75).stretch(0.9)),
    ("cluster decode of 16 sequences", Bar::above(0.9).stretch(1.0)),
    ("peak memory bf16", Bar::below(1.1).stretch(1.03)),
    ("loading bf16", Bar::above(1.0)),
];

/// Experts and a router of Mixtral's size on one card: bytes of weights, or of keys and values, over the card's copies, operations over
/// its matrix multiplications, a mix of rows over the same rows evenly.
pub(super) const GPU: &[(&str, Bar)] = &[
    ("gpu expert ffn bf16, 1 row", Bar::above(0.75).stretch(0.9)),
    ("gpu expert ffn bf16, 8 rows", Bar::above(0.75).stretch(0.9)),
    ("gpu expert ffn bf16, 512 rows", Bar::above(0.65).stretch(0.85)),
    ("gpu expert ffn bf16, 4096 rows", Bar::above(0.65).stretch(0.85)),
    ("gpu uneven mix bf16", Bar::above(0.8).stretch(0.95)),
    ("gpu attention decode, 1 sequence of 32k", Bar::above(0.7).stretch(0.9)),
];
