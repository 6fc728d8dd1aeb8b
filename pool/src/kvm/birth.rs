//! Tracks VMs from before they are made until nothing of them is left.
//!
//! VMs are made and torn down on other threads, which go on when the future that waits for them is
//! dropped. [`Births`] counts the VMs that were given up in this way, so that a caller can wait for
//! their teardown.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::watch;

/// Counts the VMs of a backend that were given up and are not gone yet.
#[derive(Default)]
pub(super) struct Births {
    given_up: watch::Sender<usize>,
}

/// A VM being made. Dropping this gives it up, unless [`done`](Birth::done) was called.
pub(super) struct Birth {
    life: Life,
    has_owner: bool,
}

/// Held by everything that is, or will be, a part of one VM.
#[derive(Clone)]
pub(super) struct Life(Arc<Inner>);

struct Inner {
    /// Dropped with the last part, which closes the channel.
    end: watch::Sender<()>,
    is_given_up: AtomicBool,
    given_up: watch::Sender<usize>,
}

/// Resolves when nothing of the VM is left; keeps no part of it alive.
#[derive(Clone)]
pub(super) struct Gone(watch::Receiver<()>);

impl Births {
    pub(super) fn begin(&self) -> Birth {
        let life = Life(Arc::new(Inner {
            end: watch::Sender::default(),
            is_given_up: AtomicBool::new(false),
            given_up: self.given_up.clone(),
        }));
        let has_owner = false;
        Birth { life, has_owner }
    }

    /// Resolves when nothing is left of the VMs that were given up.
    pub(super) fn settled(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut given_up = self.given_up.subscribe();
        async move {
            // An error means that the backend and all VMs that were counted are gone.
            let _ = given_up.wait_for(|left| *left == 0).await;
        }
    }
}

impl Birth {
    /// To be held by the code that works on the VM.
    pub(super) fn life(&self) -> Life {
        self.life.clone()
    }

    pub(super) fn gone(&self) -> Gone {
        Gone(self.life.0.end.subscribe())
    }

    /// The VM has an owner now, and is not given up.
    pub(super) fn done(mut self) {
        self.has_owner = true;
    }
}

impl Drop for Birth {
    fn drop(&mut self) {
        if !self.has_owner {
            // Counted before this part is dropped.
            let Life(inner) = &self.life;
            inner.given_up.send_modify(|left| *left += 1);
            inner.is_given_up.store(true, Ordering::SeqCst);
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if *self.is_given_up.get_mut() {
            self.given_up.send_modify(|left| *left -= 1);
        }
    }
}

impl Gone {
    pub(super) async fn wait(mut self) {
        // No value is ever sent: this resolves when the channel closes.
        let _ = self.0.changed().await;
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[test]
    fn what_was_given_up_counts_until_its_last_part_is_gone() {
        let births = Births::default();
        let is_settled = || births.settled().now_or_never().is_some();
        let birth = births.begin();
        let (part, gone) = (birth.life(), birth.gone());
        assert!(is_settled(), "it is waited for");
        drop(birth);
        assert!(!is_settled());
        assert!(gone.clone().wait().now_or_never().is_none());
        drop(part);
        assert!(is_settled());
        assert!(gone.wait().now_or_never().is_some());
    }

    #[test]
    fn what_has_an_owner_does_not_count_but_its_end_is_told() {
        let births = Births::default();
        let birth = births.begin();
        let (part, gone) = (birth.life(), birth.gone());
        birth.done();
        assert!(births.settled().now_or_never().is_some());
        assert!(gone.clone().wait().now_or_never().is_none());
        drop(part);
        assert!(gone.wait().now_or_never().is_some());
    }
}
