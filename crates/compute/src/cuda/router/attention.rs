//! How a batch's attention is cut up for a GPU: into tiles of rows that share loads of keys and values, tasks of a tile and a chunk, and
//! rounds whose records the workspace has room for. Plain code; never touches a device.
//!
//! Decides nothing that changes a bit: see the order of summation at the top of `kernels/attention.cu`.

use std::ops::Range;

use crate::cuda::launch::Argument;
use crate::{AttentionShape, BLOCK_TOKENS, Queries};

/// Tokens of a chunk, which has a softmax of its own.
const CHUNK_TOKENS: usize = 256;

/// Most rows of a tile of the kernels for few rows.
const FEW_ROWS: usize = 8;

/// From more rows on the kernel for many takes less time than two tiles of few.
const WORTH_MANY: usize = 2 * FEW_ROWS;

/// What a place counts a tile as.
const PLACES: u32 = 64;

/// The tile of a task for which kernels do nothing. They say so too.
const NO_TILE: u32 = u32::MAX;

/// The heads of a model's layers, and where they lie in a row of queries, keys and values.
#[derive(Clone, Copy, Debug)]
pub(super) struct Heads {
    pub(super) shape: AttentionShape,
    /// Where a row's keys begin.
    pub(super) k_at: usize,
    /// Where its values begin.
    pub(super) v_at: usize,
    /// Of a row.
    pub(super) width: usize,
}

impl Heads {
    /// Elements of a head, with what pads it, in fours.
    pub(super) fn quads(&self) -> usize {
        self.shape.head_dim.div_ceil(4)
    }

    /// Query heads that share a KV head.
    fn group(&self) -> usize {
        self.shape.heads / self.shape.kv_heads
    }

    /// Most rows of a tile of the kernel for many rows.
    pub(super) fn many_rows(&self) -> usize {
        if self.shape.head_dim <= 128 { 64 } else { 32 }
    }

    /// Bytes of a row's record of a chunk.
    pub(super) fn record_bytes(&self) -> usize {
        (self.quads() + 1) * 16
    }

    /// The chunks that rows from position `first` to `last` see.
    fn chunks(&self, first: usize, last: usize) -> Range<usize> {
        self.seen(first).start / CHUNK_TOKENS..(last + 1).div_ceil(CHUNK_TOKENS)
    }

    fn seen(&self, position: usize) -> Range<usize> {
        self.shape.window.map_or(0, |window| (position + 1).saturating_sub(window))..position + 1
    }

    /// Most chunks that a tile sees of a sequence of `longest` tokens.
    fn most_chunks(&self, longest: usize) -> usize {
        let all = longest.div_ceil(CHUNK_TOKENS);
        // A window and the tile's queries may begin and end anywhere.
        self.shape.window.map_or(all, |window| all.min((window + self.many_rows()).div_ceil(CHUNK_TOKENS) + 1))
    }

    /// Bytes that the records of one tile take at most, for a sequence of `longest` tokens.
    pub(super) fn tile_record_bytes(&self, longest: usize) -> usize {
        self.many_rows() * self.shape.kv_heads * self.most_chunks(longest) * self.record_bytes()
    }

    /// Shared memory of the kernel for tiles of up to `rows`, bytes: queries and weights; for few rows also the sums of each block.
    pub(super) fn shared_bytes(&self, rows: usize) -> usize {
        let row = self.quads() * 16;
        rows * (row + CHUNK_TOKENS * 4 + if rows <= FEW_ROWS { CHUNK_TOKENS / BLOCK_TOKENS * row } else { 0 })
    }

    /// The kernel for tiles of `rows`, the rows it has room for, and its shared memory.
    fn kernel(&self, rows: usize) -> (&'static str, usize) {
        let (kernel, room) = match rows {
            1 => ("attention_1", 1),
            2 => ("attention_2", 2),
            3..=4 => ("attention_4", 4),
            5..=FEW_ROWS => ("attention_8", 8),
            _ => ("attention_many", self.many_rows()),
        };
        (kernel, self.shared_bytes(room))
    }
}

impl From<Heads> for Argument {
    fn from(heads: Heads) -> Self {
        let Heads { shape, k_at, v_at, width } = heads;
        let window = shape.window.and_then(|window| u32::try_from(window).ok()).unwrap_or(u32::MAX);
        let [heads, kv_heads, dim] = [shape.heads, shape.kv_heads, shape.head_dim].map(|number| number as u32);
        Self::words([heads, kv_heads, dim, window, k_at as u32, v_at as u32, width as u32])
    }
}

/// Rows of one sequence, (query, query head of its group) one after the other, the same for each KV head. As kernels read it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub(super) struct Tile {
    /// The batch's token that is the sequence's first.
    token: u32,
    /// Its position.
    start: u32,
    /// Where the sequence's blocks begin among all.
    table: u32,
    /// The first row.
    first: u32,
    rows: u32,
    /// The first chunk that a row sees.
    chunk: u32,
    /// To the last one that a row sees.
    chunks: u32,
    /// The first record.
    record: u32,
}

