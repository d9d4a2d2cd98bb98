//! The kernels of each instruction set behind safe functions that check lengths.

use crate::Isa;
use crate::packed::{PANEL, WORDS};

/// One value for each output of a panel.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(crate) struct Row(pub(crate) [f32; PANEL]);

impl Row {
    pub(crate) const ZERO: Self = Self([0.0; PANEL]);
}

/// What a kernel fetches while it computes: the next cache lines of four streams in turn. A processor that notices streams and
/// reads ahead in each does so further with several.
#[derive(Clone, Copy)]
pub(super) struct Ahead {
    /// Where the first stream starts; need not be valid.
    pub(super) start: *const u8,
    /// Bytes from one stream to the next.
    pub(super) stride: usize,
    /// Bytes to go on after a turn; less than a cache line where several calls share what is to be fetched.
    pub(super) step: usize,
}

impl Ahead {
    /// Streams.
    pub(super) const STREAMS: usize = 4;

    /// What to fetch beside input `k`.
    #[expect(clippy::inline_always, reason = "inlined into the kernels, which enable the instruction set")]
    #[inline(always)]
    pub(super) fn at(self, k: usize) -> *const u8 {
        self.start.wrapping_add(k % Self::STREAMS * self.stride + k / Self::STREAMS * self.step)
    }
}

/// Adds the products of a tile with panels straight from their words. See [`super::lanes`], as for the others.
type Straight = unsafe fn(*const f32, usize, *const u32, *mut Row, usize);
/// The same, keeping the words widened to f32.
type Widen = unsafe fn(*const f32, usize, *const u32, *mut Row, *mut Row, Ahead);
/// Adds the products of a tile with widened weights.
type Block = unsafe fn(*const f32, usize, *const Row, *mut Row, Ahead);

/// The kernels of one instruction set, each by rows, from one on. Straight ones are there for as few rows as make one pass over
/// several panels worth it.
pub(super) struct Kernels {
    /// How many panels are read side by side, a divisor of [`Ahead::STREAMS`]: memory is faster with several streams, and one row
    /// alone makes too few sums to keep the multipliers busy.
    pub(super) panels: &'static [usize],
    /// For that many panels.
    pub(super) straight: &'static [Straight],
    /// For one panel.
    pub(super) straight_one: &'static [Straight],
    pub(super) widen: &'static [Widen],
    pub(super) block: &'static [Block],
}

/// The kernels of `isa`, which this machine must have.
pub(super) fn kernels(isa: Isa) -> &'static Kernels {
    debug_assert!(isa.is_available());
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => &super::avx512::KERNELS,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => &super::avx2::KERNELS,
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => &super::neon::KERNELS,
        _ => &super::portable::KERNELS,
    }
}

impl Kernels {
    /// Rows of the largest tile, as many as the registers hold sums for.
    pub(super) fn tile_rows(&self) -> usize {
        self.block.len()
    }

    /// Whether there is a straight kernel for `rows`.
    pub(super) fn is_straight(&self, rows: usize) -> bool {
        rows <= self.straight.len()
    }

    /// How many streams of panels [`Kernels::straight`] reads side by side at full speed.
    pub(super) fn streams(&self, rows: usize) -> usize {
        self.panels[rows.max(1) - 1]
    }

    /// Adds to `sums`, `[panels, rows]`, the products of a tile `x`, `[inputs, rows]`, with panels, `[panels, inputs, WORDS]`. They
    /// are read as [`Kernels::streams`], each of as many panels, if they are a multiple of that.
    pub(super) fn straight(&self, x: &[f32], words: &[u32], rows: usize, sums: &mut [Row]) {
        let (inputs, panels) = (x.len() / rows, sums.len() / rows);
        assert!(x.len() == inputs * rows && sums.len() == panels * rows, "shapes fit");
        assert!(words.len() == panels * inputs * WORDS, "shapes fit");
        let side_by_side = panels.is_multiple_of(self.streams(rows));
        let streams = if side_by_side { self.streams(rows) } else { 1 };
        let kernel = if side_by_side { self.straight[rows - 1] } else { self.straight_one[rows - 1] };
        let length = panels / streams;
        for panel in 0..length {
            let (words, sums) = (&words[panel * inputs * WORDS..], &mut sums[panel * rows..]);
            // SAFETY: these kernels' instruction set is here; the panels are `panel` of each stream, which were just checked.
            unsafe { kernel(x.as_ptr(), inputs, words.as_ptr(), sums.as_mut_ptr(), length) }
        }
    }

