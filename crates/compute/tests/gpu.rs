//! What only a GPU can show. `cargo xtask gpu-check` runs these; where there is none, they fail and say what is missing.

use std::path::PathBuf;

use half::bf16;
use sirocco_compute::{
    Batch, CpuBackend, CudaBackend, DeviceError, ExpertBackend, ExpertMatrix, ExpertWeights, KernelSettings, Part, Pool,
};
use sirocco_types::ExpertDtype;

const DTYPES: [ExpertDtype; 3] = [ExpertDtype::Bf16, ExpertDtype::Int8, ExpertDtype::Int4];

/// How far a result may be from the CPU's, over the largest of its row. With quantised weights the CPU has activations of 8 bits.
fn tolerance(dtype: ExpertDtype) -> f32 {
    if dtype == ExpertDtype::Bf16 { 1e-3 } else { 0.03 }
}

/// Hidden and intermediate size of Mixtral 8x7B.
const MIXTRAL: (usize, usize) = (4096, 14_336);

fn gpu(dtype: ExpertDtype, shape: (usize, usize)) -> CudaBackend {
    let settings = KernelSettings { nvrtc: std::env::var_os("SIROCCO_NVRTC").map(PathBuf::from), cache: None };
    CudaBackend::open(0, &settings, dtype, shape).unwrap_or_else(|error| panic!("{error}"))
}

fn cpu(dtype: ExpertDtype, (hidden_size, intermediate_size): (usize, usize)) -> CpuBackend {
    CpuBackend { pool: Pool::new(2).unwrap(), dtype, hidden_size, intermediate_size }
}

/// Numbers of -1 to 1 that follow from `seed`.
fn numbers(seed: usize) -> impl Iterator<Item = f32> {
    let mut state = seed as u64 + 1;
    std::iter::repeat_with(move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    })
}

/// An expert whose weights follow from `seed`, so scaled that results are near 1.
fn expert(backend: &dyn ExpertBackend, seed: usize) -> Result<ExpertWeights, DeviceError> {
    let mut packer = backend.packer()?;
    for matrix in ExpertMatrix::ALL {
        let (outputs, inputs) = packer.shape(matrix);
        let scale = 2.0 / (inputs as f32).sqrt();
        let values =
            numbers(seed * 3 + matrix as usize).take(outputs * inputs).map(|value| bf16::from_f32(value * scale));
        packer.push_rows(matrix, &values.flat_map(bf16::to_le_bytes).collect::<Vec<u8>>());
    }
    packer.finish()
}

