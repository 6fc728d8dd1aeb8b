//! Events that the ledger receives, and actions that it asks for.

use tokio::time::Instant;

use super::{PassId, ProfileId, TicketId, WaiterId};
use crate::slot::VmId;

/// Something that happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Event {
    /// The pool is asked to start: only requested boots are begun.
    Start,
    /// The start is complete: callers are served, missing VMs are refilled.
    Run,
    /// The pool is asked to stop; leases must be returned by this time.
    Stop(Instant),
    /// A caller requests at most one boot.
    Replenish(ProfileId, TicketId),
    /// A caller offers a VM of its own.
    Offer(ProfileId, TicketId),
    /// The caller of a request has gone.
    Forget(TicketId),
    /// A boot (or the check of an offered VM) succeeded.
    Booted(VmId),
    /// A boot (or check) failed; the flag says whether there is a VM to destroy.
    BootFailed(VmId, bool),
    /// A boot never began: the host's limits are reached.
    Denied(VmId),
    /// Capacity within the host's limits was freed.
    CapacityFreed,
    /// A waiting caller has gone.
    Leave(WaiterId),
    /// A lease is over; the VM was used, or is dead.
    Returned(VmId),
    /// A VM that was assigned to a waiter was never picked up; unless it has ended, it is unused.
    Untouched(VmId),
    /// The owner of a lease keeps the VM for good.
    Withdrawn(VmId),
    /// A VM ended by itself.
    Ended(VmId),
    /// At most this many VMs are to be checked, those checked longest ago first.
    BeginCheck(ProfileId, usize, PassId),
    /// The check with this number is over; the flag says whether the VM is healthy.
    Checked(VmId, u64, bool),
    /// The caller of a health-check round has gone.
    AbandonPass(PassId),
    /// A VM was destroyed.
    Retired(VmId),
    /// A leased VM was ended by the pool.
    Killed(VmId),
    /// Answer to [`Action::AskIdle`]: the lease is in use.
    Active(VmId),
    /// Answer to [`Action::AskIdle`]: the lease is not in use.
    Idle(VmId),
    /// The profile gets another size.
    Resize(ProfileId, usize),
    /// Empty the profile and keep it empty.
    Drain(ProfileId),
    /// Fill the profile again.
    Undrain(ProfileId),
    /// Whether the host is short of memory.
    Pressure(bool),
    /// Time has passed.
    Tick,
}

/// An action that the ledger asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    /// Reserve resources and boot; answer `Booted`, `BootFailed` or `Denied`.
    Boot(ProfileId, VmId),
    /// Reserve resources for the VM of this offer and check it; answer as for a boot.
    Join(ProfileId, VmId, TicketId),
    /// Cancel the boot; it is still to be answered.
    CancelBoot(VmId),
    /// The VM is ready: park it as configured and watch for its end.
    Park(VmId),
    /// Check the VM under this number; answer `Checked`.
    Check(ProfileId, VmId, u64, PassId),
    /// Hand the VM to the waiter. If the VM is dead, answer `Ended` and `Untouched`, and queue the
    /// waiter again; if the waiter has gone, answer `Untouched`.
    Serve(ProfileId, WaiterId, VmId),
    /// Refuse the waiter.
    Reject(WaiterId, Refusal),
    /// Answer the request.
    Settle(TicketId, Outcome),
    /// Destroy the VM; answer `Retired`.
    Retire(VmId),
    /// The VM was destroyed, or is no longer the pool's: drop its slot.
    Drop(VmId),
    /// End the VM of a lease; answer `Killed`.
    Kill(VmId, Overdue),
    /// Find out whether the lease is in use; answer `Active` or `Idle`.
    AskIdle(VmId),
    /// Autoscaling has changed the size.
    Resized(ProfileId, usize),
    /// The pool has stopped: no VM is left.
    Stopped,
}

/// Why a lease is ended by the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Overdue {
    /// The lease was out for too long.
    Deadline,
    /// The lease was not used for too long.
    Idle,
    /// The pool stops.
    Stopping,
}

/// Outcome of a request for a boot or of an offer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// One VM was added.
    Booted(VmId),
    /// There was nothing to do.
    Full,
    /// The boot of this VM failed.
    Failed(VmId),
    /// The host's limits refused this VM.
    Denied(VmId),
    /// This many boots failed in a row, so none is tried for a while.
    BreakerOpen(u32),
    /// The host is short of memory.
    Pressed,
    /// The pool is not running.
    Stopping,
}

/// Why no VM is handed out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// The pool was never started, or its start is not over.
    NotStarted,
    /// The pool stops or has stopped.
    Stopping,
    /// The profile is being drained.
    Draining,
    /// No VM is ready.
    Exhausted(Shortage),
}

impl Refusal {
    /// Whether the refusal is a miss: no VM was ready, for another reason than the limit on leases.
    pub(crate) fn is_miss(self) -> bool {
        matches!(self, Self::Exhausted(why) if !matches!(why, Shortage::LeaseLimit(_)))
    }

    /// Whether the caller would have been served if more VMs were kept warm.
    pub(super) fn asks_for_stock(self) -> bool {
        self.is_miss() && self != Self::Exhausted(Shortage::HostLimits)
    }
}

/// Why no VM is ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum Shortage {
    /// As many leases are out as `max_concurrent_vms` allows.
    #[error("all {0} concurrent VMs are leased; return one or raise max_concurrent_vms")]
    LeaseLimit(usize),
    /// This many callers wait already.
    #[error("{0} callers wait already")]
    Queue(usize),
    /// This many boots failed in a row and the breaker is open.
    #[error("the last {0} boots failed and the breaker is open; see the profile's last failure")]
    BreakerOpen(u32),
    /// This many boots failed in a row; the next is tried soon.
    #[error("the last {0} boots failed, the next is about to be tried")]
    BackingOff(u32),
    /// The host's limits are reached.
    #[error("the limits on VMs, vCPUs or memory are reached")]
    HostLimits,
    /// The host is short of memory.
    #[error("the host is short of memory, so nothing is booted")]
    MemoryPressure,
    /// The profile was resized to 0.
    #[error("the profile keeps no VMs: resize it")]
    NoSize,
    /// This many VMs are booting.
    #[error("{0} are booting")]
    Booting(usize),
    /// Automatic refill is off.
    #[error("none is ready and automatic refill is off; call replenish")]
    RefillOff,
    /// No VM is ready yet.
    #[error("none is ready yet")]
    Empty,
}
