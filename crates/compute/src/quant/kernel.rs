//! The multiplication of quantised rows with one panel of a quantised matrix.

use std::ops::Range;

use super::GROUP;
use super::matrix::{Line, PANEL, QuantMatrix, QuantWidth, scale, weight};
use super::rows::QuantRows;

/// What a kernel multiplies: rows of `x`, as many as there are sums, with the outputs of one panel, over some of the groups.
#[derive(Clone, Copy, Debug)]
pub(super) struct Block<'a> {
    pub(super) x: &'a QuantRows,
    /// The first row.
    pub(super) row: usize,
    pub(super) width: QuantWidth,
    /// The first group.
    pub(super) start: usize,
    /// The panel's part: `[groups, width.lines()]`.
    pub(super) quants: &'a [Line],
    /// `[groups]`
    pub(super) scales: &'a [Line],
}

/// Carries the sums `[rows, PANEL]` of a block on over its groups.
pub(super) type Kernel = fn(Block, &mut [[f32; PANEL]]);

/// Every kernel that this machine can run, the fastest first; the last is the scalar one.
pub(super) fn kernels() -> Vec<Kernel> {
    let mut found: Vec<Kernel> = Vec::new();
    #[cfg(target_arch = "x86_64")]
    found.extend(super::x86::kernels());
    found.push(scalar);
    found
}

impl<'a> Block<'a> {
    /// Panics when `x` does not have the inputs of `w`.
    pub(super) fn new(x: &'a QuantRows, row: usize, w: &'a QuantMatrix, panel: usize, groups: Range<usize>) -> Self {
        assert_eq!(x.groups, w.groups(), "shapes fit");
        let (quants, scales) = w.panel(panel);
        let lines = w.width.lines();
        Self {
            x,
            row,
            width: w.width,
            start: groups.start,
            quants: &quants[groups.start * lines..groups.end * lines],
            scales: &scales[groups],
        }
    }
}

/// One group at a time, in whatever vectors the compiler makes of it.
pub(super) fn scalar(block: Block, sums: &mut [[f32; PANEL]]) {
    let Block { x, row, width, start, quants, scales } = block;
    for (row, sums) in (row..).zip(sums) {
        for (group, (lines, scales)) in quants.chunks_exact(width.lines()).zip(scales).enumerate() {
            let at = row * x.groups + start + group;
            let x_quants = &x.quants[at * GROUP..][..GROUP];
            for (lane, sum) in sums.iter_mut().enumerate() {
                let dot: i32 = (0..GROUP).map(|k| i32::from(x_quants[k]) * weight(width, lines, lane, k)).sum();
                *sum = (dot as f32).mul_add(scale(scales, lane) * x.scales[at], *sum);
            }
        }
    }
}
