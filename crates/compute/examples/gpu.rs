//! Measures the kernels of experts and routers on `cuda:0` against the same card's copies and matrix multiplications, in one process.
//!
//! `cargo run --release -p sirocco-compute --example gpu [probe]` prints one JSON object a line: `{"name", "measured", "floor",
//! "unit"}`; with `probe`, the GPU's name alone. NVRTC's library may be named by `SIROCCO_NVRTC`, cuBLAS's by `SIROCCO_CUBLAS`. Ends
//! with status 1 and says what is missing where there is no GPU.

use std::ffi::{c_int, c_void};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use cudarc::driver::result;
use libloading::Library;
use sirocco_compute::{
    Batch, CudaBackend, DeviceError, ExpertBackend, ExpertMatrix, ExpertPacker, ExpertWeights, KernelSettings, Part,
};
use sirocco_types::ExpertDtype;

mod routers;

/// Of Mixtral 8x7B.
const HIDDEN: usize = 4096;
const INTER: usize = 14_336;
const EXPERTS: usize = 8;
/// Multiply-adds, counted as two, of one row of one expert.
const FLOPS: f64 = 6.0 * HIDDEN as f64 * INTER as f64;
/// Times that each is measured, of which the best counts, and runs of each time.
const ROUNDS: usize = 5;
const RUNS: u32 = 20;
/// Bytes of a copy: more than caches hold.
const COPY: usize = 1 << 30;
/// Rows and columns of the matrices that show the peak.
const PEAK: c_int = 8192;

type Failure = Box<dyn std::error::Error>;

fn main() -> ExitCode {
    let probe = std::env::args().nth(1).is_some_and(|argument| argument == "probe");
    match if probe { name() } else { measure() } {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("no GPU can be measured: {error}");
            ExitCode::FAILURE
        }
    }
}

fn open(dtype: ExpertDtype, shape: (usize, usize)) -> Result<CudaBackend, DeviceError> {
    let settings = KernelSettings { nvrtc: std::env::var_os("SIROCCO_NVRTC").map(PathBuf::from), ..Default::default() };
    CudaBackend::open(0, &settings, dtype, shape)
}

fn name() -> Result<(), Failure> {
    println!("{}", open(ExpertDtype::Bf16, (64, 64))?.name());
    Ok(())
}

fn measure() -> Result<(), Failure> {
    // Opened first: it sees whether there is a driver, makes the GPU's context this thread's, and keeps it.
    let gpu = open(ExpertDtype::Bf16, (HIDDEN, INTER))?;
    let copy = copies()?;
    print("copy bandwidth", copy, copy, "GB/s");
    let peak = peak()?;
    print("bf16 peak (cuBLAS)", peak, peak, "TFLOP/s");
    shapes(&gpu, ExpertDtype::Bf16, copy, peak)?;
    drop(gpu);
    for dtype in [ExpertDtype::Int8, ExpertDtype::Int4] {
        shapes(&open(dtype, (HIDDEN, INTER))?, dtype, copy, peak)?;
    }
    routers::measure(copy, peak)
}

