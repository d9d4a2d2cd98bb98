//! Checkpoints of which a file is damaged.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};

/// How a file is damaged.
#[derive(Clone, Copy, Debug)]
pub enum Damage {
    /// Only so many of a hundred parts of it are there.
    Truncated(u64),
    /// The bit at this offset is flipped.
    Flipped(u64),
}

/// Makes `copy` a folder with the files of `checkpoint`, which are linked, but for `file`, which is copied and damaged.
pub fn damaged(checkpoint: &Path, copy: &Path, file: &str, damage: Damage) -> Result<()> {
    fs::create_dir(copy).with_context(|| copy.display().to_string())?;
    for entry in fs::read_dir(checkpoint).with_context(|| checkpoint.display().to_string())? {
        let entry = entry?;
        if entry.file_name() != file {
            std::os::unix::fs::symlink(fs::canonicalize(entry.path())?, copy.join(entry.file_name()))?;
        }
    }
    let mut bytes = fs::read(checkpoint.join(file)).with_context(|| file.to_owned())?;
    let len = bytes.len() as u64;
    match damage {
        Damage::Truncated(percent) => bytes.truncate((len * percent / 100) as usize),
        Damage::Flipped(bit) => {
            ensure!(bit / 8 < len, "bit {bit} of {file}, which has {len} bytes");
            bytes[(bit / 8) as usize] ^= 1 << (bit % 8);
        }
    }
    Ok(fs::write(copy.join(file), bytes)?)
}
