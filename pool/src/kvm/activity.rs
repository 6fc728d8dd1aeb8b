//! What a guest does for its owner, so that the pool can tell an idle lease.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

/// Of one guest, over all its streams.
#[derive(Debug, Default)]
pub(super) struct Activity {
    moves: AtomicU64,
    /// Requests of the owner's that are not answered.
    open: AtomicUsize,
}

impl Activity {
    /// Bytes have moved.
    pub(super) fn moved(&self) {
        self.moves.fetch_add(1, Ordering::Relaxed);
    }

    /// A number that changes when bytes moved, and at each call while a request is open.
    pub(super) fn reading(&self) -> u64 {
        if self.open.load(Ordering::Relaxed) > 0 {
            self.moved();
        }
        self.moves.load(Ordering::Relaxed)
    }
}

/// One stream's part in it.
#[derive(Debug)]
pub(super) struct Part {
    guest: Arc<Activity>,
    /// The owner's, not the pool's: who reads on it waits for an answer.
    owned: AtomicBool,
    waits: bool,
    /// A program, which is a request for as long as its stream is there.
    runs: AtomicBool,
}

impl Part {
    pub(super) fn new(guest: Arc<Activity>) -> Self {
        Self {
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
            self.guest.open.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Somebody has read, and waits for more to come if there was nothing.
    pub(super) fn read(&mut self, nothing_there: bool) {
        if !nothing_there {
            self.guest.moved();
        }
        let waits = nothing_there && self.owned.load(Ordering::Relaxed);
        if waits != self.waits {
            self.waits = waits;
            if waits {
                self.guest.open.fetch_add(1, Ordering::Relaxed);
            } else {
                self.guest.open.fetch_sub(1, Ordering::Relaxed);
            }
        }
    }

    pub(super) fn wrote(&self) {
        self.guest.moved();
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        let open = usize::from(self.waits) + usize::from(*self.runs.get_mut());
        self.guest.open.fetch_sub(open, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether a lease with this activity would be ended at its idle limit.
    fn is_idle(guest: &Activity) -> bool {
        guest.reading() == guest.reading()
    }

    #[test]
    fn an_open_request_of_the_owners_is_activity_until_its_answer_or_the_end_of_its_stream() {
        let guest = Arc::new(Activity::default());
        let mut part = Part::new(Arc::clone(&guest));
        part.read(true);
        assert!(is_idle(&guest), "the pool's own question");
        part.set_owned();
        part.read(true);
        part.read(true);
        assert!(!is_idle(&guest), "a silent program's caller waits");
        part.read(false);
        assert!(is_idle(&guest), "it was answered");
        part.read(true);
        drop(part);
        assert!(is_idle(&guest), "it was given up");
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
        part.read(false);
        assert_eq!(guest.reading(), before + 2);
    }
}