/// Rows of each number for one expert, and mixes.
fn shapes(gpu: &CudaBackend, dtype: ExpertDtype, copy: f64, peak: f64) -> Result<(), Failure> {
    let experts: Vec<ExpertWeights> = (0..EXPERTS).map(|_| expert(gpu)).collect::<Result<_, _>>()?;
    for rows in [1, 2, 4, 8, 64, 512, 4096] {
        let seconds = time(gpu, &experts, &[rows])?;
        let name = format!("gpu expert ffn {dtype}, {rows} row{}", if rows == 1 { "" } else { "s" });
        if rows <= 64 {
            print(&name, experts[0].bytes() as f64 / seconds / 1e9, copy, "GB/s");
        } else {
            print(&name, rows as f64 * FLOPS / seconds / 1e12, peak, "TFLOP/s");
        }
    }
    // The same rows, evenly and not: 8 experts with 2048 rows in all, and a step of decoding.
    let even = time(gpu, &experts, &[256; EXPERTS])?;
    let uneven = time(gpu, &experts, &[1024, 512, 256, 128, 64, 32, 24, 8])?;
    print(&format!("gpu uneven mix {dtype}"), 1.0 / uneven, 1.0 / even, "batches/s");
    let decode = time(gpu, &experts, &[1, 2, 4, 8, 3, 0, 5, 1])?;
    let bytes = 7.0 * experts[0].bytes() as f64;
    print(&format!("gpu decode mix {dtype}"), bytes / decode / 1e9, copy, "GB/s");
    // With the copies on both sides, as a node does it.
    let (since, seconds) = (Instant::now(), decode);
    for _ in 0..RUNS {
        with_batch(&experts, &[1, 2, 4, 8, 3, 0, 5, 1], |batch| gpu.run(batch, &mut |_, _, _| {}))?;
    }
    let whole = since.elapsed().as_secs_f64() / f64::from(RUNS);
    print(&format!("gpu decode mix {dtype}, host to host"), 1.0 / whole, 1.0 / seconds, "batches/s");
    Ok(())
}

/// Runs `run` on a batch of so many rows for each expert.
fn with_batch<T>(experts: &[ExpertWeights], rows: &[usize], run: impl FnOnce(&Batch) -> T) -> T {
    let append = |row: usize, out: &mut Vec<f32>| out.extend((0..HIDDEN).map(|i| ((row + i) % 97) as f32 / 97.0 - 0.5));
    let parts = experts.iter().zip(rows).map(|(weights, &rows)| Part { weights, rows: (0..rows).collect() });
    run(&Batch { append: &append, parts: &parts.collect::<Vec<_>>() })
}

/// Seconds that kernels take for so many rows of each expert.
fn time(gpu: &CudaBackend, experts: &[ExpertWeights], rows: &[usize]) -> Result<f64, DeviceError> {
    let mut best = f64::INFINITY;
    for _ in 0..ROUNDS {
        let time = with_batch(experts, rows, |batch| gpu.kernel_time(batch, RUNS))?;
        best = best.min(time.as_secs_f64());
    }
    Ok(best)
}

/// Small weights of both signs.
fn expert(gpu: &CudaBackend) -> Result<ExpertWeights, DeviceError> {
    let mut packer = gpu.packer()?;
    let mut state = 7_u64;
    for matrix in ExpertMatrix::ALL {
        let (outputs, inputs) = packer.shape(matrix);
        let value = |_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 63 << 15 | 0x3c00 | state >> 57) as u16).to_le_bytes()
        };
        let rows: Vec<u8> = (0..ExpertPacker::ROWS * inputs).flat_map(value).collect();
        for _ in 0..outputs / ExpertPacker::ROWS {
            packer.push_rows(matrix, &rows);
        }
    }
    packer.finish()
}

/// Bytes read and written per second, 10^9, by copies within the GPU's memory.
fn copies() -> Result<f64, Failure> {
    let failed = |error: result::DriverError| format!("a copy: {error:?}");
    // SAFETY: the driver is there and this thread has a context, for a GPU is open; both buffers are as large as what is
    // copied, and are freed after all has been waited for.
    unsafe {
        let (from, to) = (result::malloc_sync(COPY).map_err(failed)?, result::malloc_sync(COPY).map_err(failed)?);
        let mut best = f64::INFINITY;
        for _ in 0..ROUNDS {
            result::ctx::synchronize().map_err(failed)?;
            let since = Instant::now();
            for _ in 0..RUNS {
                result::memcpy_dtod_async(to, from, COPY, result::stream::null()).map_err(failed)?;
            }
            result::ctx::synchronize().map_err(failed)?;
            best = best.min(since.elapsed().as_secs_f64() / f64::from(RUNS));
        }
        result::free_sync(from).map_err(failed)?;
        result::free_sync(to).map_err(failed)?;
        Ok(2.0 * COPY as f64 / best / 1e9)
    }
}