    /// Adds to `sums`, `[rows]`, the products of a tile `x`, `[inputs, rows]`, with `words`, `[inputs, WORDS]`, and keeps these
    /// widened in `weights`, `[inputs]`.
    pub(super) fn widen(&self, x: &[f32], words: &[u32], weights: &mut [Row], sums: &mut [Row], ahead: Ahead) {
        let inputs = weights.len();
        assert!(x.len() == inputs * sums.len() && words.len() == inputs * WORDS, "shapes fit");
        let kernel = self.widen[sums.len() - 1];
        // SAFETY: these kernels' instruction set is here, and the lengths were just checked.
        unsafe { kernel(x.as_ptr(), inputs, words.as_ptr(), weights.as_mut_ptr(), sums.as_mut_ptr(), ahead) }
    }

    /// Adds to `sums`, `[rows]`, the products of a tile `x`, `[inputs, rows]`, with `weights`, `[inputs]`.
    pub(super) fn block(&self, x: &[f32], weights: &[Row], sums: &mut [Row], ahead: Ahead) {
        assert_eq!(x.len(), weights.len() * sums.len(), "shapes fit");
        let kernel = self.block[sums.len() - 1];
        // SAFETY: these kernels' instruction set is here, and the lengths were just checked.
        unsafe { kernel(x.as_ptr(), weights.len(), weights.as_ptr(), sums.as_mut_ptr(), ahead) }
    }
}

/// Defines `KERNELS` for a type of [`super::lanes::Lanes`]. `words`: vectors that the words of an input fill. `columns`: vectors
/// of widened weights at a time. `straight`: rows and panels side by side. `tiles`: rows.
macro_rules! define {
    (
        $lanes:ty, $(features: $features:literal,)? words: $j:literal, columns: $c:literal,
        straight: [$($rows:literal: $panels:literal),+], tiles: [$($tile:literal),+]
    ) => {
        pub(super) static KERNELS: Kernels = Kernels {
            panels: &[$($panels),+],
            straight: &[$(straight::<$rows, $panels>),+],
            straight_one: &[$(straight::<$rows, 1>),+],
            widen: &[$(widen::<$tile>),+],
            block: &[$(block::<$tile>),+],
        };

        $(#[target_feature(enable = $features)])?
        unsafe fn straight<const R: usize, const P: usize>(
            x: *const f32,
            inputs: usize,
            words: *const u32,
            sums: *mut Row,
            apart: usize,
        ) {
            // SAFETY: the instruction set is that of this function; the rest is its caller's promise.
            unsafe { lanes::straight::<$lanes, R, P, $j>(x, inputs, words, sums, apart) }
        }

        $(#[target_feature(enable = $features)])?
        unsafe fn widen<const R: usize>(
            x: *const f32,
            inputs: usize,
            words: *const u32,
            weights: *mut Row,
            sums: *mut Row,
            ahead: Ahead,
        ) {
            // SAFETY: as above.
            unsafe { lanes::widen::<$lanes, R>(x, inputs, words, weights, sums, ahead) }
        }

        $(#[target_feature(enable = $features)])?
        unsafe fn block<const R: usize>(
            x: *const f32,
            inputs: usize,
            weights: *const Row,
            sums: *mut Row,
            ahead: Ahead,
        ) {
            // SAFETY: as above.
            unsafe { lanes::block::<$lanes, R, $c>(x, inputs, weights, sums, ahead) }
        }
    };
}

pub(super) use define;