impl Tile {
    /// As kernels read it.
    pub(super) fn words(&self) -> [u32; 8] {
        [self.token, self.start, self.table, self.first, self.rows, self.chunk, self.chunks, self.record]
    }
}

/// A batch's attention, the same for each layer.
#[derive(Clone, Debug, Default)]
pub(super) struct Plan {
    pub(super) tiles: Vec<Tile>,
    /// A tile and a chunk; behind those of each section some of [`NO_TILE`].
    pub(super) tasks: Vec<[u32; 2]>,
    /// For each row its tile times [`PLACES`], and its place there.
    pub(super) places: Vec<u32>,
    pub(super) rounds: Vec<Round>,
}

/// What is computed before records are written again.
#[derive(Clone, Debug, Default)]
pub(super) struct Round {
    pub(super) sections: Vec<Section>,
    /// Rows that are folded then.
    pub(super) places: Range<usize>,
}

/// Tasks of one kernel.
#[derive(Clone, Debug)]
pub(super) struct Section {
    pub(super) kernel: &'static str,
    /// Bytes.
    pub(super) shared: usize,
    pub(super) tasks: Range<usize>,
}

/// Cuts up the attention of `queries`, whose tables follow each other, for a workspace of `room` records.
pub(super) fn plan(heads: &Heads, queries: &[Queries], room: usize) -> Plan {
    let mut plan = Plan::default();
    let (mut token, mut table) = (0, 0);
    let (mut first, mut used) = (0, 0); // tile of the round, and its records
    for all in queries {
        for (row, rows) in cut(all.len * heads.group(), heads.many_rows()) {
            let position = |row: usize| all.start + row / heads.group();
            let chunks = heads.chunks(position(row), position(row + rows - 1));
            let records = rows * chunks.len() * heads.shape.kv_heads;
            assert!(records <= room, "sequences are as long as was announced");
            if used + records > room {
                plan.end_round(heads, first);
                (first, used) = (plan.tiles.len(), 0);
            }
            plan.tiles.push(Tile {
                token,
                start: all.start as u32,
                table,
                first: row as u32,
                rows: rows as u32,
                chunk: chunks.start as u32,
                chunks: chunks.len() as u32,
                record: used as u32,
            });
            used += records;
        }
        token += all.len as u32;
        table += table_len(all) as u32;
    }
    plan.end_round(heads, first);
    plan
}

impl Plan {
    /// Makes a round of the tiles from `first` on.
    fn end_round(&mut self, heads: &Heads, first: usize) {
        let tiles = first as u32..self.tiles.len() as u32;
        let start = self.places.len();
        for tile in tiles.clone() {
            self.places.extend((0..self.tiles[tile as usize].rows).map(|row| tile * PLACES + row));
        }
        let mut round = Round { sections: Vec::new(), places: start..self.places.len() };
        for (rows, most) in [(1, 1), (2, 2), (3, 4), (5, FEW_ROWS), (FEW_ROWS + 1, usize::MAX)] {
            let start = self.tasks.len();
            for index in tiles.clone() {
                let tile = &self.tiles[index as usize];
                if (rows..=most).contains(&(tile.rows as usize)) {
                    self.tasks.extend((tile.chunk..tile.chunk + tile.chunks).map(|chunk| [index, chunk]));
                }
            }
            // Tiles that look at the same chunk at the same time find it near.
            self.tasks[start..].sort_by_key(|&[tile, chunk]| (self.tiles[tile as usize].table, chunk, tile));
            if self.tasks.len() > start {
                self.tasks.resize(start + rounded(self.tasks.len() - start), [NO_TILE, 0]);
                let (kernel, shared) = heads.kernel(rows);
                round.sections.push(Section { kernel, shared, tasks: start..self.tasks.len() });
            }
        }
        self.rounds.push(round);
    }
}

/// So many tasks and some that do nothing, less than a quarter more: up to eight as they are, then one of four numbers to the next
/// power of two. While contexts grow, launches stay the same until this changes, so that graphs of them can be used again.
pub(super) fn rounded(tasks: usize) -> usize {
    tasks.next_multiple_of((tasks.next_power_of_two() / 8).max(1))
}

/// Cuts `rows` into tiles: the first row and the number of rows of each.
fn cut(rows: usize, many: usize) -> impl Iterator<Item = (usize, usize)> {
    let mut first = 0;
    std::iter::from_fn(move || {
        let left = rows - first;
        let size = left.min(if left > WORTH_MANY { many } else { FEW_ROWS });
        let tile = (first, size);
        first += size;
        (size > 0).then_some(tile)
    })
}

/// Blocks of a sequence up to the end of `queries`.
pub(super) fn table_len(queries: &Queries) -> usize {
    (queries.start + queries.len).div_ceil(BLOCK_TOKENS)
}

