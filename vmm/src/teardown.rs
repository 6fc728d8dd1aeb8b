//! Tears VMs down on threads of the library, not on their owners' threads.
//!
//! A few threads share one queue. A VM whose vCPU threads do not leave it at once is set aside and
//! polled, so that it holds up no other VM: after [`STOP_BOUND`] it counts as leaked, and if its
//! threads leave later it is released like any other.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::threads::{self, LARGE_STACK};
use crate::vcpu::control::WaitBudget;

/// How long stopping vCPU threads may take before their VM counts as leaked.
pub(crate) const STOP_BOUND: Duration = Duration::from_secs(5);
/// Number of teardown threads. A thread that is stuck in a drop guard of the embedding program
/// holds up its own VM alone.
const THREADS: usize = 2;
/// Maximum number of VMs in the queue. A thread that drops a VM while the queue is full tears it
/// down itself.
const QUEUE: usize = 256;
/// How long a thread waits for one VM before it turns to the next. vCPU threads leave within a
/// signal's delivery.
const AT_ONCE: Duration = Duration::from_millis(20);
/// Interval between two checks of VMs that were set aside.
const LOOK: Duration = Duration::from_millis(20);

/// A value that teardown threads stop and drop: a VM.
pub(crate) trait Teardown: Send + 'static {
    /// Ends the VM and waits up to `within` for its threads. Returns whether they have left.
    fn has_stopped(&self, within: Duration) -> bool;
    /// Called when the VM did not stop in time. Releases everyone who waits for its end.
    fn leaks(&mut self);
}

/// A VM that did not stop at once.
#[derive(Debug)]
struct Late<M> {
    body: M,
    budget: WaitBudget,
    seen: Instant,
    is_leaked: bool,
}

#[derive(Debug)]
struct State<M> {
    waiting: VecDeque<M>,
    late: Vec<Late<M>>,
    threads: usize,
}

/// The queue and the state of the teardown threads; see the module's documentation.
#[derive(Debug)]
pub(crate) struct TeardownQueue<M> {
    state: Mutex<State<M>>,
    arrived: Condvar,
    /// Number of VMs that are leaked now.
    pub(crate) leaked: AtomicU64,
}

impl<M> Default for TeardownQueue<M> {
    fn default() -> Self {
        let state = State {
            waiting: VecDeque::new(),
            late: Vec::new(),
            threads: 0,
        };
        Self {
            state: Mutex::new(state),
            arrived: Condvar::new(),
            leaked: AtomicU64::new(0),
        }
    }
}

impl<M: Teardown> TeardownQueue<M> {
    fn lock(&self) -> MutexGuard<'_, State<M>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts the threads, if that was not done before. Must not be called by a confined thread.
    pub(crate) fn start(self: &Arc<Self>) -> std::io::Result<()> {
        let mut state = self.lock();
        while state.threads < THREADS {
            let own = Arc::clone(self);
            threads::spawn("hearth-teardown", LARGE_STACK, move || own.serve())?;
            state.threads += 1;
        }
        Ok(())
    }

    /// Queues `body` for a teardown thread. Drops it here if the queue is full or no thread was
    /// started.
    pub(crate) fn push(&self, body: M) {
        let mut state = self.lock();
        if state.waiting.len() < QUEUE && state.threads > 0 {
            state.waiting.push_back(body);
            drop(state);
            self.arrived.notify_one();
        } else {
            drop(state);
            drop(body);
        }
    }

    /// Takes over a VM that did not stop in [`STOP_BOUND`]: it is leaked until it stops.
    pub(crate) fn watch(&self, body: M) {
        let mut late = Late::new(body);
        self.leaks(&mut late);
        self.lock().late.push(late);
        self.arrived.notify_one();
    }

    fn leaks(&self, late: &mut Late<M>) {
        late.is_leaked = true;
        self.leaked.fetch_add(1, Ordering::Relaxed);
        tracing::error!(
            "a vCPU thread did not stop in {STOP_BOUND:?}: it and its memory are leaked"
        );
        let _ = catch_unwind(AssertUnwindSafe(|| late.body.leaks()));
    }

    fn serve(&self) {
        loop {
            match self.next() {
                Next::Body(body) if body.has_stopped(AT_ONCE) => release(body),
                Next::Body(body) => self.lock().late.push(Late::new(body)),
                Next::Late(late) => {
                    let still: Vec<_> = late.into_iter().filter_map(|one| self.look(one)).collect();
                    self.lock().late.extend(still);
                }
            }
        }
    }

    fn next(&self) -> Next<M> {
        let mut state = self.lock();
        loop {
            if let Some(body) = state.waiting.pop_front() {
                return Next::Body(body);
            }
            let due = |late: &mut Late<M>| late.seen.elapsed() >= LOOK;
            let late: Vec<_> = state.late.extract_if(.., due).collect();
            if !late.is_empty() {
                return Next::Late(late);
            }
            state = if state.late.is_empty() {
                self.arrived
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner)
            } else {
                let waited = self.arrived.wait_timeout(state, LOOK);
                waited.unwrap_or_else(PoisonError::into_inner).0
            };
        }
    }

    /// Checks the VM again; returns it if it has not stopped.
    fn look(&self, mut late: Late<M>) -> Option<Late<M>> {
        if late.body.has_stopped(Duration::ZERO) {
            if late.is_leaked {
                tracing::warn!("a VM that did not stop in time has stopped now, and is released");
            }
            release(late.body);
            // Only after the release: until then the VM counts as leaked.
            self.leaked
                .fetch_sub(u64::from(late.is_leaked), Ordering::Relaxed);
            return None;
        }
        let step = late.seen.elapsed();
        late.seen = Instant::now();
        if !late.budget.charge(step) && !late.is_leaked {
            self.leaks(&mut late);
        }
        Some(late)
    }
}

