//! Normalisation, softmax and rotary position embedding, each in one fixed order.

use crate::wide::wide;

wide! {
    /// Divides each row of `x`, `[rows, weight.len()]`, by its root mean square and multiplies it by `weight`.
    ///
    /// Source: Root Mean Square Layer Normalization, arXiv 1910.07467.
    pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> = normalised
}

#[expect(clippy::inline_always, reason = "compiled once per instruction set, inside the caller that enables it")]
#[inline(always)]
fn normalised(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let width = weight.len();
    let mut out = Vec::with_capacity(x.len());
    for row in x.chunks_exact(width) {
        let squares = row.iter().fold(0.0_f32, |sum, x| x.mul_add(*x, sum));
        let scale = 1.0 / (squares / width as f32 + eps).sqrt();
        out.extend(row.iter().zip(weight).map(|(x, w)| w * (x * scale)));
    }
    out
}

/// Replaces `logits` by their softmax. Sums in ascending order, in f32.
pub fn softmax(logits: &mut [f32]) {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    for x in logits.iter_mut() {
        *x = libm::expf(*x - max);
        sum += *x;
    }
    for x in logits {
        *x /= sum;
    }
}

/// The rotation of every position, pairing element `i` of a head with element `i + head_dim / 2`.
///
/// Source: RoFormer, arXiv 2104.09864, in the layout of Hugging Face checkpoints.
#[derive(Clone, Debug)]
pub struct Rotary {
    /// `[head_dim / 2]`, radians per position.
    frequencies: Vec<f32>,
}

impl Rotary {
    /// For heads of `head_dim` (even) elements.
    pub fn new(head_dim: usize, theta: f32) -> Self {
        let frequency = |i: usize| 1.0 / libm::powf(theta, (2 * i) as f32 / head_dim as f32);
        Self { frequencies: (0..head_dim / 2).map(frequency).collect() }
    }

    /// Cosines and sines of `position`, `[head_dim / 2]` each.
    pub fn angles(&self, position: usize) -> Vec<(f32, f32)> {
        let angle = |frequency: &f32| {
            let angle = position as f32 * frequency;
            (libm::cosf(angle), libm::sinf(angle))
        };
        self.frequencies.iter().map(angle).collect()
    }

    /// Rotates each head of `row`, `[heads, head_dim]`, by `angles`.
    pub fn rotate(row: &mut [f32], angles: &[(f32, f32)]) {
        let half = angles.len();
        for head in row.chunks_exact_mut(2 * half) {
            let (first, second) = head.split_at_mut(half);
            for ((a, b), &(cos, sin)) in first.iter_mut().zip(second).zip(angles) {
                (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_normalised_row_has_unit_mean_square() {
        let out = rms_norm(&[3.0, -4.0, 0.0, 5.0], &[1.0, 1.0, 1.0, 2.0], 0.0);
        let scale = 1.0 / (50.0_f32 / 4.0).sqrt();
        assert_eq!(out, [3.0 * scale, -4.0 * scale, 0.0, 2.0 * (5.0 * scale)]);
    }

    #[test]
    fn softmax_sums_to_one_and_survives_large_logits() {
        let mut logits = [1000.0, 999.0, -1000.0];
        softmax(&mut logits);
        assert!((logits.iter().sum::<f32>() - 1.0).abs() < 1e-6);
        assert!((logits[0] - 0.731_058_6).abs() < 1e-6 && logits[2].abs() < f32::EPSILON);
    }

    #[test]
    fn rotation_keeps_lengths_and_turns_by_the_position() {
        let rotary = Rotary::new(4, 10_000.0);
        let mut head = [1.0, 0.0, 0.0, 0.0];
        Rotary::rotate(&mut head, &rotary.angles(1));
        assert!((head[0] - 1.0_f32.cos()).abs() < 1e-6 && (head[2] - 1.0_f32.sin()).abs() < 1e-6);
    }
}
