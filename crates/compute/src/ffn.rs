//! One expert: a SwiGLU feed-forward network.

use crate::Pool;
use crate::disjoint::Disjoint;
use crate::exp::exp;
use crate::matmul::{ROWS, Row, Tiles, Tiling, multiply, multiply_into};
use crate::packed::{PANEL, Panels, fill};
use crate::wide::wide;

/// The weights of one expert, packed as its kernels read them.
#[derive(Debug)]
pub struct ExpertWeights(Bf16Expert);

impl ExpertWeights {
    /// Memory the weights take.
    pub fn bytes(&self) -> usize {
        self.0.gate_up.bytes() + self.0.down.bytes()
    }

    /// `down(silu(gate(x)) * up(x))` of each row of `x`, `[rows, hidden_size]`, in the same shape. A row's result does not
    /// depend on the rows beside it. Source: GLU Variants Improve Transformer, arXiv 2002.05202.
    pub fn forward(&self, x: &[f32], pool: &Pool) -> Vec<f32> {
        self.0.forward(x, pool)
    }
}

/// One of the three matrices of an expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExpertMatrix {
    /// `w1`, `[intermediate_size, hidden_size]`: the half that is gated.
    Gate,
    /// `w3`, `[intermediate_size, hidden_size]`: the half that is not.
    Up,
    /// `w2`, `[hidden_size, intermediate_size]`: back to a hidden state.
    Down,
}

impl ExpertMatrix {
    /// All three.
    pub const ALL: [Self; 3] = [Self::Gate, Self::Up, Self::Down];
}

/// Builds [`ExpertWeights`] from rows of its matrices as they are read, so that no second copy is needed.
#[derive(Debug)]
pub struct ExpertPacker {
    expert: Bf16Expert,
    /// Rows pushed of each [`ExpertMatrix`].
    rows: [usize; 3],
}

impl ExpertPacker {
    /// Rows are pushed in multiples of this many, but for the last push of a matrix.
    pub const ROWS: usize = PANEL;

    /// A packer for an expert of this shape.
    pub fn new(hidden_size: usize, intermediate_size: usize) -> Self {
        Self { expert: Bf16Expert::zeroed(hidden_size, intermediate_size), rows: [0; 3] }
    }

    /// `[outputs, inputs]` of a matrix.
    pub fn shape(&self, matrix: ExpertMatrix) -> (usize, usize) {
        let (hidden, inter) = (self.expert.gate_up.inputs(), self.expert.down.inputs());
        if matrix == ExpertMatrix::Down { (hidden, inter) } else { (inter, hidden) }
    }

    /// Adds rows of little-endian bf16 to a matrix: a multiple of [`ExpertPacker::ROWS`], or all that are missing. Panics when
    /// it is neither.
    pub fn push_rows(&mut self, matrix: ExpertMatrix, bytes: &[u8]) {
        let (outputs, inputs) = self.shape(matrix);
        let Bf16Expert { gate_up, down } = &mut self.expert;
        let rows = &mut self.rows[matrix as usize];
        *rows = fill(bytes, inputs, *rows, outputs, |panel, rows| match matrix {
            ExpertMatrix::Gate => gate_up.fill(2 * panel, rows),
            ExpertMatrix::Up => gate_up.fill(2 * panel + 1, rows),
            ExpertMatrix::Down => down.fill(panel, rows),
        });
    }

    /// The expert. Panics when rows are missing.
    pub fn finish(self) -> ExpertWeights {
        for matrix in ExpertMatrix::ALL {
            assert_eq!(self.rows[matrix as usize], self.shape(matrix).0, "every row of {matrix:?} was pushed");
        }
        ExpertWeights(self.expert)
    }
}

/// An expert in bf16.
#[derive(Debug)]
struct Bf16Expert {
    /// Panels of the gate and of the other half in turn, so that both halves of an output are there at once.
    gate_up: Panels,
    down: Panels,
}

impl Bf16Expert {
    fn zeroed(hidden: usize, inter: usize) -> Self {
        Self {
            gate_up: Panels::zeroed(2 * inter.div_ceil(PANEL), hidden),
            down: Panels::zeroed(hidden.div_ceil(PANEL), inter),
        }
    }

    /// See [`ExpertWeights::forward`].
    fn forward(&self, x: &[f32], pool: &Pool) -> Vec<f32> {
        let hidden = self.gate_up.inputs();
        let mut out = vec![0.0; x.len()]; // [rows, hidden]
        for (x, out) in x.chunks(ROWS * hidden).zip(out.chunks_mut(ROWS * hidden)) {
            let gated = self.gated(&Tiles::pack(x, hidden, pool), pool);
            multiply_into(&gated, &self.down, out, pool);
        }
        out
    }