/// Drops `body`. Its drop guards are code of the embedding program: a panic there must not end the
/// teardown thread.
fn release<M>(body: M) {
    let _ = catch_unwind(AssertUnwindSafe(move || drop(body)));
}

enum Next<M> {
    Body(M),
    Late(Vec<Late<M>>),
}

impl<M> Late<M> {
    fn new(body: M) -> Self {
        Self {
            body,
            budget: WaitBudget::new(STOP_BOUND),
            seen: Instant::now(),
            is_leaked: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;
    use std::sync::mpsc::{self, Sender};

    use super::*;

    /// A test that waits longer than this has failed.
    const STUCK: Duration = Duration::from_secs(30);

    #[derive(Clone)]
    struct Body {
        stops: Arc<AtomicBool>,
        gone: Sender<&'static str>,
        name: &'static str,
    }

    impl Teardown for Body {
        fn has_stopped(&self, _: Duration) -> bool {
            self.stops.load(Ordering::SeqCst)
        }
        fn leaks(&mut self) {
            self.gone.send("leaked").unwrap();
        }
    }

    impl Drop for Body {
        fn drop(&mut self) {
            assert!(self.stops.load(Ordering::SeqCst), "released under a thread");
            if self.name == "stuck for ever" {
                loop {
                    std::thread::park();
                }
            }
            // The receiver may be gone at a test's end.
            let _ = self.gone.send(self.name);
            assert_ne!(self.name, "panics", "expected");
        }
    }

    fn body(name: &'static str, stops: bool, gone: &Sender<&'static str>) -> Body {
        Body {
            stops: Arc::new(AtomicBool::new(stops)),
            gone: gone.clone(),
            name,
        }
    }

    fn started() -> Arc<TeardownQueue<Body>> {
        let teardown_queue = Arc::<TeardownQueue<Body>>::default();
        teardown_queue.start().unwrap();
        teardown_queue.start().unwrap();
        assert_eq!(teardown_queue.lock().threads, THREADS);
        teardown_queue
    }

    #[test]
    fn one_that_stops_late_is_leaked_until_then_and_released_after_all() {
        let teardown_queue = started();
        let (gone, is_gone) = mpsc::channel();
        let late = body("late", false, &gone);
        let stops = Arc::clone(&late.stops);
        teardown_queue.watch(late);
        assert_eq!(is_gone.recv_timeout(STUCK), Ok("leaked"));
        assert_eq!(teardown_queue.leaked.load(Ordering::Relaxed), 1);
        // It holds up no other VM, and neither does one that was set aside.
        let aside = body("aside", false, &gone);
        let aside_stops = Arc::clone(&aside.stops);
        teardown_queue.push(aside);
        for _ in 0..10 {
            teardown_queue.push(body("next", true, &gone));
            assert_eq!(is_gone.recv_timeout(STUCK), Ok("next"));
        }
        aside_stops.store(true, Ordering::SeqCst);
        assert_eq!(is_gone.recv_timeout(STUCK), Ok("aside"));
        stops.store(true, Ordering::SeqCst);
        assert_eq!(is_gone.recv_timeout(STUCK), Ok("late"));
        let end = Instant::now() + STUCK;
        while teardown_queue.leaked.load(Ordering::Relaxed) > 0 {
            assert!(Instant::now() < end, "still counted");
            std::thread::yield_now();
        }
    }

    #[test]
    fn what_one_carries_may_panic_or_block_and_others_are_released() {
        let teardown_queue = started();
        let (gone, is_gone) = mpsc::channel();
        teardown_queue.push(body("stuck for ever", true, &gone));
        for _ in 0..2 * THREADS {
            teardown_queue.push(body("panics", true, &gone));
            teardown_queue.push(body("next", true, &gone));
            assert_eq!(is_gone.recv_timeout(STUCK), Ok("panics"));
            assert_eq!(is_gone.recv_timeout(STUCK), Ok("next"));
        }
    }

    #[test]
    fn a_full_queue_is_no_reason_to_hold_more() {
        let teardown_queue = TeardownQueue::<Body>::default();
        // As if started, but without threads that take from the queue.
        teardown_queue.lock().threads = THREADS;
        let (gone, is_gone) = mpsc::channel();
        for _ in 0..QUEUE {
            teardown_queue.push(body("waits", true, &gone));
        }
        assert!(is_gone.try_recv().is_err());
        teardown_queue.push(body("here", true, &gone));
        assert_eq!(is_gone.try_recv(), Ok("here"));
        assert_eq!(teardown_queue.lock().waiting.len(), QUEUE);
    }
}
