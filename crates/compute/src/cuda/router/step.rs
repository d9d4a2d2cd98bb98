//! What comes to a GPU with a batch, in one copy: tokens, where they stand and are kept, and the work of its kernels.

use super::attention::{Heads, Plan, Round, plan, table_len};
use super::budget::STEP_ALIGNED;
use crate::cuda::plan::{FEW_ROWS, MANY_ROWS, item};
use crate::{BLOCK_TOKENS, Queries, Rotary};

/// Writes parts one after the other.
pub(super) struct Writer<'a> {
    pub(super) bytes: &'a mut [u8],
    pub(super) at: usize,
}

impl Writer<'_> {
    /// Writes bytes; where they begin. Panics when there is no room: the workspace was made for what may come.
    fn push<const N: usize>(&mut self, parts: impl IntoIterator<Item = [u8; N]>) -> u64 {
        let start = self.at;
        for part in parts {
            self.bytes[self.at..self.at + N].copy_from_slice(&part);
            self.at += N;
        }
        self.at = self.at.next_multiple_of(STEP_ALIGNED);
        start as u64
    }

    pub(super) fn words(&mut self, words: impl IntoIterator<Item = u32>) -> u64 {
        self.push(words.into_iter().map(u32::to_le_bytes))
    }
}

/// The items of a multiplication: where they are, first those of few rows, and how many of few and of many.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Items {
    pub(super) at: u64,
    pub(super) few: usize,
    pub(super) many: usize,
}

impl Items {
    /// Those of `rows` slots, up to `most` in each, written.
    pub(super) fn write(rows: usize, most: usize, writer: &mut Writer) -> Self {
        let all = (0..rows).step_by(most).map(|first| (first, most.min(rows - first)));
        let (few, many): (Vec<_>, Vec<_>) = all.partition(|(_, rows)| *rows <= FEW_ROWS);
        // Weights are at the launch's base.
        let at = writer.push(few.iter().chain(&many).map(|&(first, rows)| item([0, 0], first, rows)));
        Self { at, few: few.len(), many: many.len() }
    }
}

/// A batch that is under way. Places are addresses on the device.
#[derive(Clone, Debug, Default)]
pub(super) struct Step {
    pub(super) tokens: usize,
    pub(super) queries: usize,
    /// Ids, `[tokens]` u32.
    pub(super) ids: u64,
    /// Block times [`BLOCK_TOKENS`] and place in it, `[tokens]` u32.
    pub(super) slots: u64,
    /// Which query a token belongs to, `[tokens]` u32.
    pub(super) query_of: u64,
    /// The layer in which a query came to what is not finite, `[queries]` u32; the largest number if in none.
    pub(super) overflows: u64,
    /// Cosine and sine, `[tokens, head_dim / 2, 2]` f32.
    pub(super) angles: u64,
    /// Blocks of all queries, u32.
    pub(super) tables: u64,
    pub(super) tiles: u64,
    pub(super) tasks: u64,
    pub(super) places: u64,
    pub(super) items: Items,
    /// Of few rows alone, for matrices of so few outputs that blocks for many rows would be too few.
    pub(super) narrow: Items,
    pub(super) rounds: Vec<Round>,
}

impl Step {
    /// Writes a batch to `bytes`, which will lie at `address`, for a workspace of `room` records; with it comes how many bytes it takes.
    pub(super) fn write(
        (heads, rotary, room): (&Heads, &Rotary, usize),
        ids: &[u32],
        queries: &[Queries],
        bytes: &mut [u8],
        address: u64,
    ) -> (Self, usize) {
        let Plan { tiles, tasks, places, rounds } = plan(heads, queries, room);
        let of_query = |(query, all): (usize, &Queries)| (all.start..all.start + all.len).map(move |at| (query, at));
        let positions: Vec<(usize, usize)> = queries.iter().enumerate().flat_map(of_query).collect();
        assert_eq!(positions.len(), ids.len(), "every token belongs to a query");
        let slot = |&(query, position): &(usize, usize)| {
            queries[query].blocks[position / BLOCK_TOKENS] * BLOCK_TOKENS as u32 + (position % BLOCK_TOKENS) as u32
        };
        let angles = positions.iter().flat_map(|(_, position)| rotary.angles(*position));
        let mut writer = Writer { bytes, at: 0 };
        let mut step = Self {
            tokens: ids.len(),
            queries: queries.len(),
            ids: writer.words(ids.iter().copied()),
            slots: writer.words(positions.iter().map(slot)),
            query_of: writer.words(positions.iter().map(|(query, _)| *query as u32)),
            overflows: writer.words(queries.iter().map(|_| u32::MAX)),
            angles: writer.words(angles.flat_map(|(cosine, sine)| [cosine.to_bits(), sine.to_bits()])),
            items: Items::write(ids.len(), MANY_ROWS, &mut writer),
            narrow: Items::write(ids.len(), FEW_ROWS, &mut writer),
            tiles: writer.words(tiles.iter().flat_map(|tile| tile.words())),
            places: writer.words(places),
            // What grows with contexts comes last: the other addresses, and so the launches, stay those of the step before.
            tasks: writer.words(tasks.into_iter().flatten()),
            tables: writer.words(queries.iter().flat_map(|all| &all.blocks[..table_len(all)]).copied()),
            rounds,
        };
        for place in [
            &mut step.ids,
            &mut step.slots,
            &mut step.query_of,
            &mut step.overflows,
            &mut step.angles,
            &mut step.tables,
            &mut step.tiles,
            &mut step.tasks,
            &mut step.places,
            &mut step.items.at,
            &mut step.narrow.at,
        ] {
            *place += address;
        }
        (step, writer.at)
    }
}
