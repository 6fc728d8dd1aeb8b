//! The lock of a pool. It is not held while tracing subscribers, metrics recorders and wakers run:
//! they are code of the embedding program and may call into the pool. The exception is the backend,
//! which may also be code of the embedding program: the methods that [`Backend`] names run under
//! the lock and must not call into the pool.
//!
//! Notifications of what happens under the lock are queued with [`State::later`] (by the backends
//! of this crate with [`guard::later`]). The thread that releases the lock runs them in the order
//! in which they were queued. A panic in one of them does not affect the pool.

use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::backend::Backend;
use crate::guard::{self, quietly};
use crate::shared::State;

/// A deferred notification.
pub(crate) type Later = Box<dyn FnOnce() + Send>;

/// Queue of deferred notifications.
#[derive(Default)]
pub(crate) struct Outbox {
    waiting: Vec<Later>,
    /// Whether a thread is running notifications; it goes on until the queue is empty.
    told: bool,
}

impl Outbox {
    pub(crate) fn push(&mut self, later: impl FnOnce() + Send + 'static) {
        self.waiting.push(Box::new(later));
    }

    /// Takes the notifications to run now; none if the queue is empty or they are being run
    /// already.
    fn begin(&mut self) -> Option<Vec<Later>> {
        if self.told || self.waiting.is_empty() {
            return None;
        }
        self.told = true;
        Some(std::mem::take(&mut self.waiting))
    }

    fn go_on(&mut self) -> Option<Vec<Later>> {
        self.told = false;
        self.begin()
    }
}

/// The state of a pool, locked.
pub(crate) struct Locked<'a, B: Backend> {
    lock: &'a Mutex<State<B>>,
    /// Present until the drop.
    guard: Option<MutexGuard<'a, State<B>>>,
}

impl<'a, B: Backend> Locked<'a, B> {
    pub(crate) fn new(lock: &'a Mutex<State<B>>) -> Self {
        let guard = Some(take(lock));
        guard::hold();
        Self { lock, guard }
    }
}

fn take<B: Backend>(lock: &Mutex<State<B>>) -> MutexGuard<'_, State<B>> {
    // A panic of the backend under the lock leaves the ledger unchanged, so poisoning is ignored.
    lock.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<B: Backend> Deref for Locked<'_, B> {
    type Target = State<B>;

    fn deref(&self) -> &State<B> {
        match &self.guard {
            Some(guard) => guard,
            None => unreachable!("it is there until the drop"),
        }
    }
}

impl<B: Backend> DerefMut for Locked<'_, B> {
    fn deref_mut(&mut self) -> &mut State<B> {
        match &mut self.guard {
            Some(guard) => guard,
            None => unreachable!("it is there until the drop"),
        }
    }
}

impl<B: Backend> Drop for Locked<'_, B> {
    fn drop(&mut self) {
        let Some(mut guard) = self.guard.take() else {
            return;
        };
        let mut batch = guard.outbox.begin();
        drop(guard);
        guard::release();
        while let Some(now) = batch {
            for later in now {
                quietly(later);
            }
            batch = take(self.lock).outbox.go_on();
        }
    }
}
