//! What threads share.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks a mutex whose data stays meaningful even if a thread panicked while it held the lock.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