/// Most tiles, tasks with those that do nothing, and rows of a batch of so many tokens in so many sequences of up to `longest`.
pub(super) fn most(heads: &Heads, tokens: usize, sequences: usize, longest: usize) -> (usize, usize, usize) {
    let rows = tokens * heads.group();
    // What is left of a sequence's rows after whole tiles is two tiles at most.
    let tiles = rows / heads.many_rows() + 2 * sequences;
    let tasks = tiles * heads.most_chunks(longest);
    (tiles, tasks + tasks / 4, rows)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn heads(group: usize, kv_heads: usize, head_dim: usize, window: Option<usize>) -> Heads {
        let shape = AttentionShape { heads: group * kv_heads, kv_heads, head_dim, window };
        Heads { shape, k_at: 0, v_at: 0, width: 0 }
    }

    #[test]
    fn every_kernel_has_the_shared_memory_that_every_gpu_has() {
        // 99 KiB is what compute capability 8.6, 8.9 and 12.0 have.
        for (head_dim, rows) in [128, 256].into_iter().flat_map(|dim| [1, 2, 4, 8, 9].map(|rows| (dim, rows))) {
            let (kernel, shared) = heads(4, 8, head_dim, None).kernel(rows);
            assert!(shared <= 99 << 10, "{kernel}, {head_dim}: {shared}");
        }
    }

    #[test]
    fn numbers_of_tasks_are_few() {
        let all: Vec<usize> = (1..=1 << 16).map(rounded).collect();
        assert!(all.iter().zip(1..).all(|(rounded, tasks)| (tasks..=tasks + tasks / 4).contains(rounded)));
        let mut distinct = all;
        distinct.dedup();
        assert_eq!(distinct[..14], [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24]);
        assert_eq!(distinct.len(), 8 + 4 * 13);
    }

    proptest! {
        #[test]
        fn every_row_meets_every_chunk_it_sees_once_and_nothing_is_larger_than_announced(
            group in 1_usize..20, kv_heads in 1_usize..4, wide in any::<bool>(),
            window in proptest::option::of(1_usize..2000),
            parts in prop::collection::vec((0_usize..3000, 1_usize..100), 1..6), more in 0_usize..5000,
        ) {
            let heads = heads(group, kv_heads, if wide { 256 } else { 64 }, window);
            let longest = parts.iter().map(|(start, len)| start + len).max().unwrap();
            let blocks: Vec<u32> = (0..longest.div_ceil(BLOCK_TOKENS) as u32).collect();
            let queries: Vec<Queries> =
                parts.iter().map(|&(start, len)| Queries { blocks: &blocks, start, len }).collect();
            let room = heads.tile_record_bytes(longest) / heads.record_bytes() + more;
            let plan = plan(&heads, &queries, room);

            let tokens = queries.iter().map(|queries| queries.len).sum();
            let (tiles, tasks, rows) = most(&heads, tokens, queries.len(), longest);
            prop_assert!(plan.tiles.len() <= tiles && plan.tasks.len() <= tasks);
            prop_assert_eq!(plan.places.len(), rows);
            // Rows are those of the sequences, in order, each once.
            let mut expected = Vec::new();
            let (mut token, mut table) = (0, 0);
            for queries in &queries {
                expected.extend((0..queries.len * group).map(|row| (token, table, queries.start, row)));
                token += queries.len;
                table += table_len(queries);
            }
            let row_of = |place: u32| {
                let tile = &plan.tiles[(place / PLACES) as usize];
                (tile.token as usize, tile.table as usize, tile.start as usize, (tile.first + place % PLACES) as usize)
            };
            prop_assert_eq!(plan.places.iter().map(|place| row_of(*place)).collect::<Vec<_>>(), expected);
            let mut next = (0, 0);
            for round in &plan.rounds {
                prop_assert_eq!(round.places.start, next.0);
                let mut records = vec![false; room];
                let mut met = std::collections::BTreeSet::new();
                for section in &round.sections {
                    prop_assert_eq!(section.tasks.start, next.1);
                    next.1 = section.tasks.end;
                    let tasks = &plan.tasks[section.tasks.clone()];
                    let (tasks, nothing) = tasks.split_at(tasks.partition_point(|[tile, _]| *tile != NO_TILE));
                    prop_assert!(nothing.iter().all(|task| *task == [NO_TILE, 0]) && nothing.len() * 4 < tasks.len());
                    for &[tile, chunk] in tasks {
                        let at = &plan.tiles[tile as usize];
                        prop_assert_eq!(heads.kernel(at.rows as usize), (section.kernel, section.shared));
                        prop_assert!((at.chunk..at.chunk + at.chunks).contains(&chunk));
                        prop_assert!(met.insert((tile, chunk)));
                        for (head, row) in (0..kv_heads as u32).flat_map(|head| (0..at.rows).map(move |row| (head, row))) {
                            let record = at.record + (head * at.chunks + chunk - at.chunk) * at.rows + row;
                            prop_assert!(!std::mem::replace(&mut records[record as usize], true));
                        }
                    }
                }
                for place in &plan.places[round.places.clone()] {
                    let (.., start, row) = row_of(*place);
                    for chunk in heads.chunks(start + row / group, start + row / group) {
                        prop_assert!(met.contains(&(place / PLACES, chunk as u32)));
                    }
                }
                next.0 = round.places.end;
            }
            prop_assert_eq!(next, (plan.places.len(), plan.tasks.len()));
        }
    }
}
