//! A gate that holds tasks until a test lets them through.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::{Semaphore, watch};

/// Holds tasks until a test lets a number of them through. Clones are the same gate.
#[derive(Debug, Clone)]
pub struct Gate(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    passes: Semaphore,
    waiting: AtomicUsize,
    changed: watch::Sender<()>,
}

impl Default for Gate {
    fn default() -> Self {
        Self::new()
    }
}

impl Gate {
    /// A closed gate.
    #[must_use]
    pub fn new() -> Self {
        Self(Arc::new(Inner {
            passes: Semaphore::new(0),
            waiting: AtomicUsize::new(0),
            changed: watch::channel(()).0,
        }))
    }

    /// Lets `count` tasks through, waiting ones first.
    pub fn admit(&self, count: usize) {
        self.0.passes.add_permits(count);
    }

    /// Lets all tasks through, now and later.
    pub fn open(&self) {
        self.0.passes.close();
    }

    /// The number of tasks that wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.0.waiting.load(Ordering::SeqCst)
    }

    /// Resolves when at least `count` tasks wait.
    pub async fn held(&self, count: usize) {
        let mut changed = self.0.changed.subscribe();
        while self.waiting() < count {
            changed.borrow_and_update();
            if self.waiting() < count && changed.changed().await.is_err() {
                return;
            }
        }
    }

    pub(super) async fn pass(&self) {
        let _held = Held::new(&self.0);
        // An error means that the gate is open for all.
        if let Ok(pass) = self.0.passes.acquire().await {
            pass.forget();
        }
    }
}

struct Held<'a>(&'a Inner);

impl<'a> Held<'a> {
    fn new(inner: &'a Inner) -> Self {
        inner.waiting.fetch_add(1, Ordering::SeqCst);
        inner.changed.send_replace(());
        Self(inner)
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::SeqCst);
    }
}
