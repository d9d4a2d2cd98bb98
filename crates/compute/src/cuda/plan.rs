//! How a batch is cut up for a GPU: into waves that its workspace has room for, and these into the items of two launches.
//!
//! Decides nothing that changes a bit: rows have the same bits in whichever wave, item and kernel they are computed.

use std::ops::Range;

/// Most rows of an item of the kernels for few rows.
pub(super) const FEW_ROWS: usize = 32;

/// Most rows of an item of the kernels for many rows.
pub(super) const MANY_ROWS: usize = 128;

/// Rows of one expert that belong to a wave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    /// Which of the batch's parts.
    pub(super) part: usize,
    /// Which of the part's rows.
    pub(super) rows: Range<usize>,
    /// The wave's slot of the first of them; the others follow.
    pub(super) first: usize,
}

/// A block of rows of one piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Work {
    /// Which of the batch's parts.
    pub(super) part: usize,
    /// The wave's slot of the first row.
    pub(super) first: usize,
    /// How many.
    pub(super) rows: usize,
}

/// Bytes of an item as kernels read it: where its two matrices are, its first slot, its rows.
pub(super) const ITEM: usize = 24;

/// An item as kernels read it: `rows` slots from `first` on, of an expert whose gate and other half, and whose down matrix, are at
/// `weights`; or of a router's matrix, which is the second.
pub(super) fn item(weights: [u64; 2], first: usize, rows: usize) -> [u8; ITEM] {
    let mut item = [0; ITEM];
    item[..8].copy_from_slice(&weights[0].to_le_bytes());
    item[8..16].copy_from_slice(&weights[1].to_le_bytes());
    item[16..20].copy_from_slice(&(first as u32).to_le_bytes());
    item[20..].copy_from_slice(&(rows as u32).to_le_bytes());
    item
}

/// Cuts parts of these many rows into waves of at most `slots` rows, in order.
pub(super) fn waves(parts: &[usize], slots: usize) -> Vec<Vec<Piece>> {
    let mut waves = Vec::new();
    let (mut wave, mut used) = (Vec::new(), 0);
    for (part, &rows) in parts.iter().enumerate() {
        let mut start = 0;
        while start < rows {
            if used == slots {
                waves.push(std::mem::take(&mut wave));
                used = 0;
            }
            let end = rows.min(start + slots - used);
            wave.push(Piece { part, rows: start..end, first: used });
            used += end - start;
            start = end;
        }
    }
    if !wave.is_empty() {
        waves.push(wave);
    }
    waves
}

/// The items of a wave: for the kernels for few rows, and for those for many. What is left of a piece after whole blocks of
/// [`MANY_ROWS`] goes where it wastes less.
pub(super) fn items(wave: &[Piece]) -> (Vec<Work>, Vec<Work>) {
    let (mut few, mut many) = (Vec::new(), Vec::new());
    for Piece { part, rows, first } in wave {
        for start in (0..rows.len()).step_by(MANY_ROWS) {
            let work = Work { part: *part, first: first + start, rows: MANY_ROWS.min(rows.len() - start) };
            if work.rows <= FEW_ROWS { few.push(work) } else { many.push(work) }
        }
    }
    (few, many)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_row_is_computed_once_in_its_order_and_no_wave_is_too_large(
            parts in prop::collection::vec(0usize..700, 0..12), slots in 1usize..600,
        ) {
            let mut next = vec![0; parts.len()];
            for wave in waves(&parts, slots) {
                let mut used = 0;
                for Piece { part, rows, first } in &wave {
                    prop_assert_eq!(rows.start, next[*part]);
                    prop_assert_eq!(*first, used);
                    prop_assert!(!rows.is_empty());
                    next[*part] = rows.end;
                    used += rows.len();
                }
                prop_assert!(used <= slots);
                let (few, many) = items(&wave);
                prop_assert!(few.iter().all(|work| (1..=FEW_ROWS).contains(&work.rows)));
                prop_assert!(many.iter().all(|work| (FEW_ROWS + 1..=MANY_ROWS).contains(&work.rows)));
                let mut covered: Vec<(usize, usize, usize)> =
                    few.iter().chain(&many).map(|work| (work.first, work.rows, work.part)).collect();
                covered.sort_unstable();
                let mut slot = 0;
                for (first, rows, part) in covered {
                    prop_assert_eq!(first, slot);
                    slot += rows;
                    prop_assert!(wave.iter().any(|p| p.part == part && first >= p.first && slot <= p.first + p.rows.len()));
                }
                prop_assert_eq!(slot, used);
            }
            prop_assert_eq!(next, parts);
        }
    }
}