    /// `silu(gate(x)) * up(x)`, `[x.rows, inter]`.
    fn gated(&self, x: &Tiles, pool: &Pool) -> Tiles<'static> {
        let inter = self.down.inputs();
        let tiling = Tiling::new(x.rows(), inter, pool);
        Tiles::write(tiling, |gated| {
            let out = Disjoint::new(gated);
            multiply(x, &self.gate_up, 2, pool, |first_row, first_panel, sums| {
                let (gate, up) = sums.split_at(sums.len() / 2);
                let start = first_panel / 2 * PANEL;
                let columns = PANEL.min(inter - start);
                // SAFETY: these columns of these rows come once.
                let out = unsafe { out.slice(tiling.place(start, first_row).start, columns * gate.len()) };
                gate_tile(gate, up, out);
            });
        })
    }
}

wide! {
    /// Writes `silu(gate) * up`, of `[rows, PANEL]` each, to `out` as `[columns, rows]`; columns there is no room for are padding.
    fn gate_tile(gate: &[Row], up: &[Row], out: &mut [f32]) = each_row
}

#[expect(clippy::inline_always, reason = "compiled once per instruction set, inside the caller that enables it")]
#[inline(always)]
fn each_row(gate: &[Row], up: &[Row], out: &mut [f32]) {
    let rows = gate.len();
    for (row, (gate, up)) in gate.iter().zip(up).enumerate() {
        let mut gated = [0.0; PANEL];
        for ((gated, gate), up) in gated.iter_mut().zip(gate.0).zip(up.0) {
            *gated = silu(gate) * up;
        }
        for (out, value) in out.chunks_exact_mut(rows).zip(gated) {
            out[row] = value;
        }
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
    use proptest::prelude::*;

    use super::*;
    use crate::Isa;

    fn values(len: usize, step: f32) -> Vec<f32> {
        (0..len).map(|i| bf16::from_f32((i as f32 * step).sin()).to_f32()).collect()
    }

    /// An expert of these matrices, pushed in parts.
    fn expert(hidden: usize, inter: usize, matrices: [&[f32]; 3]) -> ExpertWeights {
        let mut packer = ExpertPacker::new(hidden, inter);
        for (matrix, values) in ExpertMatrix::ALL.into_iter().zip(matrices) {
            let bytes: Vec<u8> = values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect();
            let (_, inputs) = packer.shape(matrix);
            bytes.chunks(ExpertPacker::ROWS * inputs * 2).for_each(|rows| packer.push_rows(matrix, rows));
        }
        packer.finish()
    }

    /// Multiplies one row with `w`, `[outputs, x.len()]`, by the rule.
    fn multiplied(x: &[f32], w: &[f32]) -> Vec<f32> {
        w.chunks(x.len()).map(|w| x.iter().zip(w).fold(0.0_f32, |sum, (x, w)| x.mul_add(*w, sum))).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn each_row_is_the_formula_by_the_rule_whatever_its_batch_mates(
            rows in 1usize..=300, hidden in 1usize..70, inter in 1usize..90,
        ) {
            let (gate, up, down) = (values(inter * hidden, 0.7), values(inter * hidden, 1.3), values(hidden * inter, 0.9));
            let expert = expert(hidden, inter, [&gate, &up, &down]);
            let x: Vec<f32> = (0..rows * hidden).map(|i| (i as f32 * 0.37).cos()).collect();
            let expected: Vec<u32> = x.chunks(hidden).flat_map(|x| {
                let (gate, up) = (multiplied(x, &gate), multiplied(x, &up));
                let gated: Vec<f32> = gate.iter().zip(up).map(|(gate, up)| silu(*gate) * up).collect();
                multiplied(&gated, &down)
            }).map(f32::to_bits).collect();
            for isa in Isa::available() {
                for threads in [1, 3] {
                    let out = expert.forward(&x, &Pool::with_isa(threads, isa).unwrap());
                    let out: Vec<u32> = out.into_iter().map(f32::to_bits).collect();
                    prop_assert!(out == expected, "{isa:?}, {threads} threads");
                }
            }
        }
    }

    #[test]
    fn an_expert_takes_the_memory_of_its_weights() {
        let zeros = vec![0.0; 64 * 96];
        assert_eq!(expert(64, 96, [&zeros, &zeros, &zeros]).bytes(), 3 * 64 * 96 * 2);
    }

    #[test]
    fn silu_is_the_known_function() {
        for (x, y) in [(0.0, 0.0), (1.0, 0.731_058_6), (-1.0, -0.268_941_43), (20.0, 20.0), (-200.0, 0.0)] {
            assert!((silu(x) - y).abs() < 1e-6, "silu({x})");
        }
    }
}
