//! The multiplication of quantised rows with some panels of a quantised matrix.

use super::GROUP;
use super::matrix::{Line, QuantWidth, scale, weight};
use super::rows::Group;
use crate::Isa;
use crate::matmul::Row;

/// Streams that are read side by side: a processor that notices streams and reads ahead in each does so further with several.
pub(super) const STREAMS: usize = 4;

/// What a kernel multiplies: a tile of rows with the outputs of some panels, over some of the groups.
#[derive(Clone, Copy, Debug)]
pub(super) struct Block<'a> {
    /// `[groups, rows of the tile]`
    pub(super) x: &'a [Group],
    pub(super) width: QuantWidth,
    /// Of each panel `[groups, width.lines()]`, up to [`STREAMS`].
    pub(super) panels: &'a [&'a [Line]],
    /// Sums from one panel's to the next one's.
    pub(super) stride: usize,
}

/// Carries the sums of a block, `[panels, rows of the tile]`, on over its groups.
pub(super) type Kernel = fn(Block, &mut [Row]);

/// The fastest kernel for an instruction set that this machine has. One below the best here stands for an older machine, so
/// nothing newer is used for it.
pub(super) fn kernel(isa: Isa) -> Kernel {
    #[cfg(target_arch = "x86_64")]
    if let Some(kernel) = super::x86::kernel(isa) {
        return kernel;
    }
    #[cfg(target_arch = "aarch64")]
    if let Some(kernel) = super::neon::kernel(isa) {
        return kernel;
    }
    let _ = isa;
    scalar
}

/// One group at a time, in whatever vectors the compiler makes of it.
pub(super) fn scalar(block: Block, sums: &mut [Row]) {
    let Block { x, width, panels, stride } = block;
    for (panel, sums) in panels.iter().zip(sums.chunks_mut(stride)) {
        let groups = panel.len() / width.lines();
        for (x, lines) in x.chunks_exact(x.len() / groups).zip(panel.chunks_exact(width.lines())) {
            for (x, sums) in x.iter().zip(&mut *sums) {
                for (lane, sum) in sums.0.iter_mut().enumerate() {
                    let dot: i32 = (0..GROUP).map(|k| i32::from(x.quants[k]) * weight(width, lines, lane, k)).sum();
                    *sum = (dot as f32).mul_add(scale(width, lines, lane) * x.scale, *sum);
                }
            }
        }
    }
}
