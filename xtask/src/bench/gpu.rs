//! `cargo xtask bench gpu`: the kernels of experts and routers on one card over what the same card copies and multiplies.

use std::process::Command;

use anyhow::{Context as _, Result};

use super::figures::Figure;
use super::{bars, parts};
use crate::nvrtc;
use crate::programs::{self, WhenMissing};

/// Measures; fails, saying what is missing, where there is no GPU.
pub(super) fn run() -> Result<Vec<Figure>> {
    let found = programs::ensure(&["python3"], WhenMissing::Install)?;
    let library = nvrtc::ensure(&found, WhenMissing::Install)?;
    parts::build_dist(&["--package", "sirocco-compute", "--example", "gpu"])?;
    let mut command = Command::new(parts::built("examples/gpu")?);
    command.env(nvrtc::VARIABLE, library);
    if let Some(cublas) = std::env::var_os(CUBLAS) {
        command.env(CUBLAS, cublas);
    }
    let lines = parts::lines(&mut command).context("nothing was measured")?;
    Ok(parts::beside(lines, bars::GPU))
}

/// Names cuBLAS's library where the loader does not find it.
const CUBLAS: &str = "SIROCCO_CUBLAS";
