//! One expert: a SwiGLU feed-forward network.

use sirocco_types::ExpertDtype;

use crate::Pool;
use crate::cuda::{CudaExpert, CudaPacker, DeviceError};
use crate::disjoint::Disjoint;
use crate::exp::exp;
use crate::matmul::{ROWS, Row, Tiles, Tiling, multiply, multiply_into};
use crate::packed::{PANEL, Panels, fill};
use crate::quant::{QuantExpert, QuantWidth};
use crate::wide::wide;

/// The weights of one expert, packed as its kernels read them.
#[derive(Debug)]
pub struct ExpertWeights(Held);

#[derive(Debug)]
enum Held {
    Cpu(Weights),
    Cuda(CudaExpert),
}

#[derive(Debug)]
enum Weights {
    Bf16(Bf16Expert),
    Quant(QuantExpert),
}

impl ExpertWeights {
    /// Memory the weights take.
    pub fn bytes(&self) -> usize {
        match &self.0 {
            Held::Cpu(Weights::Bf16(expert)) => expert.gate_up.bytes() + expert.down.bytes(),
            Held::Cpu(Weights::Quant(expert)) => expert.bytes(),
            Held::Cuda(expert) => expert.bytes(),
        }
    }

    /// `down(silu(gate(x)) * up(x))` of each row of `x`, `[rows, hidden_size]`, in the same shape. A row's result does not
    /// depend on the rows beside it. Source: GLU Variants Improve Transformer, arXiv 2002.05202.
    ///
    /// Panics for an expert in a GPU's memory, which only that GPU's [`CudaBackend`](crate::CudaBackend) can run.
    pub fn forward(&self, x: &[f32], pool: &Pool) -> Vec<f32> {
        match &self.0 {
            Held::Cpu(Weights::Bf16(expert)) => expert.forward(x, pool),
            Held::Cpu(Weights::Quant(expert)) => expert.forward(x, pool),
            Held::Cuda(_) => panic!("an expert in a GPU's memory cannot be run by the CPU"),
        }
    }

    /// When it is in a GPU's memory.
    pub(crate) fn on_gpu(&self) -> Option<&CudaExpert> {
        if let Held::Cuda(expert) = &self.0 { Some(expert) } else { None }
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
    weights: Filling,
    hidden: usize,
    inter: usize,
    /// Rows pushed of each [`ExpertMatrix`].
    rows: [usize; 3],
}

/// Where rows go.
#[derive(Debug)]
enum Filling {
    Cpu(Weights),
    Cuda(CudaPacker),
}

impl ExpertPacker {
    /// Rows are pushed in multiples of this many, but for the last push of a matrix.
    pub const ROWS: usize = PANEL;

    /// A packer for an expert of this shape, which it keeps as `dtype` for the CPU.
    pub fn new(dtype: ExpertDtype, hidden_size: usize, intermediate_size: usize) -> Self {
        let quantised = |width| Weights::Quant(QuantExpert::zeroed(width, hidden_size, intermediate_size));
        let weights = match dtype {
            ExpertDtype::Bf16 => Weights::Bf16(Bf16Expert::zeroed(hidden_size, intermediate_size)),
            ExpertDtype::Int8 => quantised(QuantWidth::Int8),
            ExpertDtype::Int4 => quantised(QuantWidth::Int4),
        };
        Self { weights: Filling::Cpu(weights), hidden: hidden_size, inter: intermediate_size, rows: [0; 3] }
    }

    /// A packer that fills an expert of this shape in a GPU's memory.
    pub(crate) fn on_gpu(packer: CudaPacker, hidden: usize, inter: usize) -> Self {
        Self { weights: Filling::Cuda(packer), hidden, inter, rows: [0; 3] }
    }

    /// `[outputs, inputs]` of a matrix.
    pub fn shape(&self, matrix: ExpertMatrix) -> (usize, usize) {
        if matrix == ExpertMatrix::Down { (self.hidden, self.inter) } else { (self.inter, self.hidden) }
    }

    /// Adds rows of little-endian bf16 to a matrix: a multiple of [`ExpertPacker::ROWS`], or all that are missing. Panics when
    /// it is neither.
    pub fn push_rows(&mut self, matrix: ExpertMatrix, bytes: &[u8]) {
        let (outputs, inputs) = self.shape(matrix);
        let rows = &mut self.rows[matrix as usize];
        *rows = fill(bytes, inputs, *rows, outputs, |panel, rows| match &mut self.weights {
            Filling::Cpu(Weights::Bf16(expert)) => expert.fill(matrix, panel, rows),
            Filling::Cpu(Weights::Quant(expert)) => expert.fill(matrix, panel, rows),
            Filling::Cuda(packer) => packer.fill(matrix, panel, rows),
        });
    }

    /// The expert. Panics when rows are missing. Errors only when it was to go into a GPU's memory and did not get there.
    pub fn finish(self) -> Result<ExpertWeights, DeviceError> {
        for matrix in ExpertMatrix::ALL {
            assert_eq!(self.rows[matrix as usize], self.shape(matrix).0, "every row of {matrix:?} was pushed");
        }
        Ok(ExpertWeights(match self.weights {
            Filling::Cpu(weights) => Held::Cpu(weights),
            Filling::Cuda(packer) => Held::Cuda(packer.finish()?),
        }))
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

    /// Fills a panel of `matrix` with up to [`PANEL`] rows of little-endian bf16.
    fn fill(&mut self, matrix: ExpertMatrix, panel: usize, rows: &[u8]) {
        match matrix {
            ExpertMatrix::Gate => self.gate_up.fill(2 * panel, rows),
            ExpertMatrix::Up => self.gate_up.fill(2 * panel + 1, rows),
            ExpertMatrix::Down => self.down.fill(panel, rows),
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
    /// Multiplies the silu of each of `gate` with its `up`.
    pub(crate) fn silu_times(gate: &mut Row, up: &Row) = each
}

wide! {
    /// Writes `silu(gate) * up`, of `[rows, PANEL]` each, to `out` as `[columns, rows]`; columns there is no room for are padding.
    fn gate_tile(gate: &[Row], up: &[Row], out: &mut [f32]) = each_row
}

#[expect(clippy::inline_always, reason = "compiled once per instruction set, inside the caller that enables it")]
#[inline(always)]
fn each(gate: &mut Row, up: &Row) {
    for (gate, up) in gate.0.iter_mut().zip(up.0) {
        *gate = silu(*gate) * up;
    }
}

#[expect(clippy::inline_always, reason = "compiled once per instruction set, inside the caller that enables it")]
#[inline(always)]
fn each_row(gate: &[Row], up: &[Row], out: &mut [f32]) {
    let rows = gate.len();
    for (row, (gate, up)) in gate.iter().zip(up).enumerate() {
        let mut gated = *gate;
        each(&mut gated, up);
        for (out, value) in out.chunks_exact_mut(rows).zip(gated.0) {
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
        let mut packer = ExpertPacker::new(ExpertDtype::Bf16, hidden, inter);
        for (matrix, values) in ExpertMatrix::ALL.into_iter().zip(matrices) {
            let bytes: Vec<u8> = values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect();
            let (_, inputs) = packer.shape(matrix);
            bytes.chunks(ExpertPacker::ROWS * inputs * 2).for_each(|rows| packer.push_rows(matrix, rows));
        }
        packer.finish().unwrap()
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
