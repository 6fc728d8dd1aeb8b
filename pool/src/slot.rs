//! The pool's record of one VM.

use std::fmt;

use tokio_util::sync::CancellationToken;

use crate::backend::Backend;
use crate::lease::Released;
use crate::ledger::ProfileId;
use crate::permit::Reservation;

/// The number of a VM, unique in its pool and never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VmId(pub u64);

impl fmt::Display for VmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vm-{}", self.0)
    }
}

/// The resources of a VM from its reservation to its end. Dropping the slot releases them all.
pub(crate) struct Slot<B: Backend> {
    pub(crate) profile: ProfileId,
    /// Absent while it boots and while it is leased.
    pub(crate) vm: Option<B::Vm>,
    /// Present from the moment there is a VM.
    pub(crate) remote: Option<std::sync::Arc<B::Remote>>,
    /// Released when nothing of the VM is left except, at most, a lease's handle of the ended VM.
    pub(crate) reservation: Option<Reservation>,
    /// Cancels the boot or the check that is under way.
    pub(crate) job: Option<CancellationToken>,
    /// Cancels the task that watches for the VM's end.
    pub(crate) watch: Option<CancellationToken>,
    /// Notified when the VM is destroyed.
    pub(crate) released: Released,
    /// The last reading of [`crate::backend::Remote::activity`].
    pub(crate) activity: Option<u64>,
}

impl<B: Backend> Slot<B> {
    pub(crate) fn new(profile: ProfileId, reservation: Reservation) -> Self {
        Self {
            profile,
            vm: None,
            remote: None,
            reservation: Some(reservation),
            job: None,
            watch: None,
            released: None,
            activity: None,
        }
    }
}

impl<B: Backend> Drop for Slot<B> {
    fn drop(&mut self) {
        for task in [&self.job, &self.watch].into_iter().flatten() {
            task.cancel();
        }
    }
}
