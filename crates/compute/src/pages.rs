//! Memory for weights: in huge pages where the system has them, for reading gigabytes by small ones is slowed by looking
//! pages up.

#[cfg(target_os = "linux")]
mod regions;

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;

/// Bytes of a huge page.
const HUGE: usize = 2 << 20;
/// Bytes of a cache line, which is also the widest vector.
pub(crate) const LINE: usize = 64;

/// A fixed number of 32-bit words, zero at first, at a multiple of [`LINE`].
#[derive(Debug)]
pub(crate) struct Pages {
    data: NonNull<u32>,
    len: usize,
}

// SAFETY: it owns its memory like a `Box<[u32]>`.
unsafe impl Send for Pages {}
// SAFETY: shared, it is only read.
unsafe impl Sync for Pages {}

impl Pages {
    pub(crate) fn zeroed(len: usize) -> Self {
        let layout = Self::layout(len);
        let data = match layout.size() {
            0 => Some(NonNull::<u32>::dangling().cast()),
            #[cfg(target_os = "linux")]
            bytes if regions::holds(bytes) => regions::take(bytes),
            // SAFETY: the size is not zero.
            _ => NonNull::new(unsafe { alloc_zeroed(layout) }),
        };
        Self { data: data.unwrap_or_else(|| handle_alloc_error(layout)).cast(), len }
    }

    fn layout(len: usize) -> Layout {
        let bytes = len.checked_mul(size_of::<u32>());
        let layout = bytes.and_then(|bytes| Layout::from_size_align(bytes, LINE).ok());
        layout.expect("a matrix fits into the address space")
    }
}

impl std::ops::Deref for Pages {
    type Target = [u32];

    fn deref(&self) -> &[u32] {
        // SAFETY: `len` initialised words that are owned.
        unsafe { std::slice::from_raw_parts(self.data.as_ptr(), self.len) }
    }
}

impl std::ops::DerefMut for Pages {
    fn deref_mut(&mut self) -> &mut [u32] {
        // SAFETY: `len` initialised words that are owned, and borrowed by nobody else.
        unsafe { std::slice::from_raw_parts_mut(self.data.as_ptr(), self.len) }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        let layout = Self::layout(self.len);
        match layout.size() {
            0 => {}
            #[cfg(target_os = "linux")]
            // SAFETY: taken from there, as many bytes, and used by nobody any more.
            bytes if regions::holds(bytes) => unsafe { regions::give(self.data.cast(), bytes) },
            // SAFETY: allocated with this layout.
            _ => unsafe { dealloc(self.data.as_ptr().cast(), layout) },
        }
    }
}

/// Asks the system for huge pages where it will fill the `bytes` from `start` on. That it may not follow is no error.
///
/// SAFETY: they must be allocated.
pub(crate) unsafe fn prefer_huge(start: *mut u8, bytes: usize) {
    let skip = start.align_offset(HUGE);
    #[cfg(target_os = "linux")]
    if let Some(pages @ 1..) = bytes.checked_sub(skip).map(|bytes| bytes / HUGE) {
        // SAFETY: whole pages of what is allocated; the advice changes none of its contents.
        let _ = unsafe { rustix::mm::madvise(start.add(skip).cast(), pages * HUGE, rustix::mm::Advice::LinuxHugepage) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_aligned_zero_and_writable_whatever_its_size_and_who_had_it_before() {
        for _ in 0..3 {
            for len in [0, 1, 1000, HUGE / 4, HUGE / 4 * 3 + 7] {
                let mut pages = Pages::zeroed(len);
                assert_eq!(pages.len(), len);
                assert!(pages.iter().all(|&word| word == 0));
                assert!(len == 0 || pages.as_ptr().addr().is_multiple_of(LINE));
                pages.fill(7);
                assert!(pages.iter().all(|&word| word == 7));
            }
        }
    }

    #[test]
    fn threads_that_take_and_give_at_once_never_share_a_word() {
        std::thread::scope(|scope| {
            for thread in 0..4_u32 {
                scope.spawn(move || {
                    for round in 0..20 {
                        let mut pages: Vec<_> = (1..4).map(|n| Pages::zeroed(HUGE / 16 * n + round)).collect();
                        assert!(pages.iter().all(|pages| pages.iter().all(|&word| word == 0)));
                        for pages in &mut pages {
                            pages.fill(thread);
                        }
                        assert!(pages.iter().all(|pages| pages.iter().all(|&word| word == thread)));
                    }
                });
            }
        });
    }
}
