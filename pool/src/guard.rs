//! Guarded calls into the backend, from places where a panic would break the pool (its loop, and
//! code under its lock). Notifications that such calls cause are deferred until the thread holds no
//! lock of a pool.

use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, catch_unwind};

thread_local! {
    /// Number of pool locks that this thread holds.
    static HELD: Cell<usize> = const { Cell::new(0) };
    /// Notifications to run when the thread holds no pool lock.
    static LATER: RefCell<Vec<Box<dyn FnOnce()>>> = const { RefCell::new(Vec::new()) };
}

/// Returns the result of `call`, or none if the backend panicked in it. The panic is logged once
/// the pool's lock is free.
pub(crate) fn guarded<T>(what: &'static str, call: impl FnOnce() -> T) -> Option<T> {
    let returned = catch_unwind(AssertUnwindSafe(call));
    if returned.is_err() {
        later(move || tracing::error!(what, "the backend panicked"));
    }
    returned.ok()
}

/// Runs `tell` as soon as this thread holds no pool lock. For logs and wakers that a backend
/// triggers under the pool's lock: they run code of the embedding program.
pub(crate) fn later(tell: impl FnOnce() + 'static) {
    if HELD.get() == 0 {
        return quietly(tell);
    }
    // Fails only if the thread is ending and its list is destroyed already.
    let _ = LATER.try_with(|later| later.borrow_mut().push(Box::new(tell)));
}

/// Records that this thread has taken the lock of a pool.
pub(crate) fn hold() {
    HELD.set(HELD.get() + 1);
}

/// Records that this thread has released the lock of a pool. If it holds no other, runs the
/// deferred notifications.
pub(crate) fn release() {
    HELD.set(HELD.get() - 1);
    if HELD.get() > 0 {
        return;
    }
    let told = LATER.try_with(|later| std::mem::take(&mut *later.borrow_mut()));
    told.unwrap_or_default().into_iter().for_each(quietly);
}

/// Runs `tell` and discards a panic, which the panic hook has reported: it must not prevent the
/// notifications that follow.
pub(crate) fn quietly(tell: impl FnOnce()) {
    if let Err(payload) = catch_unwind(AssertUnwindSafe(tell)) {
        // The payload's drop might panic as well.
        std::mem::forget(payload);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_later_is_told_in_its_order_when_no_lock_is_held_and_a_panic_costs_no_other() {
        thread_local! {
            static TOLD: RefCell<Vec<u32>> = const { RefCell::new(Vec::new()) };
        }
        let tell = |number| later(move || TOLD.with_borrow_mut(|told| told.push(number)));
        let told = || TOLD.with_borrow(Clone::clone);
        tell(1);
        assert_eq!(told(), [1], "no lock is held");
        hold();
        hold();
        tell(2);
        later(|| std::panic::resume_unwind(Box::new(())));
        tell(3);
        release();
        assert_eq!(told(), [1], "another pool's is held");
        release();
        assert_eq!(told(), [1, 2, 3]);
    }
}
