//! Where an expert node keeps its experts and runs them: the CPU or a GPU, behind one trait.

use std::fmt;

use sirocco_types::ExpertDtype;

use crate::cuda::{CudaBackend, DeviceError, KernelSettings, cuda_devices};
use crate::{ExpertPacker, ExpertWeights, Pool, cpu_description};

pub use sirocco_types::{DeviceChoice, GpuReadings};

/// Rows to be run by experts.
pub struct Batch<'a> {
    /// Appends hidden state `row`, `[hidden_size]`, to what it is given.
    pub append: &'a dyn Fn(usize, &mut Vec<f32>),
    /// What each expert runs.
    pub parts: &'a [Part<'a>],
}

/// One expert's share of a [`Batch`].
#[derive(Debug)]
pub struct Part<'a> {
    /// The expert, made by the backend's own packer.
    pub weights: &'a ExpertWeights,
    /// Which hidden states, as [`Batch::append`] numbers them; any may be there more than once.
    pub rows: Vec<usize>,
}

/// Keeps experts of one shape and runs them.
pub trait ExpertBackend: Send + Sync + fmt::Debug {
    /// `cpu` or `cuda`.
    fn kind(&self) -> &'static str;

    /// For people, for example `AMD EPYC, AVX2+FMA, 2 threads`.
    fn name(&self) -> String;

    /// Bytes of experts it has room for; none when that is not its own to say.
    fn capacity_bytes(&self) -> Option<u64>;

    /// A place for one more expert. Errors when there is none: `OutOfMemory`.
    fn packer(&self) -> Result<ExpertPacker, DeviceError>;

    /// Runs every part and hands out rows as they are there: `done(part, first, rows)` has the results `[n, hidden_size]` of the
    /// part's rows from `first` on. A row's bits do not depend on the rows beside it. After an error some rows were not handed
    /// out; other batches may succeed unless it is `Lost`.
    fn run(&self, batch: &Batch, done: &mut dyn FnMut(usize, usize, &[f32])) -> Result<(), DeviceError>;

    /// How its GPU fares, when it has one that tells.
    fn readings(&self) -> Option<GpuReadings>;
}

/// Experts on the CPU.
#[derive(Debug)]
pub struct CpuBackend {
    /// Its threads.
    pub pool: Pool,
    /// What experts are kept as.
    pub dtype: ExpertDtype,
    /// Of the model.
    pub hidden_size: usize,
    /// Of the model.
    pub intermediate_size: usize,
}

impl ExpertBackend for CpuBackend {
    fn kind(&self) -> &'static str {
        "cpu"
    }

    fn name(&self) -> String {
        cpu_description(self.pool.threads())
    }

    fn capacity_bytes(&self) -> Option<u64> {
        None
    }

    fn packer(&self) -> Result<ExpertPacker, DeviceError> {
        Ok(ExpertPacker::new(self.dtype, self.hidden_size, self.intermediate_size))
    }

    fn run(&self, batch: &Batch, done: &mut dyn FnMut(usize, usize, &[f32])) -> Result<(), DeviceError> {
        for (index, part) in batch.parts.iter().enumerate() {
            let mut input = Vec::with_capacity(part.rows.len() * self.hidden_size); // [rows, hidden]
            part.rows.iter().for_each(|&row| (batch.append)(row, &mut input));
            done(index, 0, &part.weights.forward(&input, &self.pool));
        }
        Ok(())
    }

    fn readings(&self) -> Option<GpuReadings> {
        None
    }
}

/// The backend of `choice` for experts like those of `cpu`, which is what `auto` falls back to. With it comes why a GPU that may be
/// there is not used, if there is something to say.
pub fn open_backend(
    choice: DeviceChoice,
    settings: &KernelSettings,
    cpu: CpuBackend,
) -> Result<(Box<dyn ExpertBackend>, Option<String>), DeviceError> {
    let shape = (cpu.hidden_size, cpu.intermediate_size);
    let (gpu, said) = choose(choice, |ordinal| CudaBackend::open(ordinal, settings, cpu.dtype, shape))?;
    let backend: Box<dyn ExpertBackend> = match gpu {
        Some(gpu) => Box::new(gpu),
        None => Box::new(cpu),
    };
    Ok((backend, said))
}

