//! Leases. A lease gives a VM to a caller until the lease is dropped.

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
/// Dereferences to the backend's VM. A lease may be dropped anywhere and at any moment, which gives
/// the VM back: the drop only moves the VM back into its slot, under the lock that acquire takes.
/// Another caller can take a lease in its place at once; the VM is destroyed in the pool's own
/// tasks. Use [`release`](Self::release) to wait for that, and [`into_inner`](Self::into_inner) to
/// keep the VM.
#[must_use = "dropping a lease destroys its VM"]
pub struct Lease<B: Backend> {
    shared: Arc<Shared<B>>,
    /// Mailbox of the actor of the generation that the VM belongs to; used if the VM has no slot
    /// any more and that generation still runs.
    home: Home<B>,
    id: VmId,
    profile: ProfileId,
    since: Instant,
    /// Present until the lease is over.
    vm: Option<B::Vm>,
    /// Whether the VM was handed to a caller; before that, it is returned unused.
    touched: bool,
}

/// Notified when the VM of a lease is destroyed; none if nothing waits for that.
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

    /// Hands the VM to the caller.
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

    /// The name of the VM's profile.
    #[must_use]
    pub fn profile(&self) -> &str {
        self.shared
            .profile(self.profile)
            .map_or("", |profile| &profile.spec.name)
    }

    /// Checks the VM as the pool does, with the same probes, retries and verdict.
    ///
    /// # Errors
    /// Why the VM is not healthy.
    pub async fn ping(&self) -> Result<(), ProbeError> {
        let probe = || self.vm.as_ref().map(|vm| self.shared.backend.probe(vm));
        health::check(self.shared.check_rules, probe)
            .await
            .map(|_| ())
    }

    /// Takes the VM out of the pool for good. The pool refills; the reservation keeps the VM
    /// counted in the pool's limits and must live as long as the VM. There is no reservation if the
    /// pool has ended the VM already.
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
                // If the mailbox is closed, the pool has stopped: the error returns the VM, which
                // is dropped.
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
