//! The lock of a pool, which is not held while subscribers, recorders and wakers run: they are code
//! of the embedder's, and may call into the pool. The exception is the backend, which may be an
//! embedder's as well: what [`Backend`] names runs under the lock, and must not call into the pool.
//!
//! What is to be told of what happens under the lock is put into [`State::later`] (by a backend of
//! ours into [`guard::later`]), and told, in that order, by whoever has released it. A panic there
//! is not the pool's.

use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::backend::Backend;
use crate::guard::{self, quietly};
use crate::shared::State;

/// Something to tell.
pub(crate) type Later = Box<dyn FnOnce() + Send>;

/// What is to be told.
#[derive(Default)]
pub(crate) struct Outbox {
    waiting: Vec<Later>,
    /// Somebody tells, and goes on until there is nothing left.
    told: bool,
}

impl Outbox {
    pub(crate) fn push(&mut self, later: impl FnOnce() + Send + 'static) {
        self.waiting.push(Box::new(later));
    }

    /// What to tell now; none if that is somebody else's to do, or there is nothing.
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
    /// Present until it is dropped.
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
    // A panic of the backend under the lock leaves the ledger as it was: go on.
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
