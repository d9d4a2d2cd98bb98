//! Experts in a GPU's memory, and how they get there: packed on the host into pinned buffers, which the GPU copies from while the
//! next one is filled.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::error::DeviceError;
use super::gpu::{Gpu, Memory, Pinned, Stream};
use super::layout::{Layout, TILE};
use crate::ffn::ExpertMatrix;
use crate::packed::PANEL;

/// Tiles that may be on their way to the GPU.
const BUFFERS: usize = 8;

/// The weights of one expert in a GPU's memory.
#[derive(Debug)]
pub(crate) struct CudaExpert {
    memory: Memory,
    layout: Layout,
}

impl CudaExpert {
    pub(crate) fn bytes(&self) -> usize {
        self.memory.bytes()
    }

    /// Where its gate and its other half lie on the device, and where its down matrix does.
    pub(super) fn addresses(&self) -> (u64, u64) {
        (self.memory.address(), self.memory.address() + self.layout.down_offset() as u64)
    }

    pub(super) fn layout(&self) -> Layout {
        self.layout
    }
}

/// The way into a GPU's memory, shared by all that load.
#[derive(Debug)]
pub(super) struct Staging {
    stream: Stream,
    buffers: Vec<Pinned>,
    /// How many of the buffers are being copied from.
    busy: usize,
}

impl Staging {
    /// Buffers for tiles of experts like `layout`.
    pub(super) fn new(gpu: &Arc<Gpu>, layout: Layout) -> Result<Self, DeviceError> {
        let buffers = (0..BUFFERS).map(|_| gpu.allocate_pinned(layout.largest_tile()));
        Ok(Self { stream: gpu.stream()?, buffers: buffers.collect::<Result<_, _>>()?, busy: 0 })
    }

    fn wait(&mut self) -> Result<(), DeviceError> {
        self.busy = 0;
        self.stream.wait()
    }

    /// Packs a tile and starts its copy.
    fn push(
        &mut self,
        (layout, memory): (Layout, &Memory),
        matrix: ExpertMatrix,
        tile: usize,
        rows: &[u8],
    ) -> Result<(), DeviceError> {
        if self.busy == BUFFERS {
            self.wait()?;
        }
        let (bytes, buffer) = (layout.tile_bytes_of(matrix), &mut self.buffers[self.busy]);
        layout.pack(matrix, rows, &mut buffer[..bytes]);
        self.busy += 1;
        // SAFETY: the buffer is not written before `wait`; whoever has the memory, a `CudaPacker`, waits before it is dropped.
        unsafe { self.stream.copy_in(memory, layout.tile_offset(matrix, tile), buffer, bytes) }
    }
}

/// An expert on its way into a GPU's memory.
#[derive(Debug)]
pub(crate) struct CudaPacker {
    /// None once it is finished.
    memory: Option<Memory>,
    layout: Layout,
    staging: Arc<Mutex<Staging>>,
    /// What went wrong first.
    error: Option<DeviceError>,
}

impl CudaPacker {
    /// Takes the memory for an expert. Errors when it is not free.
    pub(super) fn new(gpu: &Arc<Gpu>, layout: Layout, staging: Arc<Mutex<Staging>>) -> Result<Self, DeviceError> {
        let memory = gpu.allocate(layout.bytes(), "an expert")?;
        Ok(Self { memory: Some(memory), layout, staging, error: None })
    }

    /// Fills panel `panel`, [`PANEL`] outputs, of a matrix with rows of little-endian bf16. An error is told by
    /// [`CudaPacker::finish`].
    pub(crate) fn fill(&mut self, matrix: ExpertMatrix, panel: usize, rows: &[u8]) {
        let Some(memory) = self.memory.as_ref().filter(|_| self.error.is_none()) else { return };
        let mut staging = lock(&self.staging);
        let row = 2 * if matrix == ExpertMatrix::Down { self.layout.inter } else { self.layout.hidden };
        for (index, rows) in rows.chunks(TILE * row).enumerate() {
            let tile = panel * (PANEL / TILE) + index;
            if let Err(error) = staging.push((self.layout, memory), matrix, tile, rows) {
                self.error = Some(error);
                return;
            }
        }
    }

    /// Waits until all is there.
    pub(crate) fn finish(mut self) -> Result<CudaExpert, DeviceError> {
        lock(&self.staging).wait()?;
        match (self.error.take(), self.memory.take()) {
            (None, Some(memory)) => Ok(CudaExpert { memory, layout: self.layout }),
            (Some(error), _) => Err(error),
            (None, None) => unreachable!("a packer is finished once"),
        }
    }
}

impl Drop for CudaPacker {
    fn drop(&mut self) {
        if self.memory.is_some() {
            // When that fails, the device is lost and copies nothing any more.
            let _ = lock(&self.staging).wait();
        }
    }
}

fn lock(staging: &Mutex<Staging>) -> MutexGuard<'_, Staging> {
    // A panic leaves buffers that are busy, at worst.
    staging.lock().unwrap_or_else(PoisonError::into_inner)
}
