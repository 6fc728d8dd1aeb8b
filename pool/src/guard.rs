//! Calls into the backend from where a panic would take the pool with it: its loop, and its lock.

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};

thread_local! {
    /// Panics that were met, to be told when no lock is held.
    static PANICS: RefCell<Vec<&'static str>> = const { RefCell::new(Vec::new()) };
}

/// What `call` returns; none if the backend panicked in it, which is logged once the pool's lock is free.
pub(crate) fn guarded<T>(what: &'static str, call: impl FnOnce() -> T) -> Option<T> {
    let returned = catch_unwind(AssertUnwindSafe(call));
    if returned.is_err() {
        // A thread that ends has no place for it any more.
        let _ = PANICS.try_with(|panics| panics.borrow_mut().push(what));
    }
    returned.ok()
}

/// Logs the panics that this thread has met.
pub(crate) fn tell() {
    let panics = PANICS.try_with(|panics| std::mem::take(&mut *panics.borrow_mut()));
    for what in panics.unwrap_or_default() {
        tracing::error!(what, "the backend panicked");
    }
}
