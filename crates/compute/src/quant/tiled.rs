//! What the kernels of all instruction sets share: a tile's rows are handed on, a few at a time, to a function compiled for as many.

use super::GROUP;
use super::matrix::QuantWidth;
use super::rows::Group;

/// Quads of a group.
pub(super) const QUADS: usize = GROUP / 4;

/// Defines a kernel that hands a tile's rows to `$function`, of 8-bit weights up to `$most` at once.
macro_rules! tiled {
    ($name:ident, $function:ident, $most:literal: $($rows:literal)*) => {
        fn $name(block: Block, sums: &mut [Row]) {
            let groups = block.panels[0].len() / block.width.lines();
            let all = block.x.len() / groups;
            assert!(block.x.len() == all * groups && all <= block.stride, "shapes fit");
            assert!(sums.len() >= (block.panels.len() - 1) * block.stride + all, "shapes fit");
            assert!(block.panels.iter().all(|panel| panel.len() == groups * block.width.lines()), "shapes fit");
            let most = if block.width == QuantWidth::Int8 { $most } else { TILE };
            for first in (0..all).step_by(most) {
                let rows = Rows { first, all, groups };
                // SAFETY: `kernel` hands this out only where its instructions are present; the lengths were just checked.
                unsafe {
                    match (block.width, most.min(all - first)) {
                        $((QuantWidth::Int8, $rows) => $function::<$rows, false>(block, rows, sums),)*
                        $((QuantWidth::Int4, $rows) => $function::<$rows, true>(block, rows, sums),)*
                        (_, more) => unreachable!("{more} rows of a tile that has {TILE}"),
                    }
                }
            }
        }
    };
}

pub(super) use tiled;

/// Lines of a group.
pub(super) const fn lines(int4: bool) -> usize {
    if int4 { QuantWidth::Int4.lines() } else { QuantWidth::Int8.lines() }
}

/// Some of a tile's rows.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    pub(super) first: usize,
    /// Rows of the tile.
    pub(super) all: usize,
    /// Groups of each row.
    pub(super) groups: usize,
}

/// Four bytes of activations.
///
/// SAFETY: `index` must be below [`QUADS`].
#[inline]
pub(super) unsafe fn quad(x: &Group, index: usize) -> i32 {
    // SAFETY: within the quants, by this function's contract.
    i32::from_ne_bytes(unsafe { *x.quants.as_ptr().cast::<[u8; 4]>().add(index) })
}