/// Multiplications and additions per second, 10^12, of cuBLAS: bf16 with f32 sums.
fn peak() -> Result<f64, Failure> {
    type Handle = *mut c_void;
    type Create = unsafe extern "C" fn(*mut Handle) -> c_int;
    type Gemm = unsafe extern "C" fn(
        Handle,
        c_int,
        c_int,
        c_int,
        c_int,
        c_int,
        *const c_void,
        *const c_void,
        c_int,
        c_int,
        *const c_void,
        c_int,
        c_int,
        *const c_void,
        *mut c_void,
        c_int,
        c_int,
        c_int,
        c_int,
    ) -> c_int;
    // cublasOperation_t, cudaDataType_t, cublasComputeType_t and cublasGemmAlgo_t.
    const TRANSPOSED: c_int = 1;
    const AS_IS: c_int = 0;
    const BF16: c_int = 14;
    const COMPUTE_32F: c_int = 68;
    const DEFAULT: c_int = -1;
    let named = std::env::var_os("SIROCCO_CUBLAS").map(PathBuf::from);
    let names = named.map_or_else(
        || ["libcublas.so.12", "libcublas.so.13", "libcublas.so"].map(PathBuf::from).to_vec(),
        |file| vec![file],
    );
    // SAFETY: NVIDIA's library; its functions are declared as its header has them.
    let library = names.iter().find_map(|name| unsafe { Library::new(name) }.ok());
    let library = library.ok_or(
        "libcublas.so.12 not found: `pip install nvidia-cublas-cu12` brings it; SIROCCO_CUBLAS names the file",
    )?;
    let check = |status: c_int| if status == 0 { Ok(()) } else { Err(format!("cuBLAS: status {status}")) };
    let driver = |error: result::DriverError| format!("the peak: {error:?}");
    let bytes = (PEAK * PEAK * 2) as usize;
    // SAFETY: as above; the matrices are as large as the sizes say, zero, and freed after all has been waited for.
    unsafe {
        let create: libloading::Symbol<Create> = library.get("cublasCreate_v2")?;
        let gemm: libloading::Symbol<Gemm> = library.get("cublasGemmEx")?;
        let mut handle = std::ptr::null_mut();
        check(create(&raw mut handle))?;
        let matrix = || -> Result<u64, result::DriverError> {
            let matrix = result::malloc_sync(bytes)?;
            // bf16 0x3c3c, a small number: zeros would take less power, and clocks would be higher than in earnest.
            result::memset_d8_sync(matrix, 0x3c, bytes)?;
            Ok(matrix)
        };
        let (a, b, c) = (matrix().map_err(driver)?, matrix().map_err(driver)?, matrix().map_err(driver)?);
        let (one, zero) = (1.0_f32, 0.0_f32);
        let run = || {
            check(gemm(
                handle,
                TRANSPOSED,
                AS_IS,
                PEAK,
                PEAK,
                PEAK,
                (&raw const one).cast(),
                a as *const c_void,
                BF16,
                PEAK,
                b as *const c_void,
                BF16,
                PEAK,
                (&raw const zero).cast(),
                c as *mut c_void,
                BF16,
                PEAK,
                COMPUTE_32F,
                DEFAULT,
            ))
        };
        run()?;
        let mut best = f64::INFINITY;
        for _ in 0..ROUNDS {
            result::ctx::synchronize().map_err(driver)?;
            let since = Instant::now();
            for _ in 0..RUNS {
                run()?;
            }
            result::ctx::synchronize().map_err(driver)?;
            best = best.min(since.elapsed().as_secs_f64() / f64::from(RUNS));
        }
        for matrix in [a, b, c] {
            result::free_sync(matrix).map_err(driver)?;
        }
        Ok(2.0 * f64::from(PEAK).powi(3) / best / 1e12)
    }
}

fn print(name: &str, measured: f64, floor: f64, unit: &str) {
    println!(r#"{{"name":"{name}","measured":{measured:.2},"floor":{floor:.2},"unit":"{unit}"}}"#);
}
