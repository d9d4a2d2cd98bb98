//! Memory for weights: in huge pages where the system has them, for reading gigabytes by small ones is slowed by looking
//! pages up.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::ptr::NonNull;

/// Bytes of a huge page.
const HUGE: usize = 2 << 20;
/// Bytes of a cache line, which is also the widest vector.
const LINE: usize = 64;

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
        if layout.size() == 0 {
            return Self { data: NonNull::dangling(), len };
        }
        // SAFETY: the size is not zero.
        let Some(data) = NonNull::new(unsafe { alloc(layout) }) else { handle_alloc_error(layout) };
        #[cfg(target_os = "linux")]
        if layout.align() == HUGE {
            // SAFETY: whole pages of what was just allocated; the advice changes none of its contents. That the system may not
            // follow it is no error.
            let _ = unsafe {
                rustix::mm::madvise(
                    data.as_ptr().cast(),
                    layout.size() / HUGE * HUGE,
                    rustix::mm::Advice::LinuxHugepage,
                )
            };
        }
        // SAFETY: the allocation is `layout.size()` bytes long.
        unsafe { data.write_bytes(0, layout.size()) };
        Self { data: data.cast(), len }
    }

    fn layout(len: usize) -> Layout {
        let bytes = len.checked_mul(size_of::<u32>()).expect("a matrix fits into the address space");
        let align = if bytes >= HUGE { HUGE } else { LINE };
        Layout::from_size_align(bytes, align).expect("a matrix fits into the address space")
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
        if layout.size() > 0 {
            // SAFETY: allocated with this layout.
            unsafe { dealloc(self.data.as_ptr().cast(), layout) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_aligned_zero_and_writable_whatever_its_size() {
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
