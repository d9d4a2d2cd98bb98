//! Normalisation, softmax and rotary position embedding, each in one fixed order.

use crate::Pool;
use crate::wide::wide;

/// Sums that are kept side by side where a row is summed up: element `i` belongs to sum `i % LANES`.
pub(crate) const LANES: usize = 16;

/// Adds up [`LANES`] sums, by halves.
#[expect(clippy::inline_always, reason = "compiled once per instruction set, inside the caller that enables it")]
#[inline(always)]
pub(crate) fn add_up(mut sums: [f32; LANES]) -> f32 {
    let mut width = LANES;
    while width > 1 {
        width /= 2;
        for i in 0..width {
            sums[i] += sums[i + width];
        }
    }
    sums[0]
}

/// Divides each row of `x`, `[rows, weight.len()]`, by its root mean square, multiplies it by `weight` and writes it to `out`, of
/// the same shape. Squares are added to 16 sums in turn, those by halves.
///
/// Source: Root Mean Square Layer Normalization, arXiv 1910.07467.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32], pool: &Pool) {
    let width = weight.len();
    pool.for_each_row(out, width, x.len(), |row, out| normalise(&x[row * width..][..width], weight, eps, out));
}

wide! {
    /// Normalises one row.
    fn normalise(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) = normalised
}

#[expect(clippy::inline_always, reason = "compiled once per instruction set, inside the caller that enables it")]
#[inline(always)]
fn normalised(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let mut sums = [0.0_f32; LANES];
    let (groups, rest) = x.as_chunks::<LANES>();
    for group in groups {
        for (sum, x) in sums.iter_mut().zip(group) {
            *sum = x.mul_add(*x, *sum);
        }
    }
    for (sum, x) in sums.iter_mut().zip(rest) {
        *sum = x.mul_add(*x, *sum);
    }
    let scale = 1.0 / (add_up(sums) / x.len() as f32 + eps).sqrt();
    for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
        *out = weight * (x * scale);
    }
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

    /// Rotates each head of `rows`, `[angles.len(), heads, head_dim]`, by its row's angles.
    pub fn rotate(rows: &mut [f32], angles: &[Vec<(f32, f32)>], pool: &Pool) {
        let len = rows.len();
        let width = len.checked_div(angles.len()).unwrap_or(1);
        pool.for_each_row(rows, width, len, |row, heads| rotate(heads, &angles[row]));
    }
}

wide! {
    /// Rotates each head of a row.
    fn rotate(row: &mut [f32], angles: &[(f32, f32)]) = rotated
}

#[expect(clippy::inline_always, reason = "compiled once per instruction set, inside the caller that enables it")]
#[inline(always)]
fn rotated(row: &mut [f32], angles: &[(f32, f32)]) {
    let half = angles.len();
    for head in row.chunks_exact_mut(2 * half) {
        let (first, second) = head.split_at_mut(half);
        for ((a, b), &(cos, sin)) in first.iter_mut().zip(second).zip(angles) {
            (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_normalised_row_has_unit_mean_square() {
        let mut out = [0.0; 4];
        rms_norm(&[3.0, -4.0, 0.0, 5.0], &[1.0, 1.0, 1.0, 2.0], 0.0, &mut out, &Pool::new(1).unwrap());
        let scale = 1.0 / (50.0_f32 / 4.0).sqrt();
        let expected = [3.0 * scale, -4.0 * scale, 0.0, 2.0 * (5.0 * scale)];
        assert_eq!(out.map(f32::to_bits), expected.map(f32::to_bits));
    }

    #[test]
    fn rows_are_normalised_alike_by_any_instructions_and_threads() {
        for width in [1, 15, 16, 17, 1000] {
            let x: Vec<f32> = (0..300 * width).map(|i| (i as f32 * 12.9898).sin() * 1e3).collect();
            let weight = &x[x.len() - width..];
            let mut out = vec![0.0; x.len()];
            rms_norm(&x, weight, 1e-5, &mut out, &Pool::new(3).unwrap());
            for (x, out) in x.chunks(width).zip(out.chunks(width)) {
                let mut sums = [0.0_f32; 16];
                for (i, x) in x.iter().enumerate() {
                    sums[i % 16] = x.mul_add(*x, sums[i % 16]);
                }
                for half in [8, 4, 2, 1] {
                    for i in 0..half {
                        sums[i] += sums[i + half];
                    }
                }
                let scale = 1.0 / (sums[0] / width as f32 + 1e-5).sqrt();
                assert!(
                    out.iter().zip(x).zip(weight).all(|((out, x), w)| out.to_bits() == (w * (x * scale)).to_bits())
                );
            }
        }
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
        Rotary::rotate(&mut head, &[rotary.angles(1)], &Pool::new(1).unwrap());
        assert!((head[0] - 1.0_f32.cos()).abs() < 1e-6 && (head[2] - 1.0_f32.sin()).abs() < 1e-6);
    }
}
