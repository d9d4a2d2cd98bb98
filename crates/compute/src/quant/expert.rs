//! One expert with quantised weights: a SwiGLU feed-forward network.

use super::GROUP;
use super::kernel::{Block, Kernel, STREAMS, kernel};
use super::matrix::{QuantPanels, QuantWidth};
use super::rows::{QuantRows, Shape, TILE, quantise};
use crate::Pool;
use crate::cut::Cut;
use crate::disjoint::Disjoint;
use crate::ffn::{ExpertMatrix, silu_times};
use crate::matmul::Row;
use crate::packed::PANEL;

/// Rows whose sums a task keeps in its core's cache.
const ROWS: usize = 96;

/// Rows whose sums for all streams fit beside the weights in the first-level cache. With more rows, reading is the smaller part.
const FEW: usize = 16;

/// Groups, of all streams together, that stay in the first-level cache while all rows pass over them.
const GROUPS: usize = 24;

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
        multiply(kernel, &gated, &self.down, 1, pool, |first_row, panel, sums| {
            let start = panel * PANEL;
            let columns = PANEL.min(hidden - start);
            for (row, sums) in (first_row..).zip(sums) {
                // SAFETY: the sums of a row and panel come once.
                unsafe { target.slice(row * hidden + start, columns) }.copy_from_slice(&sums.0[..columns]);
            }
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
        multiply(kernel, x, &self.gate_up, 2, pool, |first_row, panel, sums| {
            let (gate, up) = sums.split_at_mut(sums.len() / 2);
            let group = panel / 2;
            let columns = PANEL.min(inter - group * PANEL);
            for (row, (gate, up)) in (first_row..).zip(gate.iter_mut().zip(up)) {
                silu_times(gate, up);
                // SAFETY: the sums of a row and panel come once.
                let place = unsafe { data.slice(shape.index(row, group), 1) };
                place[0] = quantise(&gate.0[..columns], offset);
            }
        });
        gated
    }
}

/// Multiplies `x` with `w` and passes the sums on, `unit` panels and a tile of rows at a time: `done(first row, first panel,
/// sums)` with `[unit, rows of the tile]`. Sums may be changed.
fn multiply(
    kernel: Kernel,
    x: &QuantRows,
    w: &QuantPanels,
    unit: usize,
    pool: &Pool,
    done: impl Fn(usize, usize, &mut [Row]) + Sync,
) {
    let (panels, rows) = (w.count(), x.shape.rows);
    let streams = if rows <= FEW { STREAMS.min(panels / pool.threads()) / unit * unit } else { 0 }.max(unit);
    // With one tile nothing is read twice, so streams may be long.
    let cut = if rows <= TILE { Cut::streams(panels, streams, pool) } else { Cut::new(panels, streams, streams, pool) };
    pool.for_each(cut.tasks(), rows * w.inputs * panels * PANEL, |task| {
        let (first, count) = cut.task(task);
        let task = Task { kernel, x, w, first, count, streams: streams.min(count) };
        for first_row in (0..rows).step_by(ROWS) {
            let mut sums = vec![Row::ZERO; ROWS.min(rows - first_row) * count];
            task.add(first_row, &mut sums);
            let tiles = (first_row..).step_by(TILE).zip(sums.chunks_mut(TILE * count));
            for (first_row, sums) in tiles {
                let units = (first..).step_by(unit).zip(sums.chunks_exact_mut(sums.len() / count * unit));
                units.for_each(|(panel, sums)| done(first_row, panel, sums));
            }
        }
    });
}

/// The panels of a task: streams of as many panels each.
struct Task<'a> {
    kernel: Kernel,
    x: &'a QuantRows,
    w: &'a QuantPanels,
    first: usize,
    count: usize,
    streams: usize,
}

impl Task<'_> {
    /// Adds to `sums`, `[tiles, panels, rows of the tile]`, the products of rows from `first_row` on, which starts a tile.
    fn add(&self, first_row: usize, sums: &mut [Row]) {
        let Shape { rows: all, groups } = self.x.shape;
        assert_eq!(self.w.groups(), groups, "shapes fit");
        let (width, lines) = (self.w.width, self.w.width.lines());
        let length = self.count / self.streams;
        let at_once = if all <= TILE { groups } else { GROUPS / self.streams };
        for start in (0..groups).step_by(at_once) {
            let end = groups.min(start + at_once);
            // Where a panel of a stream ends, the next one begins.
            for step in 0..length {
                let mut panels = [&[][..]; STREAMS];
                for (stream, panel) in panels[..self.streams].iter_mut().enumerate() {
                    *panel = &self.w.panel(self.first + stream * length + step)[start * lines..end * lines];
                }
                let tiles = (first_row..).step_by(TILE).zip(sums.chunks_mut(TILE * self.count));
                for (tile, sums) in tiles {
                    let rows = sums.len() / self.count;
                    let x = &self.x.tile(tile)[start * rows..end * rows];
                    let block = Block { x, width, panels: &panels[..self.streams], stride: length * rows };
                    (self.kernel)(block, &mut sums[step * rows..]);
                }
            }
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
