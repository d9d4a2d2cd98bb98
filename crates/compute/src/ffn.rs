//! One expert: a SwiGLU feed-forward network.

use crate::exp::exp;
use crate::wide::wide;
use crate::{PackedMatrix, Pool, matmul};

/// The weights of one expert.
#[derive(Debug)]
pub struct ExpertWeights {
    /// `w1`, `[intermediate_size, hidden_size]`: the half that is gated.
    pub gate: PackedMatrix,
    /// `w3`, `[intermediate_size, hidden_size]`: the half that is not.
    pub up: PackedMatrix,
    /// `w2`, `[hidden_size, intermediate_size]`: back to a hidden state.
    pub down: PackedMatrix,
}

impl ExpertWeights {
    /// Memory the weights take.
    pub fn bytes(&self) -> usize {
        self.gate.bytes() + self.up.bytes() + self.down.bytes()
    }

    /// `down(silu(gate(x)) * up(x))` of each row of `x`, `[rows, hidden_size]`, in the same shape. A row's result does not
    /// depend on the rows beside it. Source: GLU Variants Improve Transformer, arXiv 2002.05202.
    pub fn forward(&self, x: &[f32], pool: &Pool) -> Vec<f32> {
        let rows = x.len() / self.gate.inputs();
        let inter = rows * self.gate.outputs();
        let mut gated = vec![0.0; inter]; // [rows, inter]
        let mut up = vec![0.0; inter]; // [rows, inter]
        matmul(x, &self.gate, &mut gated, pool);
        matmul(x, &self.up, &mut up, pool);
        gate(&mut gated, &up);
        let mut out = vec![0.0; rows * self.down.outputs()]; // [rows, hidden]
        matmul(&gated, &self.down, &mut out, pool);
        out
    }
}

wide! {
    /// Multiplies the silu of each of `gated` with its `up`.
    fn gate(gated: &mut [f32], up: &[f32]) = each
}

#[expect(clippy::inline_always, reason = "compiled once per instruction set, inside the caller that enables it")]
#[inline(always)]
fn each(gated: &mut [f32], up: &[f32]) {
    for (gated, up) in gated.iter_mut().zip(up) {
        *gated = silu(*gated) * up;
    }
}

#[expect(clippy::inline_always, reason = "compiled once per instruction set, inside the caller that enables it")]
#[inline(always)]
fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    #[test]
    fn a_row_does_not_depend_on_its_batch_mates() {
        let matrix = |outputs: usize, inputs: usize, step: f32| {
            let values = (0..outputs * inputs).map(|i| bf16::from_f32((i as f32 * step).sin()));
            let bytes: Vec<u8> = values.flat_map(bf16::to_le_bytes).collect();
            PackedMatrix::from_bf16(&bytes, outputs, inputs).unwrap()
        };
        let expert = ExpertWeights { gate: matrix(40, 24, 0.7), up: matrix(40, 24, 1.3), down: matrix(24, 40, 0.9) };
        let pool = Pool::new(2).unwrap();
        let x: Vec<f32> = (0..9 * 24).map(|i| (i as f32 * 0.37).cos()).collect();
        let together = expert.forward(&x, &pool);
        for (row, x) in x.chunks(24).enumerate() {
            let alone = expert.forward(x, &pool);
            assert!(alone.iter().zip(&together[row * 24..]).all(|(a, b)| a.to_bits() == b.to_bits()));
        }
    }

    #[test]
    fn silu_is_the_known_function() {
        for (x, y) in [(0.0, 0.0), (1.0, 0.731_058_6), (-1.0, -0.268_941_43), (20.0, 20.0), (-200.0, 0.0)] {
            assert!((silu(x) - y).abs() < 1e-6, "silu({x})");
        }
    }
}
