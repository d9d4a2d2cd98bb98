//! Regions of addresses that large matrices are cut from, one right after the other.
//!
//! A huge page lies at a multiple of its size. A matrix alone would have one neither at its start nor at its end, where small
//! ones would hold a third of a quantised expert; here it shares those with its neighbours. Addresses are taken whole regions at a
//! time, memory as it is written. It goes back to the system as soon as a matrix is dropped, and the addresses to whoever
//! comes next.

use std::collections::BTreeMap;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::{Mutex, PoisonError};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous};

use super::{HUGE, prefer_huge};

/// Bytes of a region, unless one matrix takes more.
const REGION: usize = 256 << 20;

/// What is taken is a multiple of this many bytes: the largest small page of any system.
const UNIT: usize = 64 << 10;

static REGIONS: Mutex<Vec<Region>> = Mutex::new(Vec::new());

struct Region {
    start: NonNull<u8>,
    free: Free,
}

// SAFETY: a region belongs to the whole process.
unsafe impl Send for Region {}

/// Whether so many bytes are taken from here: what is lost to [`UNIT`] is little then.
pub(super) fn holds(bytes: usize) -> bool {
    bytes >= 8 * UNIT
}

/// Takes `bytes`, all zero, at a multiple of [`UNIT`]. None when the system has no more.
pub(super) fn take(bytes: usize) -> Option<NonNull<u8>> {
    let bytes = bytes.checked_next_multiple_of(UNIT)?;
    let mut regions = REGIONS.lock().unwrap_or_else(PoisonError::into_inner);
    let mut place = |region: &mut Region| {
        let offset = region.free.take(bytes)?;
        // SAFETY: the region is as long as all that is free in it.
        Some(unsafe { region.start.add(offset) })
    };
    if let Some(place) = regions.iter_mut().find_map(&mut place) {
        return Some(place);
    }
    let mut region = Region::new(bytes.max(REGION))?;
    let place = place(&mut region);
    regions.push(region);
    place
}

/// Gives back what [`take`] gave.
///
/// SAFETY: as many bytes from the same place, which nobody uses any more.
pub(super) unsafe fn give(start: NonNull<u8>, bytes: usize) {
    let bytes = bytes.next_multiple_of(UNIT);
    // SAFETY: it is memory that nobody uses.
    unsafe { clear(start, bytes) };
    let mut regions = REGIONS.lock().unwrap_or_else(PoisonError::into_inner);
    let offset = |region: &Region| start.addr().get().checked_sub(region.start.addr().get());
    let found = regions.iter_mut().find_map(|region| Some((offset(region).filter(|&o| o < region.free.len)?, region)));
    let Some((offset, region)) = found else { return };
    let gap = region.free.give(offset, bytes);
    // What was the last of a huge page: only when all of one is cleared at once can it be had again as one.
    let first = gap.start.next_multiple_of(HUGE).max(offset / HUGE * HUGE);
    let end = (gap.end / HUGE * HUGE).min((offset + bytes).next_multiple_of(HUGE));
    if first < end {
        // SAFETY: it is free, and of this region, which nobody else takes from meanwhile.
        unsafe { clear(region.start.add(first), end - first) };
    }
}

/// Gives memory back to the system; it reads as zeros afterwards.
///
/// SAFETY: whole units of regions, which nobody uses.
unsafe fn clear(start: NonNull<u8>, bytes: usize) {
    // SAFETY: whole pages of anonymous memory.
    if unsafe { madvise(start.as_ptr().cast(), bytes, Advice::LinuxDontNeed) }.is_err() {
        // SAFETY: mapped for writing, as all of a region is.
        unsafe { start.write_bytes(0, bytes) };
    }
}

impl Region {
    /// At least `bytes`, from a huge page's start on.
    fn new(bytes: usize) -> Option<Self> {
        let len = bytes.checked_next_multiple_of(HUGE)?;
        let (access, kind) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::NORESERVE);
        // SAFETY: new memory at an address that the system chooses.
        let all = unsafe { mmap_anonymous(std::ptr::null_mut(), len + HUGE, access, kind) }.ok()?;
        let all = NonNull::new(all.cast::<u8>())?;
        // SAFETY: a huge page more was mapped than is used; all of it is this region's.
        let start = unsafe {
            let start = all.add(all.align_offset(HUGE));
            prefer_huge(start.as_ptr(), len);
            start
        };
        Some(Self { start, free: Free { len, gaps: BTreeMap::from([(0, len)]) } })
    }
}

/// What is free of `len` bytes.
struct Free {
    len: usize,
    /// Start and length of each gap. No two touch.
    gaps: BTreeMap<usize, usize>,
}

impl Free {
    /// Takes the start of the first gap that is long enough.
    fn take(&mut self, bytes: usize) -> Option<usize> {
        let (&start, &len) = self.gaps.iter().find(|(_, len)| **len >= bytes)?;
        self.gaps.remove(&start);
        if len > bytes {
            self.gaps.insert(start + bytes, len - bytes);
        }
        Some(start)
    }

    /// Gives back what was taken; says which gap it is in now.
    fn give(&mut self, start: usize, bytes: usize) -> Range<usize> {
        let (mut start, mut end) = (start, start + bytes);
        if let Some(len) = self.gaps.remove(&end) {
            end += len;
        }
        if let Some((&before, &len)) = self.gaps.range(..start).next_back()
            && before + len == start
        {
            start = before;
        }
        self.gaps.insert(start, end - start);
        start..end
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_taken_never_overlaps_and_all_given_back_is_one_gap(
            steps in prop::collection::vec((1usize..40, any::<prop::sample::Index>(), any::<bool>()), 1..80),
        ) {
            let mut free = Free { len: 200, gaps: BTreeMap::from([(0, 200)]) };
            let mut taken: Vec<(usize, usize)> = Vec::new();
            for (len, which, give) in steps {
                if give && !taken.is_empty() {
                    let (start, len) = taken.swap_remove(which.index(taken.len()));
                    free.give(start, len);
                } else if let Some(start) = free.take(len) {
                    prop_assert!(start + len <= 200);
                    prop_assert!(taken.iter().all(|&(other, its)| start + len <= other || other + its <= start));
                    taken.push((start, len));
                } else {
                    prop_assert!(free.gaps.values().all(|gap| *gap < len));
                }
                let all: usize = free.gaps.values().chain(taken.iter().map(|(_, len)| len)).sum();
                prop_assert_eq!(all, 200);
            }
            for (start, len) in taken {
                free.give(start, len);
            }
            prop_assert_eq!(free.gaps, BTreeMap::from([(0, 200)]));
        }
    }
}
