//! A VM that belongs to a caller, until it is dropped.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::actor::{Home, Message};
use crate::backend::{Backend, ProbeError};
use crate::guard::guarded;
use crate::health;
use crate::ledger::ProfileId;
use crate::permit::Reservation;
use crate::shared::{Shared, Stray};
use crate::slot::VmId;

/// A VM on lease: used once, then destroyed.
///
/// Dereferences to the backend's VM. Dropping it, anywhere and at any moment, gives the VM back:
/// the drop only puts the VM where it came from, under the lock that acquire takes; the lease is
/// free for others at once, and destruction happens in the pool's own tasks. Use
/// [`release`](Self::release) to wait for that, and [`into_inner`](Self::into_inner) to keep the
/// VM.
#[must_use = "dropping a lease destroys its VM"]
pub struct Lease<B: Backend> {
    shared: Arc<Shared<B>>,
    /// For a VM that is no longer on the books: the life that it belonged to, if it still goes on.
    home: Home<B>,
    id: VmId,
    profile: ProfileId,
    since: Instant,
    /// Present until the lease is over.
    vm: Option<B::Vm>,
    /// Whether a caller has it; before that, it goes back as good as new.
    touched: bool,
}

/// Told when the VM of a lease is destroyed.
pub(crate) type Released = Option<oneshot::Sender<()>>;

impl<B: Backend> Lease<B> {
    pub(crate) fn untouched(
        shared: Arc<Shared<B>>,
        home: Home<B>,
        id: VmId,
        profile: ProfileId,
        vm: B::Vm,
    ) -> Self {
        let since = Instant::now();
        Self {
            shared,
            home,
            id,
            profile,
            since,
            vm: Some(vm),
            touched: false,
        }
    }

    /// From here on the VM is the caller's.
    pub(crate) fn hand_off(mut self) -> Self {
        self.touched = true;
        if let Some(vm) = &self.vm {
            self.shared.backend.hand_off(vm);
        }
        self
    }

    pub(crate) fn is_alive(&self) -> bool {
        let vm = self.vm.as_ref();
        vm.and_then(|vm| guarded("alive", || self.shared.backend.alive(vm)))
            .unwrap_or(false)
    }

    /// The VM's number.
    #[must_use]
    pub fn id(&self) -> VmId {
        self.id
    }

    pub(crate) fn profile_id(&self) -> ProfileId {
        self.profile
    }

    /// The name of its profile.
    #[must_use]
    pub fn profile(&self) -> &str {
        self.shared
            .profile(self.profile)
            .map_or("", |profile| &profile.spec.name)
    }

    /// Checks the VM as the pool does: same probes, same retries, same verdict.
    ///
    /// # Errors
    /// Why it is not healthy.
    pub async fn ping(&self) -> Result<(), ProbeError> {
        let probe = || self.vm.as_ref().map(|vm| self.shared.backend.probe(vm));
        health::check(self.shared.check_rules, probe)
            .await
            .map(|_| ())
    }

    /// Takes the VM out of the pool for good. The pool refills; the reservation keeps the VM
    /// counted in the pool's limits and must live as long as the VM. There is none if the pool
    /// has ended the VM already.
    pub fn into_inner(mut self) -> (B::Vm, Option<Reservation>) {
        let Some(vm) = self.vm.take() else {
            // Every method that empties a lease also consumes it.
            unreachable!("a lease that was given up is used again")
        };
        (vm, self.shared.withdraw(self.id))
    }

    /// Gives the VM back and resolves when it is destroyed. Cancelling the future is fine: the VM
    /// is destroyed all the same.
    pub async fn release(mut self) {
        let (done, destroyed) = oneshot::channel();
        self.give_back(Some(done));
        drop(self);
        // An error means that the pool is gone, and the VM with it.
        let _ = destroyed.await;
    }

    fn give_back(&mut self, done: Released) {
        let Some(vm) = self.vm.take() else { return };
        if self.touched
            && let Some(profile) = self.shared.profile(self.profile)
        {
            profile.metrics.lease.record(self.since.elapsed());
        }
        let at = (&self.home, self.id);
        match self.shared.take_back(at, vm, !self.touched, done) {
            Ok(()) => {}
            Err(Stray::Late(vm, done)) => {
                // If nobody listens, the pool has stopped: the VM comes back in the error and is
                // dropped.
                let _ = self.home.send(Message::Stray(Some(self.id), vm, done));
            }
            Err(Stray::Adrift(vm, adrift)) => {
                drop(vm);
                drop(adrift);
                self.shared.stepped();
            }
        }
    }
}

impl<B: Backend> Drop for Lease<B> {
    fn drop(&mut self) {
        self.give_back(None);
    }
}

impl<B: Backend> Deref for Lease<B> {
    type Target = B::Vm;

    fn deref(&self) -> &B::Vm {
        match &self.vm {
            Some(vm) => vm,
            None => unreachable!("a lease that was given up is used again"),
        }
    }
}

impl<B: Backend> DerefMut for Lease<B> {
    fn deref_mut(&mut self) -> &mut B::Vm {
        match &mut self.vm {
            Some(vm) => vm,
            None => unreachable!("a lease that was given up is used again"),
        }
    }
}

impl<B: Backend> fmt::Debug for Lease<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease")
            .field("vm", &self.id)
            .field("profile", &self.profile())
            .finish()
    }
}
