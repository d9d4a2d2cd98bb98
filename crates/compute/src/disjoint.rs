//! One output that several threads write, each its own part.

use std::marker::PhantomData;

/// A slice whose parts are handed to different threads.
pub(crate) struct Disjoint<'a, T> {
    data: *mut T,
    len: usize,
    borrowed: PhantomData<&'a mut [T]>,
}

// SAFETY: the only access is `slice`, whose callers promise that no two of them hold the same element.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    pub(crate) fn new(out: &'a mut [T]) -> Self {
        Self { data: out.as_mut_ptr(), len: out.len(), borrowed: PhantomData }
    }

    /// The `len` elements from `start` on. Panics when there are fewer.
    ///
    /// SAFETY: no element of it may be in another slice that is still held.
    #[expect(clippy::mut_from_ref, reason = "that no two slices overlap is the caller's promise")]
    pub(crate) unsafe fn slice(&self, start: usize, len: usize) -> &mut [T] {
        assert!(len <= self.len && start <= self.len - len, "{len} elements at {start} of {}", self.len);
        // SAFETY: within the slice this was made from, as just checked, and held by nobody else.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(start), len) }
    }
}
