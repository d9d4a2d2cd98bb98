//! Memory that comes and goes with every message and every batch.

/// Keeps freed buffers of up to 32 MiB in the process, for the next ones.
///
/// By default the C library gives large buffers back to the system at once; taking them anew costs a page fault for each 4 KiB,
/// more than it costs to send them. At most 128 MiB stay unused at the end of the heap. Does nothing where the C library is not glibc.
pub fn keep_freed_buffers() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    for (parameter, bytes) in [(libc::M_MMAP_THRESHOLD, 32 << 20), (libc::M_TRIM_THRESHOLD, 128 << 20)] {
        // SAFETY: the call takes no pointers, locks the heap itself and leaves it as it is when it refuses a value.
        unsafe { libc::mallopt(parameter, bytes) };
    }
}
