//! The VMs of the fake backend.

use std::collections::VecDeque;
use std::fmt;
use std::future::{Future, pending};
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio::sync::watch;
use tokio::time::sleep;

use super::{FakeBackend, Ping};
use crate::backend::{ProbeError, Remote};
use crate::slot::VmId;

/// State shared by the VM, its handles and its probes.
#[derive(Debug)]
pub(super) struct Life {
    pub(super) id: VmId,
    pub(super) profile: String,
    state: watch::Sender<Now>,
    pings: Mutex<VecDeque<Ping>>,
    probes: AtomicUsize,
    hand_offs: AtomicUsize,
    activity: AtomicU64,
}

#[derive(Debug, Clone, Copy, Default)]
struct Now {
    ended: bool,
    /// The VM holds no resources any more; only the value is left.
    hollow: bool,
    frozen: bool,
    paused: bool,
}

impl Life {
    pub(super) fn new(id: VmId, profile: &str, pings: VecDeque<Ping>) -> Arc<Self> {
        Arc::new(Self {
            id,
            profile: profile.to_owned(),
            state: watch::channel(Now::default()).0,
            pings: Mutex::new(pings),
            probes: AtomicUsize::new(0),
            hand_offs: AtomicUsize::new(0),
            activity: AtomicU64::new(0),
        })
    }

    pub(super) fn is_alive(&self) -> bool {
        !self.state.borrow().ended
    }

    pub(super) fn set_paused(&self, paused: bool) {
        self.state.send_modify(|now| now.paused = paused);
    }

    pub(super) fn fits(&self, profile: &str) -> bool {
        self.profile == profile && self.hand_offs.load(Ordering::SeqCst) == 0
    }

    pub(super) fn hand_off(&self) {
        self.hand_offs.fetch_add(1, Ordering::SeqCst);
        self.set_paused(false);
    }

    fn end(&self) {
        self.state.send_modify(|now| now.ended = true);
    }

    fn give_up(&self) {
        self.state
            .send_modify(|now| (now.ended, now.hollow) = (true, true));
    }

    pub(super) fn ended(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut state = self.state.subscribe();
        async move {
            // An error means that the VM was destroyed, which is an end, too.
            let _ = state.wait_for(|now| now.ended).await.map(|_| ());
        }
    }

    /// Resolves when the guest is neither frozen nor paused: it answers only then.
    async fn runs(&self) {
        let mut state = self.state.subscribe();
        if state
            .wait_for(|now| !now.frozen && !now.paused)
            .await
            .is_err()
        {
            pending::<()>().await;
        }
    }

    pub(super) async fn probe(self: Arc<Self>) -> Result<(), ProbeError> {
        self.probes.fetch_add(1, Ordering::SeqCst);
        let next = self
            .pings
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop_front();
        tokio::select! {
            biased;
            () = self.ended() => Err(ProbeError::Dead),
            answer = self.answer(next.unwrap_or(Ping::Pong)) => answer,
        }
    }

    async fn answer(&self, ping: Ping) -> Result<(), ProbeError> {
        self.runs().await;
        match ping {
            Ping::Pong => Ok(()),
            Ping::After(time) => {
                sleep(time).await;
                Ok(())
            }
            Ping::Gate(gate) => {
                gate.pass().await;
                Ok(())
            }
            Ping::Lost => Err(ProbeError::Lost),
            Ping::Silence => pending().await,
            Ping::Wrong(what) => Err(ProbeError::Wrong(what)),
            Ping::Dies => {
                self.end();
                Err(ProbeError::Dead)
            }
            Ping::Panic => resume_unwind(Box::new("a scripted panic")),
        }
    }
}

/// A VM of the fake backend.
pub struct FakeVm {
    pub(super) life: Arc<Life>,
    pub(super) backend: FakeBackend,
    pub(super) retired: bool,
}

impl FakeVm {
    /// The name of the profile that the VM was made for.
    #[must_use]
    pub fn made_for(&self) -> &str {
        &self.life.profile
    }

    /// Returns a handle to inspect and disturb the VM.
    #[must_use]
    pub fn handle(&self) -> FakeVmHandle {
        FakeVmHandle::new(Arc::clone(&self.life))
    }

    /// Does one piece of work for the VM's owner. Returns how many it has done so far.
    ///
    /// # Errors
    /// If the VM has ended or cannot answer.
    pub fn work(&self) -> Result<u64, FakeVmError> {
        let now = *self.life.state.borrow();
        if now.ended {
            Err(FakeVmError::Ended)
        } else if now.paused || now.frozen {
            Err(FakeVmError::Stuck)
        } else {
            Ok(self.life.activity.fetch_add(1, Ordering::SeqCst) + 1)
        }
    }
}

/// Why [`FakeVm::work`] failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FakeVmError {
    /// The VM has ended.
    #[error("the VM has ended")]
    Ended,
    /// The vCPUs do not run.
    #[error("the VM does not run")]
    Stuck,
}

impl Drop for FakeVm {
    fn drop(&mut self) {
        self.life.give_up();
        self.backend.gone(&self.life, self.retired);
    }
}

impl fmt::Debug for FakeVm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.life.fmt(f)
    }
}

/// A handle that inspects and disturbs a VM without owning it.
#[derive(Debug, Clone)]
pub struct FakeVmHandle(Arc<Life>);

impl FakeVmHandle {
    pub(super) fn new(life: Arc<Life>) -> Self {
        Self(life)
    }

    /// The VM's number.
    #[must_use]
    pub fn id(&self) -> VmId {
        self.0.id
    }

    /// Ends the VM, as a panic, a power-off or a kill would.
    pub fn kill(&self) {
        self.0.end();
    }

    /// Freezes the vCPUs; resuming does not help.
    pub fn freeze(&self) {
        self.0.state.send_modify(|now| now.frozen = true);
    }

    /// Scripts the VM's next pings, in order.
    pub fn script_pings(&self, pings: impl IntoIterator<Item = Ping>) {
        self.0
            .pings
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .extend(pings);
    }

    /// Whether the VM has not ended.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.0.is_alive()
    }

    /// Whether the VM holds memory of the host: until the pool ends it, or it is dropped.
    #[must_use]
    pub fn holds_memory(&self) -> bool {
        !self.0.state.borrow().hollow
    }

    /// Whether the vCPUs are paused.
    #[must_use]
    pub fn is_paused(&self) -> bool {
        self.0.state.borrow().paused
    }

    /// How often the VM was probed.
    #[must_use]
    pub fn probes(&self) -> usize {
        self.0.probes.load(Ordering::SeqCst)
    }

    /// How often the VM was handed out.
    #[must_use]
    pub fn hand_offs(&self) -> usize {
        self.0.hand_offs.load(Ordering::SeqCst)
    }
}

/// The weak handle of the fake backend.
#[derive(Debug)]
pub struct FakeRemote(pub(super) Weak<Life>);

impl Remote for FakeRemote {
    async fn kill(&self) {
        if let Some(life) = self.0.upgrade() {
            life.give_up();
        }
    }

    fn activity(&self) -> u64 {
        self.0
            .upgrade()
            .map_or(0, |life| life.activity.load(Ordering::SeqCst))
    }
}
