//! The model that comes with the program: a small trained Mixtral, so that a cluster starts with nothing to download.
//!
//! It is part of the executable and is written to the user's cache once, because nodes read checkpoints from folders.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

macro_rules! bundled {
    ($($file:literal),* $(,)?) => {
        [$(($file, include_bytes!(concat!("../../models/demo/", $file)).as_slice())),*]
    };
}

/// File names and contents of the bundled checkpoint.
const FILES: [(&str, &[u8]); 7] = bundled![
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
];

/// The folder of the bundled checkpoint, written when it is not there yet.
pub(crate) fn folder() -> Result<PathBuf> {
    let folder = cache().join("sirocco").join(concat!("models-", env!("CARGO_PKG_VERSION"))).join("demo");
    write(&folder).with_context(|| {
        format!(
            "cannot write the bundled model to {}; set XDG_CACHE_HOME to a folder that can be written",
            folder.display()
        )
    })?;
    Ok(folder)
}

fn cache() -> PathBuf {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    set("XDG_CACHE_HOME").or_else(|| set("HOME").map(|home| home.join(".cache"))).unwrap_or_else(std::env::temp_dir)
}

/// Each file appears whole or not at all, also when two programs start at once.
fn write(folder: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(folder)?;
    for (name, contents) in FILES {
        let path = folder.join(name);
        if std::fs::read(&path).is_ok_and(|existing| existing == contents) {
            continue;
        }
        let mut file = tempfile::NamedTempFile::new_in(folder)?;
        file.write_all(contents)?;
        file.persist(path)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bundled_model_is_written_once_and_mended_when_damaged() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path()).unwrap();
        let weights = dir.path().join("model.safetensors");
        let written = std::fs::metadata(&weights).unwrap().modified().unwrap();
        std::fs::write(dir.path().join("config.json"), "{").unwrap();
        write(dir.path()).unwrap();
        assert_eq!(std::fs::metadata(&weights).unwrap().modified().unwrap(), written);
        assert_eq!(std::fs::read(dir.path().join("config.json")).unwrap(), FILES[1].1);
    }
}
