//! One expert with quantised weights: a SwiGLU feed-forward network.

use super::GROUP;
use super::kernel::{Block, Kernel, kernel};
use super::matrix::{QuantMatrix, QuantWidth};
use super::rows::{QuantRows, Shape, TILE, quantise};
use crate::Pool;
use crate::disjoint::Disjoint;
use crate::ffn::{ExpertMatrix, silu_times};
use crate::matmul::Row;
use crate::packed::PANEL;

/// Rows whose sums a task keeps in its core's cache.
const ROWS: usize = 96;

/// Groups of a panel that stay in the first-level cache while all rows pass over them.
const GROUPS: usize = 12;

/// The quantised weights of one expert.
#[derive(Debug)]
pub(crate) struct QuantExpert {
    pub(super) gate: QuantMatrix,
    pub(super) up: QuantMatrix,
    pub(super) down: QuantMatrix,
}

impl QuantExpert {
    pub(crate) fn zeroed(width: QuantWidth, hidden: usize, inter: usize) -> Self {
        let [gate, up] = [(); 2].map(|()| QuantMatrix::zeroed(width, inter, hidden));
        Self { gate, up, down: QuantMatrix::zeroed(width, hidden, inter) }
    }

    /// Fills a panel of `matrix` with up to [`PANEL`] rows of little-endian bf16.
    pub(crate) fn fill(&mut self, matrix: ExpertMatrix, panel: usize, rows: &[u8]) {
        let matrix = match matrix {
            ExpertMatrix::Gate => &mut self.gate,
            ExpertMatrix::Up => &mut self.up,
            ExpertMatrix::Down => &mut self.down,
        };
        matrix.fill(panel, rows);
    }

    pub(crate) fn bytes(&self) -> usize {
        self.gate.bytes() + self.up.bytes() + self.down.bytes()
    }

    /// See [`crate::ExpertWeights::forward`]. `x` and what is given to the down matrix are quantised, each row by itself. A row
    /// with a NaN or an infinity has NaNs for its result.
    pub(crate) fn forward(&self, x: &[f32], pool: &Pool) -> Vec<f32> {
        self.forward_by(kernel(pool.isa()), x, pool)
    }

    /// As [`QuantExpert::forward`], by one kernel.
    pub(super) fn forward_by(&self, kernel: Kernel, x: &[f32], pool: &Pool) -> Vec<f32> {
        let x = quantise_rows(x, self.gate.inputs, self.gate.width, pool);
        let gated = self.gated(kernel, &x, pool);
        let width = self.down.outputs;
        let mut out = vec![0.0; x.shape.rows * width]; // [rows, hidden]
        let target = Disjoint::new(&mut out);
        pool.for_each(self.down.panels(), x.shape.rows * self.down.inputs * width, |panel| {
            each_row(kernel, &gated, [&self.down], panel, |row, [sums]| {
                let start = panel * PANEL;
                let columns = PANEL.min(width - start);
                // SAFETY: each panel is one task and writes only its own columns.
                unsafe { target.slice(row * width + start, columns) }.copy_from_slice(&sums.0[..columns]);
            });
        });
        out
    }

    /// `silu(gate(x)) * up(x)`, quantised: a panel of outputs makes a group.
    fn gated(&self, kernel: Kernel, x: &QuantRows, pool: &Pool) -> QuantRows {
        let width = self.gate.outputs;
        let offset = self.down.width.offset();
        let mut gated = QuantRows::zeros(x.shape.rows, width);
        let QuantRows { shape, data } = &mut gated;
        let data = Disjoint::new(data);
        pool.for_each(self.gate.panels(), 2 * shape.rows * self.gate.inputs * width, |panel| {
            each_row(kernel, x, [&self.gate, &self.up], panel, |row, [gate, up]| {
                let columns = PANEL.min(width - panel * PANEL);
                silu_times(gate, up);
                // SAFETY: each panel is one task and writes only its own group.
                let place = unsafe { data.slice(shape.index(row, panel), 1) };
                place[0] = quantise(&gate.0[..columns], offset);
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
    done: impl Fn(usize, [&mut Row; N]),
) {
    let Shape { rows: all, groups } = x.shape;
    assert!(matrices.iter().all(|matrix| matrix.groups() == groups), "shapes fit");
    let panels = matrices.map(|matrix| matrix.panel(panel));
    for first in (0..all).step_by(ROWS) {
        let rows = ROWS.min(all - first);
        let mut sums: [Vec<Row>; N] = std::array::from_fn(|_| vec![Row::ZERO; rows]);
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
    let data = Disjoint::new(data);
    pool.for_each(shape.rows, x.len(), |row| {
        for (index, values) in x[row * width..][..width].chunks(GROUP).enumerate() {
            // SAFETY: each row is one task and writes only its own groups.
            let place = unsafe { data.slice(shape.index(row, index), 1) };
            place[0] = quantise(values, weights.offset());
        }
    });
    quantised
}
