//! The memory of this process, and the files that the system keeps in it.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::Instant;

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

/// Reads every file of `folder` on `threads` threads into memory that was not used before, as plainly as can be: what loading
/// takes at least here. GiB per second.
pub(crate) fn plain_read(folder: &Path, threads: usize) -> Result<f64> {
    const AT_ONCE: usize = 256 << 10;
    let began = Instant::now();
    let mut kept = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let file = File::open(entry?.path())?;
        let mut bytes = vec![0; file.metadata()?.len() as usize];
        let share = bytes.len().div_ceil(threads).max(1);
        let read = |(index, part): (usize, &mut [u8])| -> std::io::Result<()> {
            let mut at = index * share;
            for part in part.chunks_mut(AT_ONCE) {
                file.read_exact_at(part, at as u64)?;
                at += part.len();
            }
            Ok(())
        };
        std::thread::scope(|scope| -> Result<()> {
            let threads: Vec<_> =
                bytes.chunks_mut(share).enumerate().map(|part| scope.spawn(move || read(part))).collect();
            threads.into_iter().try_for_each(|thread| Ok(thread.join().expect("reading does not panic")?))
        })?;
        kept.push(bytes);
    }
    let bytes: usize = kept.iter().map(Vec::len).sum();
    Ok(bytes as f64 / began.elapsed().as_secs_f64() / f64::from(1 << 30))
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
