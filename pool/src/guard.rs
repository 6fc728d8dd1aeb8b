//! Calls into the backend from where a panic would take the pool with it: its loop, and its lock.

use std::panic::{AssertUnwindSafe, catch_unwind};

/// What `call` returns; none if the backend panicked in it, which is logged.
pub(crate) fn guarded<T>(what: &'static str, call: impl FnOnce() -> T) -> Option<T> {
    let returned = catch_unwind(AssertUnwindSafe(call));
    if returned.is_err() {
        tracing::error!(what, "the backend panicked");
    }
    returned.ok()
}
