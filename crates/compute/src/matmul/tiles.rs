//! Rows in the order in which the kernels read them.

use std::borrow::Cow;
use std::cell::RefCell;
use std::ops::Range;

use super::BLOCK;
use super::kernels::kernels;
use crate::Pool;

/// How rows `[rows, inputs]` are cut: into blocks of [`BLOCK`] inputs, each into tiles of rows, each stored as `[inputs of the
/// block, rows of the tile]`. The last block may have fewer inputs, the last tile fewer rows.
#[derive(Clone, Copy)]
pub(crate) struct Tiling {
    rows: usize,
    inputs: usize,
    tile_rows: usize,
}

/// Rows so cut. What they are kept in is used again by the same thread.
pub(crate) struct Tiles<'a> {
    /// At least as many elements as the rows have.
    data: Cow<'a, [f32]>,
    tiling: Tiling,
}

impl Tiling {
    /// Even tiles, none larger than the kernels of `pool` take.
    pub(crate) fn new(rows: usize, inputs: usize, pool: &Pool) -> Self {
        let tiles = rows.div_ceil(kernels(pool.isa()).tile_rows()).max(1);
        Self { rows, inputs, tile_rows: rows.div_ceil(tiles).max(1) }
    }

    /// Where the inputs from `start` to the end of their block lie, for the tile that starts with `first_row`.
    pub(crate) fn place(&self, start: usize, first_row: usize) -> Range<usize> {
        let block = start / BLOCK * BLOCK;
        let depth = BLOCK.min(self.inputs - block);
        let tile_rows = self.tile_rows.min(self.rows - first_row);
        let tile = block * self.rows + first_row * depth;
        tile + (start - block) * tile_rows..tile + depth * tile_rows
    }
}

impl<'a> Tiles<'a> {
    /// Cuts `x`, `[rows, inputs]`. A single row is not copied.
    pub(crate) fn pack(x: &'a [f32], inputs: usize, pool: &Pool) -> Self {
        let tiling = Tiling::new(x.len() / inputs, inputs, pool);
        if tiling.rows <= 1 {
            return Self { data: Cow::Borrowed(x), tiling };
        }
        let mut data = buffer(x.len());
        pool.for_each_row(&mut data[..x.len()], tiling.rows * BLOCK, x.len(), |block, data| {
            let depth = data.len() / tiling.rows;
            let tiles = data.chunks_mut(tiling.tile_rows * depth).zip(x.chunks(tiling.tile_rows * inputs));
            for (tile, x) in tiles {
                transpose(x, inputs, block * BLOCK, depth, tile);
            }
        });
        Self { data: Cow::Owned(data), tiling }
    }

    /// Lets `write` write every element, each at its [`Tiling::place`].
    pub(crate) fn write(tiling: Tiling, write: impl FnOnce(&mut [f32])) -> Self {
        let len = tiling.rows * tiling.inputs;
        let mut data = buffer(len);
        write(&mut data[..len]);
        Self { data: Cow::Owned(data), tiling }
    }

    pub(crate) fn rows(&self) -> usize {
        self.tiling.rows
    }

    pub(crate) fn inputs(&self) -> usize {
        self.tiling.inputs
    }

    pub(crate) fn tile_rows(&self) -> usize {
        self.tiling.tile_rows
    }

    /// Number of tiles.
    pub(crate) fn count(&self) -> usize {
        self.tiling.rows.div_ceil(self.tiling.tile_rows)
    }

    /// The block that starts with input `start` of a tile, `[inputs of the block, rows of the tile]`.
    pub(crate) fn part(&self, start: usize, tile: usize) -> &[f32] {
        &self.data[self.tiling.place(start, tile * self.tiling.tile_rows)]
    }

    /// The only tile, `[inputs, rows]`, where there is but one.
    pub(crate) fn all(&self) -> &[f32] {
        debug_assert_eq!(self.count(), 1);
        &self.data[..self.tiling.rows * self.tiling.inputs]
    }
}

impl Drop for Tiles<'_> {
    fn drop(&mut self) {
        if let Cow::Owned(data) = std::mem::take(&mut self.data) {
            SPARE.with_borrow_mut(|spare| {
                if spare.len() < 2 {
                    spare.push(data);
                }
            });
        }
    }
}

thread_local! {
    /// What this thread's tiles were kept in: the rows of one multiplication and of the next.
    static SPARE: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

/// At least `len` elements of any value.
fn buffer(len: usize) -> Vec<f32> {
    let mut buffer = SPARE.with_borrow_mut(Vec::pop).unwrap_or_default();
    if buffer.len() < len {
        buffer = vec![0.0; len];
    }
    buffer
}

/// Writes `depth` inputs from `start` on of `x`, `[rows, inputs]`, to `out` as `[depth, rows]`.
fn transpose(x: &[f32], inputs: usize, start: usize, depth: usize, out: &mut [f32]) {
    /// Inputs at a time: a cache line of each row.
    const LINE: usize = 16;
    let rows = x.len() / inputs;
    for (at, out) in (start..start + depth).step_by(LINE).zip(out.chunks_mut(LINE * rows)) {
        for (row, x) in x.chunks_exact(inputs).enumerate() {
            for (out, x) in out.chunks_exact_mut(rows).zip(&x[at..]) {
                out[row] = *x;
            }
        }
    }
}
