//! The memory of this process, and the files that the system keeps in it.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::path::Path;

use anyhow::{Context as _, Result};

/// Reads every file of `folder` once, so that the next reader finds it in memory.
pub(crate) fn cache_files(folder: &Path) -> Result<()> {
    let mut buffer = vec![0; 1 << 20];
    for entry in std::fs::read_dir(folder)? {
        let mut file = File::open(entry?.path())?;
        while file.read(&mut buffer)? > 0 {}
    }
    Ok(())
}

/// Uses `bytes` of memory and gives them back. The first use of memory on a virtual machine takes as long as its host likes;
/// what loads next does not wait for it.
pub(crate) fn touch(bytes: u64) {
    std::hint::black_box(vec![1_u8; bytes as usize]);
}

/// The most memory this process had at once since [`forget_peak`], in bytes.
pub(crate) fn peak() -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("VmHWM in /proc/self/status")?;
    let kib: u64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kib * 1024)
}

/// Lets [`peak`] begin anew. Source: proc_pid_clear_refs(5).
pub(crate) fn forget_peak() -> Result<()> {
    File::options().write(true).open("/proc/self/clear_refs")?.write_all(b"5").context("reset the peak of memory")
}
