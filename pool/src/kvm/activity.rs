//! Tracks what a guest does for its owner, so that the pool can tell when a lease is idle.
//!
//! A task that reads on a stream of the owner's and finds nothing waits for an answer: that counts
//! as activity. A task that gives up the read and keeps the stream does not say so. So each reading
//! wakes the waiting tasks, and the next reading counts those that have polled again since.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;

use crate::guard;

/// The activity of one guest, over all its streams.
#[derive(Debug, Default)]
pub(super) struct Activity {
    moves: AtomicU64,
    /// Programs of the owner's whose streams are open.
    running: AtomicUsize,
    /// The tasks that found nothing to read since the last reading, by the number of the stream.
    waiting: Mutex<HashMap<u64, Waker>>,
    streams: AtomicU64,
}

impl Activity {
    /// Counts that bytes have moved.
    pub(super) fn moved(&self) {
        self.moves.fetch_add(1, Ordering::Relaxed);
    }

    /// Returns a number that changes when bytes moved, and at each call while a request is open.
    pub(super) fn reading(&self) -> u64 {
        let waiting = std::mem::take(&mut *self.waiting());
        if !waiting.is_empty() || self.running.load(Ordering::Relaxed) > 0 {
            self.moved();
        }
        for waker in waiting.into_values() {
            // The pool calls this under its lock.
            guard::later(move || waker.wake());
        }
        self.moves.load(Ordering::Relaxed)
    }

    /// No waker may be cloned or dropped under this lock: that is code of the embedding program's.
    fn waiting(&self) -> MutexGuard<'_, HashMap<u64, Waker>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The activity of one stream.
#[derive(Debug)]
pub(super) struct Part {
    guest: Arc<Activity>,
    stream: u64,
    /// The stream is the owner's, not the pool's: a reader on it waits for an answer.
    owned: AtomicBool,
    waits: bool,
    /// The stream runs a program, which counts as a request for as long as the stream is open.
    runs: AtomicBool,
}

impl Part {
    pub(super) fn new(guest: Arc<Activity>) -> Self {
        Self {
            stream: guest.streams.fetch_add(1, Ordering::Relaxed),
            guest,
            owned: AtomicBool::new(false),
            waits: false,
            runs: AtomicBool::new(false),
        }
    }

    pub(super) fn set_owned(&self) {
        self.owned.store(true, Ordering::Relaxed);
    }

    pub(super) fn set_runs(&self) {
        if !self.runs.swap(true, Ordering::Relaxed) {
            self.guest.running.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// A read returned bytes or the end of the stream.
    pub(super) fn read(&mut self) {
        self.guest.moved();
        self.wait_no_more();
    }

    /// A read found nothing, and its task waits for more to come.
    pub(super) fn found_nothing(&mut self, waker: &Waker) {
        if self.owned.load(Ordering::Relaxed) {
            self.waits = true;
            let waker = waker.clone();
            let before = self.guest.waiting().insert(self.stream, waker);
            drop(before);
        }
    }

    fn wait_no_more(&mut self) {
        if std::mem::take(&mut self.waits) {
            let waker = self.guest.waiting().remove(&self.stream);
            drop(waker);
        }
    }

    pub(super) fn wrote(&self) {
        self.guest.moved();
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        self.wait_no_more();
        let runs = usize::from(*self.runs.get_mut());
        self.guest.running.fetch_sub(runs, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::task::{Wake, Waker};

    use super::*;

    /// A task that counts how often it was woken.
    #[derive(Default)]
    struct Task(AtomicUsize);

    impl Wake for Task {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    impl Task {
        fn woken(&self) -> usize {
            self.0.load(Ordering::Relaxed)
        }
    }

    fn task() -> (Arc<Task>, Waker) {
        let task = Arc::new(Task::default());
        (Arc::clone(&task), task.into())
    }

    /// Whether a lease with this activity would be ended at its idle limit.
    fn is_idle(guest: &Activity) -> bool {
        guest.reading() == guest.reading()
    }

    #[test]
    fn an_open_request_of_the_owners_is_activity_until_its_answer_or_the_end_of_its_stream() {
        let guest = Arc::new(Activity::default());
        let mut part = Part::new(Arc::clone(&guest));
        let (task, waker) = task();
        part.found_nothing(&waker);
        assert!(is_idle(&guest), "the pool's own question");
        part.set_owned();
        let mut last = guest.reading();
        for woken in 1..4 {
            // A task polls first, and then each time that it is woken.
            part.found_nothing(&waker);
            part.found_nothing(&waker);
            let next = guest.reading();
            assert_ne!(next, last, "a silent program's caller waits");
            assert_eq!(task.woken(), woken, "it is asked whether it still does");
            last = next;
        }
        part.found_nothing(&waker);
        part.read();
        assert_eq!(guest.reading(), last + 1);
        assert!(is_idle(&guest), "it was answered");
        part.found_nothing(&waker);
        drop(part);
        assert!(is_idle(&guest), "its stream is gone");
        assert_eq!(task.woken(), 3);
    }

    /// Regression: it counted for as long as the stream was open.
    #[test]
    fn a_read_that_was_given_up_is_activity_for_one_reading_though_its_stream_is_kept() {
        let guest = Arc::new(Activity::default());
        let [mut given_up, mut waits] = [(); 2].map(|()| Part::new(Arc::clone(&guest)));
        let ((gone, of_gone), (here, of_here)) = (task(), task());
        given_up.set_owned();
        given_up.found_nothing(&of_gone);
        let before = guest.reading();
        assert_eq!(gone.woken(), 1);
        // The woken task does something else and does not read again.
        assert_eq!(guest.reading(), before);
        waits.set_owned();
        waits.found_nothing(&of_here);
        assert_eq!(guest.reading(), before + 1, "another request is another");
        assert_eq!((gone.woken(), here.woken()), (1, 1));
        given_up.found_nothing(&of_gone);
        assert_eq!(guest.reading(), before + 2, "it reads again");
        drop((given_up, waits));
    }

    /// A waker is code of the embedding program's.
    #[test]
    fn whoever_waits_is_woken_when_no_lock_of_a_pool_is_held() {
        let guest = Arc::new(Activity::default());
        let mut part = Part::new(Arc::clone(&guest));
        let (task, waker) = task();
        part.set_owned();
        part.found_nothing(&waker);
        guard::hold();
        guest.reading();
        assert_eq!(task.woken(), 0);
        guard::release();
        assert_eq!(task.woken(), 1);
    }

    #[test]
    fn a_program_is_a_request_though_nobody_reads_what_it_says() {
        let guest = Arc::new(Activity::default());
        let part = Part::new(Arc::clone(&guest));
        part.set_owned();
        part.set_runs();
        part.set_runs();
        assert!(!is_idle(&guest));
        drop(part);
        assert!(is_idle(&guest));
    }

    #[test]
    fn bytes_that_move_are_activity() {
        let guest = Arc::new(Activity::default());
        let mut part = Part::new(Arc::clone(&guest));
        let before = guest.reading();
        part.wrote();
        part.read();
        assert_eq!(guest.reading(), before + 2);
    }
}
