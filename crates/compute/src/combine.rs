//! The weighted sum of what a token's experts return.

use crate::wide::wide;

wide! {
    /// For each token the sum of its `rows`, `[tokens, top_k, width]`, each times its weight, `[tokens, top_k]`; returns
    /// `[tokens, width]`. Each output is one chain of fused multiply-adds over ascending rank, from zero.
    pub fn weighted_sum(rows: &[f32], weights: &[f32], top_k: usize, width: usize) -> Vec<f32> = sums
}

#[expect(clippy::inline_always, reason = "compiled once per instruction set, inside the caller that enables it")]
#[inline(always)]
fn sums(rows: &[f32], weights: &[f32], top_k: usize, width: usize) -> Vec<f32> {
    let mut out = vec![0.0_f32; weights.len() / top_k * width]; // [tokens, width]
    let tokens = rows.chunks_exact(top_k * width).zip(weights.chunks_exact(top_k));
    for (out, (rows, weights)) in out.chunks_exact_mut(width).zip(tokens) {
        for (row, weight) in rows.chunks_exact(width).zip(weights) {
            for (out, value) in out.iter_mut().zip(row) {
                *out = weight.mul_add(*value, *out);
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_summed_in_their_order() {
        let rows = [1e8, 2.0, 1.0, 3.0, -1e8, 4.0, 5.0, 6.0];
        let out = weighted_sum(&rows, &[0.5, 1.0, 1.0, 0.25], 2, 2);
        assert_eq!(out, [0.5_f32.mul_add(1e8, 0.0) + 1.0, 4.0, -1e8 + 1.25, 5.5]);
        assert_eq!(out, sums(&rows, &[0.5, 1.0, 1.0, 0.25], 2, 2));
    }
}
