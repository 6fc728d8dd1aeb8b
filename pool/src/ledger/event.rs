//! What the ledger is told and what it asks for.

use tokio::time::Instant;

use super::{PassId, ProfileId, TicketId, WaiterId};
use crate::slot::VmId;

/// Something that happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Event {
    /// The pool is asked to start: boots for tickets only.
    Start,
    /// The start is complete: callers are served, stock is refilled.
    Run,
    /// The pool is asked to stop, leases to be back by then.
    Stop(Instant),
    /// Someone asks for at most one boot.
    Replenish(ProfileId, TicketId),
    /// Someone brings a VM of their own.
    Offer(ProfileId, TicketId),
    /// The owner of a ticket has gone.
    Forget(TicketId),
    /// A boot (or the check of an offered VM) succeeded.
    Booted(VmId),
    /// It failed; whether there is a VM to destroy.
    BootFailed(VmId, bool),
    /// It never began: the host's limits are reached.
    Denied(VmId),
    /// Something was given back to the host's limits.
    CapacityFreed,
    /// A caller that waited no longer does.
    Leave(WaiterId),
    /// A lease is over; the VM was used, or is dead.
    Returned(VmId),
    /// A VM that was served was never picked up and, unless it has ended, is as good as new.
    Untouched(VmId),
    /// The owner of a lease keeps the VM for good.
    Withdrawn(VmId),
    /// A VM ended by itself.
    Ended(VmId),
    /// At most so many VMs are to be checked, oldest first.
    BeginCheck(ProfileId, usize, PassId),
    /// A check is over.
    Checked(VmId, u64, bool),
    /// The owner of a pass has gone.
    AbandonPass(PassId),
    /// A VM is no more.
    Retired(VmId),
    /// A leased VM was ended by the pool.
    Killed(VmId),
    /// A lease that was asked about is in use.
    Active(VmId),
    /// A lease that was asked about is not.
    Idle(VmId),
    /// Another size.
    Resize(ProfileId, usize),
    /// Empty the profile and keep it empty.
    Drain(ProfileId),
    /// Fill it again.
    Undrain(ProfileId),
    /// Whether the host is short of memory.
    Pressure(bool),
    /// Time went by.
    Tick,
}

/// Something to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    /// Reserve and boot; answer `Booted`, `BootFailed` or `Denied`.
    Boot(ProfileId, VmId),
    /// Reserve for and check the VM of this offer; answer as for a boot.
    Join(ProfileId, VmId, TicketId),
    /// End that boot; still answer.
    CancelBoot(VmId),
    /// The VM is ready: park it as the policy says, watch for its end.
    Park(VmId),
    /// Check it under this number; answer `Checked`.
    Check(ProfileId, VmId, u64, PassId),
    /// Hand the VM to the waiter; answer `Ended` and `Untouched`, and line the waiter up again, if
    /// the VM is dead; `Untouched` if nobody came.
    Serve(ProfileId, WaiterId, VmId),
    /// Turn the waiter away.
    Reject(WaiterId, Refusal),
    /// Answer the ticket.
    Settle(TicketId, Outcome),
    /// Destroy; answer `Retired`.
    Retire(VmId),
    /// The VM is no more, or no longer the pool's: drop what is kept about it.
    Drop(VmId),
    /// End the VM of a lease; answer `Killed`.
    Kill(VmId, Overdue),
    /// Tell whether the lease is in use; answer `Active` or `Idle`.
    AskIdle(VmId),
    /// The size has changed by itself.
    Resized(ProfileId, usize),
    /// Nothing is left.
    Stopped,
}

/// Why a lease is ended by the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Overdue {
    /// It was out for too long.
    Deadline,
    /// It was not used for too long.
    Idle,
    /// The pool stops.
    Stopping,
}

/// What became of a ticket.
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
    /// So many boots failed in a row that none is tried for a while.
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
    /// None is ready.
    Exhausted(Shortage),
}

impl Refusal {
    /// Whether a caller found nothing ready, rather than was not to be served at all.
    pub(crate) fn is_miss(self) -> bool {
        matches!(self, Self::Exhausted(why) if !matches!(why, Shortage::LeaseLimit(_)))
    }

    /// Whether the caller would have been served if more VMs were kept warm.
    pub(super) fn asks_for_stock(self) -> bool {
        self.is_miss() && self != Self::Exhausted(Shortage::HostLimits)
    }
}

/// Why none is ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum Shortage {
    /// As many leases are out as `max_concurrent_vms` allows.
    #[error("all {0} concurrent VMs are leased; return one or raise max_concurrent_vms")]
    LeaseLimit(usize),
    /// Others came first.
    #[error("{0} callers wait already")]
    Queue(usize),
    /// Boots fail and are not tried for a while.
    #[error("the last {0} boots failed and the breaker is open; see the profile's last failure")]
    BreakerOpen(u32),
    /// A boot failed and is tried again soon.
    #[error("the last {0} boots failed, the next is about to be tried")]
    BackingOff(u32),
    /// The host's limits are reached.
    #[error("the limits on VMs, vCPUs or memory are reached")]
    HostLimits,
    /// The host is short of memory.
    #[error("the host is short of memory, so nothing is booted")]
    MemoryPressure,
    /// The profile was resized to nothing.
    #[error("the profile keeps no VMs: resize it")]
    NoSize,
    /// So many are booting.
    #[error("{0} are booting")]
    Booting(usize),
    /// Automatic refill is off.
    #[error("none is ready and automatic refill is off; call replenish")]
    RefillOff,
    /// None is ready yet.
    #[error("none is ready yet")]
    Empty,
}
