//! Calls into the backend from where a panic would take the pool with it (its loop, and its lock),
//! and what is to be told of such a call when its thread holds no lock of a pool.

use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, catch_unwind};

thread_local! {
    /// Locks of pools that this thread holds.
    static HELD: Cell<usize> = const { Cell::new(0) };
    /// To be told when it holds none.
    static LATER: RefCell<Vec<Box<dyn FnOnce()>>> = const { RefCell::new(Vec::new()) };
}

/// What `call` returns; none if the backend panicked in it, which is logged once the pool's lock is
/// free.
pub(crate) fn guarded<T>(what: &'static str, call: impl FnOnce() -> T) -> Option<T> {
    let returned = catch_unwind(AssertUnwindSafe(call));
    if returned.is_err() {
        later(move || tracing::error!(what, "the backend panicked"));
    }
    returned.ok()
}

/// Has something told (logs, wakers) that is code of the embedder's, and of which a backend comes
/// to know under the pool's lock: as soon as this thread holds none.
pub(crate) fn later(tell: impl FnOnce() + 'static) {
    if HELD.get() == 0 {
        return quietly(tell);
    }
    // A thread that ends has no place for it any more.
    let _ = LATER.try_with(|later| later.borrow_mut().push(Box::new(tell)));
}

/// This thread has taken the lock of a pool.
pub(crate) fn hold() {
    HELD.set(HELD.get() + 1);
}

/// It has released it. Tells what was to be told later.
pub(crate) fn release() {
    HELD.set(HELD.get() - 1);
    if HELD.get() > 0 {
        return;
    }
    let told = LATER.try_with(|later| std::mem::take(&mut *later.borrow_mut()));
    told.unwrap_or_default().into_iter().for_each(quietly);
}

/// Tells, whatever comes of it: a panic has been reported by its hook, and must not cost what is
/// told next.
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
