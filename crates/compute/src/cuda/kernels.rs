//! The kernels: their source, compiled at start for the GPU that is there, and kept on disk for the next start.
//!
//! A file of the cache is named after the architecture and the hash of the source and how it is compiled, and begins with a line that has the checksum of the
//! rest. It is written beside its place and renamed, so that several processes may start at once; one that is damaged is
//! compiled again. Where it cannot be written, nothing is lost but time.

use std::collections::HashMap;
use std::fs;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sirocco_types::ExpertDtype;

use super::error::DeviceError;
use super::gpu::{Gpu, Kernel, Module};
use super::layout::TILE;
use super::nvrtc::{self, Compiler};

/// All kernels.
pub(super) const SOURCE: &str = concat!(
    include_str!("kernels/ptx.cu"),
    include_str!("kernels/ffn.cu"),
    include_str!("kernels/router.cu"),
    include_str!("kernels/attention.cu"),
    include_str!("kernels/sampling.cu")
);

/// What the kernels' source says too.
pub(super) const THREADS: usize = 256;
/// Of a block that draws.
pub(super) const DRAW_THREADS: usize = 1024;
/// Tiles of outputs that a block of threads of the kernels for many rows computes.
pub(super) const MANY_TILES: usize = 8;
/// Rows that it has in shared memory.
const MANY_ROWS: usize = super::plan::MANY_ROWS;
const STAGES: usize = 2;

/// Where kernels come from, and how they are launched.
#[derive(Clone, Debug, Default)]
pub struct KernelSettings {
    /// NVRTC's shared library; without one, the loader's.
    pub nvrtc: Option<PathBuf>,
    /// The folder for compiled kernels; without one, nothing is kept.
    pub cache: Option<PathBuf>,
    /// Whether all are launched one by one, and none as graphs.
    pub no_graphs: bool,
}

/// The kernels of an expert's two halves, for experts kept as one dtype.
#[derive(Debug)]
pub(super) struct Kernels {
    /// `gate_up_few`, `gate_up_many`, `linear_few` and `linear_many`.
    pub(super) by_shape: HashMap<&'static str, Kernel>,
    /// Keeps them loaded.
    _module: Module,
}

impl Kernels {
    /// Those for experts kept as `dtype`.
    pub(super) fn load(gpu: &Arc<Gpu>, settings: &KernelSettings, dtype: ExpertDtype) -> Result<Self, DeviceError> {
        let module = load(gpu, settings)?;
        let many = shared_bytes(dtype);
        let kernel = |(shape, shared)| {
            let kernel = module.kernel(&format!("{shape}_{dtype}"), THREADS as u32, shared)?;
            Ok((shape, kernel))
        };
        let shapes = [("gate_up_few", 0), ("gate_up_many", many), ("linear_few", 0), ("linear_many", many)];
        let by_shape = shapes.into_iter().map(kernel).collect::<Result<_, DeviceError>>()?;
        Ok(Self { by_shape, _module: module })
    }
}

/// All kernels, compiled when the cache has none.
pub(super) fn load(gpu: &Arc<Gpu>, settings: &KernelSettings) -> Result<Module, DeviceError> {
    let architecture = gpu.architecture();
    let key = format!("{:?}{SOURCE}", nvrtc::options(&architecture));
    let image = cached(settings.cache.as_deref(), &key, &architecture, || {
        Compiler::open(settings.nvrtc.as_deref())?.compile(SOURCE, &architecture)
    })?;
    gpu.load(&image)
}

/// Shared memory of the kernels for many rows, bytes: of each stage the weights and scales of its tiles, and its rows.
pub(super) fn shared_bytes(dtype: ExpertDtype) -> usize {
    let weights = super::layout::tile_block_bytes(dtype);
    STAGES * (MANY_TILES * weights + MANY_ROWS * super::layout::row_bytes(super::layout::BLOCK))
}

/// Blocks of threads that `tiles` of outputs take, for the kernels for few rows (one tile, of the gate both halves) and many.
pub(super) fn grid_y(tiles: u32, gated: bool) -> (usize, usize) {
    let tiles = tiles as usize;
    (if gated { tiles / 2 } else { tiles }, tiles.div_ceil(MANY_TILES))
}

/// The machine code of what is named `source` for `architecture`, from `folder` or from `compile`.
fn cached(
    folder: Option<&Path>,
    source: &str,
    architecture: &str,
    compile: impl FnOnce() -> Result<Vec<u8>, DeviceError>,
) -> Result<Vec<u8>, DeviceError> {
    let file = folder.map(|folder| folder.join(format!("{:016x}-{architecture}.cubin", hash(source.as_bytes()))));
    if let Some(image) = file.as_deref().and_then(read) {
        return Ok(image);
    }
    let image = compile()?;
    if let Some(file) = file {
        // What cannot be kept is compiled again.
        let _ = write(&file, &image);
    }
    Ok(image)
}

fn hash(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    hasher.finish()
}

