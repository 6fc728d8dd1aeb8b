//! Events that a pool sends to its subscribers.

use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use crate::backend::ProbeError;
use crate::error::BootFailure;
use crate::ledger::Overdue;
use crate::slot::VmId;

/// One thing that happened in a pool. Subscribe with [`crate::Pool::subscribe`].
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct PoolEvent {
    /// The profile; none if the event concerns the pool as a whole.
    pub profile: Option<Arc<str>>,
    /// The VM, if the event concerns one.
    pub vm: Option<VmId>,
    /// What happened.
    pub kind: EventKind,
}

/// What happened.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum EventKind {
    /// The pool has started and serves callers.
    Started,
    /// The pool was asked to stop.
    Stopping,
    /// The pool has stopped and owns no VM any more.
    Stopped,
    /// A boot began.
    Booting,
    /// A VM was parked for the first time, this long after its boot began.
    Ready(Duration),
    /// A boot failed.
    BootFailed(BootFailure),
    /// The breaker opened because this many boots failed in a row.
    BreakerOpened(u32),
    /// A boot succeeded after the breaker had opened.
    BreakerClosed,
    /// The profile's template could not be made: VMs boot from cold until a retry succeeds.
    TemplateFailed(Arc<dyn Error + Send + Sync>),
    /// A retry made the profile's template.
    TemplateMade,
    /// A VM was leased to a caller.
    Leased,
    /// A leased VM was returned to the pool.
    Returned {
        /// Whether the VM is unused and was kept for another caller.
        untouched: bool,
    },
    /// A caller took its leased VM out of the pool for good.
    Withdrawn,
    /// A VM ended by itself.
    Ended,
    /// A VM failed a health check.
    Unhealthy(ProbeError),
    /// The pool ended the VM of a lease.
    Overdue(Overdue),
    /// A VM was destroyed.
    Destroyed,
    /// The number of VMs to keep warm was changed, by a call or by autoscaling.
    Resized(usize),
    /// Refill stopped (true) or resumed (false) because of the host's memory.
    MemoryPressure(bool),
}
