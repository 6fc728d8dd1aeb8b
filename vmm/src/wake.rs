//! The thread that wakes tasks of the embedding program.
//!
//! A waker is code of the embedding program and may do anything: open a file, wait for a lock, drop
//! the VM. So wakers run neither on a thread that a guest could take over (such threads are
//! confined) nor under a lock of the library. An [`Awaited`] value is put into a queue, at most
//! once at a time, and a dedicated thread, which has no seccomp filter and holds no lock, wakes its
//! waiters.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use tokio::sync::Notify;

use crate::threads::{self, LARGE_STACK};

/// A source of wake-ups. Its owner posts it only while it is not in the queue.
pub(crate) trait Awaited: Send + Sync {
    /// Wakes the waiters. Called after the value has left the queue.
    fn wake_waiters(&self);
}

type Queue = Sender<Arc<dyn Awaited>>;

static QUEUE: OnceLock<Queue> = OnceLock::new();

/// Starts the thread, unless it runs already. Must not be called by a confined thread.
pub(crate) fn start() -> std::io::Result<&'static Queue> {
    static STARTING: Mutex<()> = Mutex::new(());
    if let Some(queue) = QUEUE.get() {
        return Ok(queue);
    }
    let _one_at_a_time = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(queue) = QUEUE.get() {
        return Ok(queue);
    }
    let (queue, posted) = mpsc::channel::<Arc<dyn Awaited>>();
    threads::spawn("hearth-wakers", LARGE_STACK, move || {
        for awaited in posted {
            // A panic in a waker, or in the drop of its captures, concerns its owner alone; the
            // panic hook has reported it.
            let _ = catch_unwind(AssertUnwindSafe(move || awaited.wake_waiters()));
        }
    })?;
    Ok(QUEUE.get_or_init(|| queue))
}

/// Queues the wake-up of the waiters of `awaited`. Never blocks. Runs no waker on this thread
/// unless the wake-up thread cannot be started.
pub(crate) fn post(awaited: Arc<dyn Awaited>) {
    // Devices without a VM (tests, fuzz targets) get here before the thread was started.
    match start() {
        // The thread never ends, so that this succeeds.
        Ok(queue) => drop(queue.send(awaited)),
        Err(_) => awaited.wake_waiters(),
    }
}

/// Waits until all that was posted before is done.
#[cfg(test)]
pub(crate) fn flush() {
    struct Barrier(Sender<()>);
    impl Awaited for Barrier {
        fn wake_waiters(&self) {
            let _ = self.0.send(());
        }
    }
    let (done, is_done) = mpsc::channel();
    post(Arc::new(Barrier(done)));
    let _ = is_done.recv();
}

/// Notifies any number of tasks of a change.
#[derive(Clone, Debug, Default)]
pub(crate) struct Notice(Arc<Posted>);

#[derive(Debug, Default)]
struct Posted {
    notify: Notify,
    /// Number of waiting tasks.
    readers: AtomicUsize,
    /// Whether this value is in the queue.
    posted: AtomicBool,
}

impl Awaited for Posted {
    fn wake_waiters(&self) {
        self.posted.store(false, Ordering::SeqCst);
        self.notify.notify_waiters();
    }
}

impl Notice {
    /// Notifies the waiting tasks. Called after the change.
    pub(crate) fn post(&self) {
        // The change precedes this fence; `until` looks after it has counted itself as a reader.
        // One of the two sees the other.
        fence(Ordering::SeqCst);
        let unread = self.0.readers.load(Ordering::SeqCst) > 0;
        if unread && !self.0.posted.swap(true, Ordering::SeqCst) {
            post(Arc::clone(&self.0) as Arc<dyn Awaited>);
        }
    }

    /// Waits until `look` returns a value. Cancel-safe.
    pub(crate) async fn until<T>(&self, mut look: impl FnMut() -> Option<T>) -> T {
        let _reader = Reader::new(&self.0.readers);
        loop {
            let changed = self.0.notify.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            fence(Ordering::SeqCst);
            if let Some(found) = look() {
                return found;
            }
            changed.await;
        }
    }
}

/// Counts a waiting task while it lives.
struct Reader<'a>(&'a AtomicUsize);

impl<'a> Reader<'a> {
    fn new(readers: &'a AtomicUsize) -> Self {
        readers.fetch_add(1, Ordering::SeqCst);
        Self(readers)
    }
}

impl Drop for Reader<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::sync::mpsc::Receiver;
    use std::task::{Context, Wake, Waker};

    use super::*;

    /// Blocks the wake-up thread until a message arrives.
    struct Busy(Mutex<Receiver<()>>);

    impl Awaited for Busy {
        fn wake_waiters(&self) {
            let _ = self.0.lock().unwrap().recv();
        }
    }

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn what_is_posted_again_before_its_turn_is_there_once() {
        let notice = Notice::default();
        let count = Arc::new(Count::default());
        let waker = Waker::from(Arc::clone(&count));
        let mut cx = Context::from_waker(&waker);
        // No task waits: nothing is queued.
        notice.post();
        assert_eq!(Arc::strong_count(&notice.0), 1);
        let changed = AtomicBool::new(false);
        let mut waiting = pin!(notice.until(|| changed.load(Ordering::SeqCst).then_some(())));
        assert!(waiting.as_mut().poll(&mut cx).is_pending());
        let (go, busy) = mpsc::channel();
        post(Arc::new(Busy(Mutex::new(busy))));
        for _ in 0..100 {
            notice.post();
        }
        assert_eq!(Arc::strong_count(&notice.0), 2, "in the queue once");
        assert_eq!(count.0.load(Ordering::SeqCst), 0, "not on this thread");
        go.send(()).unwrap();
        flush();
        assert_eq!(count.0.load(Ordering::SeqCst), 1);
        assert!(waiting.as_mut().poll(&mut cx).is_pending());
        changed.store(true, Ordering::SeqCst);
        notice.post();
        flush();
        assert_eq!(count.0.load(Ordering::SeqCst), 2);
        assert!(waiting.as_mut().poll(&mut cx).is_ready());
    }
}