/// What a file of the cache has after its first line, when that fits.
fn read(file: &Path) -> Option<Vec<u8>> {
    let bytes = fs::read(file).ok()?;
    let (head, image) = bytes.split_at_checked(HEAD)?;
    (head == head_of(image).as_bytes()).then(|| image.to_vec())
}

/// Bytes of the first line.
const HEAD: usize = 17;

fn head_of(image: &[u8]) -> String {
    format!("{:016x}\n", hash(image))
}

fn write(file: &Path, image: &[u8]) -> std::io::Result<()> {
    let Some(folder) = file.parent() else { return Ok(()) };
    fs::create_dir_all(folder)?;
    let new = file.with_extension(format!("{}.new", std::process::id()));
    fs::write(&new, [head_of(image).as_bytes(), image].concat())?;
    fs::rename(&new, file).inspect_err(|_| {
        let _ = fs::remove_file(&new);
    })
}

// Of every kernel a row of outputs is a row of a tensor core's result.
const _: () = assert!(TILE == 16);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::router::KERNELS as ROUTER;

    const DTYPES: [ExpertDtype; 3] = [ExpertDtype::Bf16, ExpertDtype::Int8, ExpertDtype::Int4];

    #[test]
    fn what_was_compiled_is_not_compiled_again_unless_it_is_damaged_or_something_else() {
        let folder = std::env::temp_dir().join(format!("sirocco-kernels-{}", std::process::id()));
        let compiled = std::cell::Cell::new(0);
        let get = |source: &str, architecture: &str| {
            let compile = || {
                compiled.set(compiled.get() + 1);
                Ok(format!("{source} for {architecture}").into_bytes())
            };
            String::from_utf8(cached(Some(&folder), source, architecture, compile).unwrap()).unwrap()
        };
        assert_eq!((get("a", "sm_90"), compiled.get()), ("a for sm_90".into(), 1));
        assert_eq!((get("a", "sm_90"), compiled.get()), ("a for sm_90".into(), 1));
        assert_eq!((get("a", "sm_80"), compiled.get()), ("a for sm_80".into(), 2));
        assert_eq!((get("b", "sm_90"), compiled.get()), ("b for sm_90".into(), 3));
        for file in fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()) {
            let mut bytes = fs::read(&file).unwrap();
            *bytes.last_mut().unwrap() ^= 1;
            fs::write(&file, &bytes).unwrap();
        }
        assert_eq!((get("a", "sm_90"), compiled.get()), ("a for sm_90".into(), 4));
        assert_eq!((get("a", "sm_90"), compiled.get()), ("a for sm_90".into(), 4));
        for file in fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()) {
            fs::write(&file, "").unwrap();
        }
        assert_eq!((get("b", "sm_90"), compiled.get()), ("b for sm_90".into(), 5));
        fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn a_failed_compilation_is_said_and_not_kept() {
        let error = DeviceError::Compile { architecture: "sm_90".into(), log: "no".into() };
        let folder = std::env::temp_dir().join(format!("sirocco-no-kernels-{}", std::process::id()));
        assert_eq!(cached(Some(&folder), "a", "sm_90", || Err(error.clone())), Err(error));
        assert!(!folder.exists());
    }

    #[test]
    fn shared_memory_suffices_on_every_gpu_with_these_instructions() {
        // 99 KiB is what compute capability 8.6, 8.9 and 12.0 have.
        for dtype in DTYPES {
            assert!(shared_bytes(dtype) <= 99 << 10, "{dtype}: {}", shared_bytes(dtype));
        }
    }

    /// The libraries of NVIDIA that `cargo xtask test` installs; without them this test is skipped, which it says.
    #[test]
    fn every_kernel_compiles_for_every_architecture() {
        let file = std::env::var_os("SIROCCO_NVRTC").map(PathBuf::from);
        let compiler = match Compiler::open(file.as_deref()) {
            Ok(compiler) => compiler,
            Err(error) if file.is_none() => {
                eprintln!("SKIPPED: kernels were not compiled: {error}; `cargo xtask test` installs it");
                return;
            }
            Err(error) => panic!("SIROCCO_NVRTC: {error}"),
        };
        for architecture in ["sm_80", "sm_90", "sm_100"] {
            let image = compiler.compile(SOURCE, architecture).unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(&image[..4], b"\x7fELF", "{architecture}");
            let shapes = ["gate_up_few", "gate_up_many", "linear_few", "linear_many"];
            let of_experts = shapes.iter().flat_map(|shape| DTYPES.map(|dtype| format!("{shape}_{dtype}")));
            let of_routers = ROUTER.iter().map(|name| (*name).to_owned());
            for name in of_experts.chain(of_routers).map(|name| format!(".text.{name}\0")) {
                assert!(image.windows(name.len()).any(|part| part == name.as_bytes()), "{architecture}: {name}");
            }
        }
        let error = compiler.compile("__global__ void broken() { nothing(); }", "sm_90").unwrap_err();
        assert!(error.to_string().contains("nothing"), "{error}");
    }
}