/// The results of `parts`, experts with their rows: `[rows, hidden]` of each.
fn run(backend: &dyn ExpertBackend, hidden: usize, parts: &[(&ExpertWeights, Vec<usize>)]) -> Vec<Vec<f32>> {
    let append = |row: usize, out: &mut Vec<f32>| out.extend(numbers(1000 + row).take(hidden));
    let mut outputs: Vec<Vec<f32>> = parts.iter().map(|(_, rows)| vec![f32::NAN; rows.len() * hidden]).collect();
    let parts: Vec<Part> = parts.iter().map(|(weights, rows)| Part { weights, rows: rows.clone() }).collect();
    let mut done = |part: usize, first: usize, rows: &[f32]| {
        outputs[part][first * hidden..][..rows.len()].copy_from_slice(rows);
    };
    backend.run(&Batch { append: &append, parts: &parts }, &mut done).unwrap();
    outputs
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Compares the results of as many experts as `rows` has numbers of rows.
fn compare(dtype: ExpertDtype, shape: (usize, usize), rows: &[usize]) {
    let (gpu, cpu) = (gpu(dtype, shape), cpu(dtype, shape));
    let results = |backend: &dyn ExpertBackend| {
        let experts: Vec<ExpertWeights> = (0..rows.len()).map(|seed| expert(backend, seed).unwrap()).collect();
        let rows =
            rows.iter().enumerate().map(|(part, &count)| (0..count).map(|row| (row * 7 + part * 3) % 64).collect());
        run(backend, shape.0, &experts.iter().zip(rows).collect::<Vec<_>>())
    };
    for (part, (got, want)) in results(&gpu).iter().zip(&results(&cpu)).enumerate() {
        for (row, (got, want)) in got.chunks(shape.0).zip(want.chunks(shape.0)).enumerate() {
            let largest = want.iter().fold(0.0_f32, |most, value| most.max(value.abs()));
            let near = got.iter().zip(want).all(|(got, want)| (got - want).abs() <= largest * tolerance(dtype));
            assert!(near, "{dtype} {shape:?}: expert {part}, row {row}: {got:?}, not {want:?}");
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU: cargo xtask gpu-check"]
fn small_shapes_are_computed_as_the_cpu_does_it() {
    for dtype in DTYPES {
        for shape in [(64, 128), (40, 24), (136, 584), (256, 320)] {
            compare(dtype, shape, &[1, 0, 3, 17, 33, 64, 129]);
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU: cargo xtask gpu-check"]
fn mixtrals_shape_is_computed_as_the_cpu_does_it() {
    for dtype in DTYPES {
        compare(dtype, MIXTRAL, &[1, 40]);
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU: cargo xtask gpu-check"]
fn a_row_has_the_same_bits_alone_and_among_4096_and_beside_other_experts() {
    for (dtype, shape) in DTYPES.into_iter().flat_map(|dtype| [(dtype, MIXTRAL), (dtype, (136, 584))]) {
        let gpu = gpu(dtype, shape);
        let (first, second) = (expert(&gpu, 1).unwrap(), expert(&gpu, 2).unwrap());
        let together = run(&gpu, shape.0, &[(&first, (0..4096).collect()), (&second, (0..777).collect())]);
        for count in [1, 2, 7, 8, 9, 16, 31, 32, 33, 100, 128, 129, 500] {
            for start in [0, 5, 1000] {
                let rows: Vec<usize> = (start..start + count).collect();
                let alone = run(&gpu, shape.0, &[(&second, vec![3]), (&first, rows)]);
                let among = &together[0][start * shape.0..][..count * shape.0];
                assert!(bits(&alone[1]) == bits(among), "{dtype} {shape:?}: {count} rows from {start} on");
            }
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU: cargo xtask gpu-check"]
fn a_batch_of_many_waves_comes_whole_and_rows_may_be_wanted_twice() {
    let gpu = gpu(ExpertDtype::Bf16, (64, 128));
    let experts: Vec<ExpertWeights> = (0..3).map(|seed| expert(&gpu, seed).unwrap()).collect();
    let rows: Vec<usize> = (0..9000).map(|i| i % 500).collect();
    let parts: Vec<(&ExpertWeights, Vec<usize>)> = experts.iter().map(|expert| (expert, rows.clone())).collect();
    for (part, output) in run(&gpu, 64, &parts).iter().enumerate() {
        let alone = &run(&gpu, 64, &[(&experts[part], (0..500).collect())])[0];
        for (place, output) in output.chunks(500 * 64).enumerate() {
            assert!(bits(output) == bits(&alone[..output.len()]), "expert {part}, rows from {} on", place * 500);
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU: cargo xtask gpu-check"]
fn a_full_gpu_refuses_one_more_expert_by_numbers_and_goes_on() {
    let gpu = gpu(ExpertDtype::Bf16, MIXTRAL);
    let first = expert(&gpu, 1).unwrap();
    let before = run(&gpu, MIXTRAL.0, &[(&first, vec![0, 1, 2])]);
    let mut packers = Vec::new();
    let error = loop {
        match gpu.packer() {
            Ok(packer) => packers.push(packer),
            Err(error) => break error,
        }
    };
    assert!(matches!(&error, DeviceError::OutOfMemory { bytes, .. } if *bytes == first.bytes()), "{error}");
    assert_eq!(run(&gpu, MIXTRAL.0, &[(&first, vec![0, 1, 2])]), before);
    let room = gpu.capacity_bytes().unwrap() / first.bytes() as u64;
    assert!(packers.len() as u64 + 1 >= room, "{} experts fit, {room} were announced", packers.len() + 1);
    drop(packers);
    expert(&gpu, 2).unwrap();
}

#[test]
#[ignore = "needs an NVIDIA GPU: cargo xtask gpu-check"]
fn a_gpu_says_what_it_is_and_how_it_fares() {
    let gpu = gpu(ExpertDtype::Bf16, (64, 128));
    assert_eq!((gpu.kind(), gpu.name().is_empty()), ("cuda", false));
    let readings = gpu.readings().expect("the driver's management library is there");
    assert!((0.0..=1.0).contains(&readings.utilisation) && readings.memory_bytes > 0, "{readings:?}");
    assert!((1.0..150.0).contains(&readings.temperature_celsius), "{readings:?}");
}