/// What `open` makes of the GPU that `choice` wants; none for the CPU. With it comes why a GPU that may be there is not used, if there is
/// something to say.
pub(crate) fn choose<G>(
    choice: DeviceChoice,
    open: impl FnOnce(usize) -> Result<G, DeviceError>,
) -> Result<(Option<G>, Option<String>), DeviceError> {
    match choice {
        DeviceChoice::Cuda(ordinal) => Ok((Some(open(ordinal)?), None)),
        DeviceChoice::Auto => Ok(match open(0) {
            Ok(gpu) => (Some(gpu), None),
            Err(error) => (None, Some(error.to_string())),
        }),
        DeviceChoice::Cpu => {
            let idle = cuda_devices();
            let said =
                (!idle.is_empty()).then(|| format!("--device is cpu, so that GPUs stay idle: {}", idle.join(", ")));
            Ok((None, said))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpu() -> CpuBackend {
        CpuBackend { pool: Pool::new(1).unwrap(), dtype: ExpertDtype::Bf16, hidden_size: 8, intermediate_size: 16 }
    }

    #[test]
    fn without_a_gpu_auto_is_the_cpu_and_says_why_and_a_gpu_that_is_asked_for_is_missed_by_name() {
        let settings = KernelSettings::default();
        let (backend, said) = open_backend(DeviceChoice::Cpu, &settings, cpu()).unwrap();
        assert_eq!((backend.kind(), said.is_some()), ("cpu", !cuda_devices().is_empty()));
        if !cuda_devices().is_empty() {
            // With a GPU, `cargo xtask gpu-check` says what happens.
            return;
        }
        let (backend, said) = open_backend(DeviceChoice::Auto, &settings, cpu()).unwrap();
        assert_eq!((backend.kind(), backend.capacity_bytes()), ("cpu", None));
        let error = open_backend(DeviceChoice::Cuda(0), &settings, cpu()).unwrap_err();
        assert_eq!(said, Some(error.to_string()));
        let named = ["libcuda.so.1 not found: ", "cuda:0: this machine has 0 NVIDIA GPUs"];
        assert!(named.iter().any(|start| error.to_string().starts_with(start)), "{error}");
    }

    #[test]
    fn the_cpu_hands_out_what_each_expert_makes_of_its_rows() {
        let backend = cpu();
        let expert = |seed: usize| {
            let mut packer = backend.packer().unwrap();
            for matrix in crate::ExpertMatrix::ALL {
                let values = (0..8 * 16).map(|i| half::bf16::from_f32(((i * seed) as f32).sin()));
                packer.push_rows(matrix, &values.flat_map(half::bf16::to_le_bytes).collect::<Vec<u8>>());
            }
            packer.finish().unwrap()
        };
        let (first, second) = (expert(3), expert(5));
        let state = |row: usize| (0..8).map(move |i| ((row * 8 + i) as f32).cos());
        let append = |row: usize, out: &mut Vec<f32>| out.extend(state(row));
        let parts = [Part { weights: &first, rows: vec![2, 0, 2] }, Part { weights: &second, rows: vec![1] }];
        let mut got = Vec::new();
        let batch = Batch { append: &append, parts: &parts };
        backend.run(&batch, &mut |part, from, rows| got.push((part, from, rows.to_vec()))).unwrap();
        let run = |weights: &ExpertWeights, rows: &[usize]| {
            weights.forward(&rows.iter().flat_map(|&row| state(row)).collect::<Vec<_>>(), &backend.pool)
        };
        assert_eq!(got, [(0, 0, run(&first, &[2, 0, 2])), (1, 0, run(&second, &[1]))]);
    }
}
