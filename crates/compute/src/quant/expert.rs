//! One expert with quantised weights: a SwiGLU feed-forward network.

use super::GROUP;
use super::kernel::{Block, Kernel, kernels};
use super::matrix::{PANEL, QuantMatrix, QuantWidth};
use super::rows::{QuantRows, Shape, TILE, quantise};
use super::shared::Shared;
use crate::Pool;
use crate::exp::exp;
use crate::wide::wide;

/// Rows whose sums a task keeps in its core's cache.
const ROWS: usize = 96;

/// Groups of a panel that stay in the first-level cache while all rows pass over them.
const GROUPS: usize = 12;

/// The quantised weights of one expert.
#[derive(Debug)]
pub struct QuantExpert {
    /// `w1`, `[intermediate_size, hidden_size]`: the half that is gated.
    pub gate: QuantMatrix,
    /// `w3`, `[intermediate_size, hidden_size]`: the half that is not.
    pub up: QuantMatrix,
    /// `w2`, `[hidden_size, intermediate_size]`: back to a hidden state.
    pub down: QuantMatrix,
}

impl QuantExpert {
    /// Memory the weights take.
    pub fn bytes(&self) -> usize {
        self.gate.bytes() + self.up.bytes() + self.down.bytes()
    }

    /// `down(silu(gate(x)) * up(x))` of each row of `x`, `[rows, hidden_size]`, in the same shape. `x` and what is given to
    /// `down` are quantised, each row by itself: its result does not depend on the rows beside it. A row with a NaN or an
    /// infinity has NaNs for its result. Source: GLU Variants Improve Transformer, arXiv 2002.05202.
    pub fn forward(&self, x: &[f32], pool: &Pool) -> Vec<f32> {
        self.forward_by(kernels()[0], x, pool)
    }

    /// As [`QuantExpert::forward`], by one kernel.
    pub(super) fn forward_by(&self, kernel: Kernel, x: &[f32], pool: &Pool) -> Vec<f32> {
        let x = quantise_rows(x, self.gate.inputs(), self.gate.width, pool);
        let gated = self.gated(kernel, &x, pool);
        let width = self.down.outputs();
        let mut out = vec![0.0; x.shape.rows * width]; // [rows, hidden]
        let target = Shared::new(&mut out);
        pool.for_each(self.down.panels(), x.shape.rows * self.down.inputs() * width, |panel| {
            each_row(kernel, &gated, [&self.down], panel, |row, [sums]| {
                let start = panel * PANEL;
                let columns = PANEL.min(width - start);
                // SAFETY: each panel is one task and writes only its own columns.
                unsafe { target.write(row * width + start, &sums[..columns]) };
            });
        });
        out
    }

    /// `silu(gate(x)) * up(x)`, quantised: a panel of outputs makes a group.
    fn gated(&self, kernel: Kernel, x: &QuantRows, pool: &Pool) -> QuantRows {
        let width = self.gate.outputs();
        let offset = self.down.width.offset();
        let mut gated = QuantRows::zeros(x.shape.rows, width);
        let QuantRows { shape, data } = &mut gated;
        let data = Shared::new(data);
        pool.for_each(self.gate.panels(), 2 * shape.rows * self.gate.inputs() * width, |panel| {
            each_row(kernel, x, [&self.gate, &self.up], panel, |row, [gate, up]| {
                let columns = PANEL.min(width - panel * PANEL);
                gate_with(gate, up);
                // SAFETY: each panel is one task and writes only its own group.
                unsafe { data.write(shape.index(row, panel), &[quantise(&gate[..columns], offset)]) };
            });
        });
        gated
    }
}

/// Multiplies all rows of `x` with one panel of each of `matrices` and hands every row's sums to `done`.
fn each_row<const N: usize>(
    kernel: Kernel,
    x: &QuantRows,
    matrices: [&QuantMatrix; N],
    panel: usize,
    done: impl Fn(usize, [&mut [f32; PANEL]; N]),
) {
    let Shape { rows: all, groups } = x.shape;
    assert!(matrices.iter().all(|matrix| matrix.groups() == groups), "shapes fit");
    let panels = matrices.map(|matrix| matrix.panel(panel));
    for first in (0..all).step_by(ROWS) {
        let rows = ROWS.min(all - first);
        let mut sums: [Vec<[f32; PANEL]>; N] = std::array::from_fn(|_| vec![[0.0; PANEL]; rows]);
        for start in (0..groups).step_by(GROUPS) {
            let end = groups.min(start + GROUPS);
            for tile in (0..rows).step_by(TILE) {
                let tile_rows = TILE.min(rows - tile);
                let x = &x.tile(first + tile)[start * tile_rows..end * tile_rows];
                for ((matrix, (quants, scales)), sums) in matrices.iter().zip(panels).zip(&mut sums) {
                    let (width, lines) = (matrix.width, matrix.width.lines());
                    let quants = &quants[start * lines..end * lines];
                    kernel(Block { x, width, quants, scales: &scales[start..end] }, &mut sums[tile..][..tile_rows]);
                }
            }
        }
        for row in 0..rows {
            done(first + row, sums.each_mut().map(|sums| &mut sums[row]));
        }
    }
}

/// Quantises every row of `x`, `[rows, width]`, for weights of `weights`.
fn quantise_rows(x: &[f32], width: usize, weights: QuantWidth, pool: &Pool) -> QuantRows {
    assert!(x.len().is_multiple_of(width), "rows are whole");
    let mut quantised = QuantRows::zeros(x.len() / width, width);
    let QuantRows { shape, data } = &mut quantised;
    let data = Shared::new(data);
    pool.for_each(shape.rows, x.len(), |row| {
        for (index, values) in x[row * width..][..width].chunks(GROUP).enumerate() {
            // SAFETY: each row is one task and writes only its own groups.
            unsafe { data.write(shape.index(row, index), &[quantise(values, weights.offset())]) };
        }
    });
    quantised
}

wide! {
    /// Multiplies the silu of each of `gate` with its `up`.
    fn gate_with(gate: &mut [f32; PANEL], up: &[f32; PANEL]) = each
}

#[expect(clippy::inline_always, reason = "compiled once per instruction set, inside the caller that enables it")]
#[inline(always)]
fn each(gate: &mut [f32; PANEL], up: &[f32; PANEL]) {
    for (gate, up) in gate.iter_mut().zip(up) {
        *gate = *gate / (1.0 + exp(-*gate)) * up;
    }
}
