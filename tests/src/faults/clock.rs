//! A process's clock, which jumps while it runs, by way of `libfaketime`: what it reads as the time of day, not what it measures
//! waits with.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use tempfile::TempDir;

/// The time of day as some processes see it.
#[derive(Debug)]
pub struct Clock {
    folder: TempDir,
    library: String,
}

impl Clock {
    /// A clock that is right. A missing libfaketime is a failure that says how to install it.
    pub fn new() -> Result<Self> {
        let library = library()?.to_str().context("the library's path is UTF-8")?.to_owned();
        let clock = Self { folder: tempfile::tempdir()?, library };
        clock.jump(0)?;
        Ok(clock)
    }

    /// What to set for processes that are to have this clock.
    pub fn envs(&self) -> Result<Vec<(&'static str, String)>> {
        let file = self.file().to_str().context("test paths are UTF-8")?.to_owned();
        Ok(vec![
            ("LD_PRELOAD", self.library.clone()),
            ("FAKETIME_TIMESTAMP_FILE", file),
            ("FAKETIME_CACHE_DURATION", "1".to_owned()),
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1".to_owned()),
            ("FAKETIME_DONT_RESET", "1".to_owned()),
        ])
    }

    /// Puts it `seconds` before or after the right time; processes see it within a second.
    pub fn jump(&self, seconds: i64) -> Result<()> {
        // In one piece: a process may read it at any time.
        let new = self.folder.path().join("new");
        fs::write(&new, format!("{seconds:+}\n"))?;
        Ok(fs::rename(&new, self.file())?)
    }

    fn file(&self) -> PathBuf {
        self.folder.path().join("time")
    }
}

/// `SIROCCO_FAKETIME_LIB`, or where Debian's package puts it.
fn library() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("SIROCCO_FAKETIME_LIB") {
        return Ok(path.into());
    }
    let folder = format!("/usr/lib/{}-linux-gnu/faketime/libfaketimeMT.so.1", std::env::consts::ARCH);
    let path = Path::new(&folder);
    path.is_file().then(|| path.to_owned()).with_context(|| format!("{folder} is missing (apt-get install faketime)"))
}
