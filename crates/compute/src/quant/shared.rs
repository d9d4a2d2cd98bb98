//! A slice whose parts are written by different threads.

use std::marker::PhantomData;

/// A slice that is only written to, in disjoint parts.
pub(super) struct Shared<'a, T> {
    data: *mut T,
    len: usize,
    slice: PhantomData<&'a mut [T]>,
}

// SAFETY: the only access is `write`, whose callers promise disjoint parts.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T: Copy> Shared<'a, T> {
    pub(super) fn new(slice: &'a mut [T]) -> Self {
        Self { data: slice.as_mut_ptr(), len: slice.len(), slice: PhantomData }
    }

    /// Writes `values` from `start` on. Panics when they do not fit.
    ///
    /// SAFETY: no other thread may write the same elements.
    pub(super) unsafe fn write(&self, start: usize, values: &[T]) {
        assert!(start <= self.len && values.len() <= self.len - start, "a part lies within the whole");
        // SAFETY: within the slice, as just checked; disjoint from other writes by this function's contract.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), self.data.add(start), values.len()) };
    }
}
