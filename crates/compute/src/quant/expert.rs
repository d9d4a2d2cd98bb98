//! One expert with quantised weights: a SwiGLU feed-forward network.

use super::GROUP;
use super::kernel::{Block, Kernel, kernel};
use super::matrix::{QuantPanels, QuantWidth};
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
    /// Panels of the gate and of the other half in turn, so that reading both is one stream.
    pub(super) gate_up: QuantPanels,
    pub(super) down: QuantPanels,
}

impl QuantExpert {
    pub(crate) fn zeroed(width: QuantWidth, hidden: usize, inter: usize) -> Self {
        Self {
            gate_up: QuantPanels::zeroed(width, 2 * inter.div_ceil(PANEL), hidden),
            down: QuantPanels::zeroed(width, hidden.div_ceil(PANEL), inter),
        }
    }

    /// Fills a panel of `matrix` with up to [`PANEL`] rows of little-endian bf16.
    pub(crate) fn fill(&mut self, matrix: ExpertMatrix, panel: usize, rows: &[u8]) {
        match matrix {
            ExpertMatrix::Gate => self.gate_up.fill(2 * panel, rows),
            ExpertMatrix::Up => self.gate_up.fill(2 * panel + 1, rows),
            ExpertMatrix::Down => self.down.fill(panel, rows),
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.gate_up.bytes() + self.down.bytes()
    }

    /// See [`crate::ExpertWeights::forward`]. `x` and what is given to the down matrix are quantised, each row by itself. A row
    /// with a NaN or an infinity has NaNs for its result.
    pub(crate) fn forward(&self, x: &[f32], pool: &Pool) -> Vec<f32> {
        self.forward_by(kernel(pool.isa()), x, pool)
    }

    /// As [`QuantExpert::forward`], by one kernel.
    pub(super) fn forward_by(&self, kernel: Kernel, x: &[f32], pool: &Pool) -> Vec<f32> {
        let hidden = self.gate_up.inputs;
        let x = quantise_rows(x, hidden, self.gate_up.width, pool);
        let gated = self.gated(kernel, &x, pool);
        let mut out = vec![0.0; x.shape.rows * hidden]; // [rows, hidden]
        let target = Disjoint::new(&mut out);
        each_panel(pool, hidden.div_ceil(PANEL), x.shape.rows * self.down.inputs * hidden, |panel| {
            each_row(kernel, &gated, &self.down, [panel], |row, [sums]| {
                let start = panel * PANEL;
                let columns = PANEL.min(hidden - start);
                // SAFETY: each panel is one task and writes only its own columns.
                unsafe { target.slice(row * hidden + start, columns) }.copy_from_slice(&sums.0[..columns]);
            });
        });
        out
    }

    /// `silu(gate(x)) * up(x)`, quantised: a panel of outputs makes a group.
    fn gated(&self, kernel: Kernel, x: &QuantRows, pool: &Pool) -> QuantRows {
        let inter = self.down.inputs;
        let offset = self.down.width.offset();
        let mut gated = QuantRows::zeros(x.shape.rows, inter);
        let QuantRows { shape, data } = &mut gated;
        let data = Disjoint::new(data);
        each_panel(pool, inter.div_ceil(PANEL), 2 * shape.rows * self.gate_up.inputs * inter, |panel| {
            each_row(kernel, x, &self.gate_up, [2 * panel, 2 * panel + 1], |row, [gate, up]| {
                let columns = PANEL.min(inter - panel * PANEL);
                silu_times(gate, up);
                // SAFETY: each panel is one task and writes only its own group.
                let place = unsafe { data.slice(shape.index(row, panel), 1) };
                place[0] = quantise(&gate.0[..columns], offset);
            });
        });
        gated
    }
}

/// Runs `task` for every panel, several neighbours on one thread: so many that their weights are one long read, so few that
/// all threads end together. `work` as for [`Pool::for_each`].
fn each_panel(pool: &Pool, panels: usize, work: usize, task: impl Fn(usize) + Sync) {
    let count = (panels / (8 * pool.threads())).max(1);
    pool.for_each(panels.div_ceil(count), work, |index| {
        (index * count..panels.min((index + 1) * count)).for_each(&task);
    });
}

/// Multiplies all rows of `x` with some panels of `w` and hands every row's sums to `done`.
fn each_row<const N: usize>(
    kernel: Kernel,
    x: &QuantRows,
    w: &QuantPanels,
    panels: [usize; N],
    done: impl Fn(usize, [&mut Row; N]),
) {
    let Shape { rows: all, groups } = x.shape;
    assert_eq!(w.groups(), groups, "shapes fit");
    let (width, lines) = (w.width, w.width.lines());
    let panels = panels.map(|panel| w.panel(panel));
    // One tile reads the weights once, one panel after the other as they lie.
    let at_once = if all <= TILE { groups } else { GROUPS };
    for first in (0..all).step_by(ROWS) {
        let rows = ROWS.min(all - first);
        let mut sums: [Vec<Row>; N] = std::array::from_fn(|_| vec![Row::ZERO; rows]);
        for start in (0..groups).step_by(at_once) {
            let end = groups.min(start + at_once);
            for tile in (0..rows).step_by(TILE) {
                let tile_rows = TILE.min(rows - tile);
                let x = &x.tile(first + tile)[start * tile_rows..end * tile_rows];
                for ((quants, scales), sums) in panels.iter().zip(&mut sums) {
                    let (quants, scales) = (&quants[start * lines..end * lines], &scales[start..end]);
                    let block = Block { x, width, quants, scales, first: tile == 0 };
                    kernel(block, &mut sums[tile..][..tile_rows]);
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
