//! What a pool tells those who watch it.

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
    /// The profile; none if it concerns the pool as a whole.
    pub profile: Option<Arc<str>>,
    /// The VM, if it concerns one.
    pub vm: Option<VmId>,
    /// What.
    pub kind: EventKind,
}

/// What happened.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum EventKind {
    /// The pool serves.
    Started,
    /// The pool is asked to stop.
    Stopping,
    /// Nothing of the pool is left.
    Stopped,
    /// A boot began.
    Booting,
    /// A VM was parked for the first time, so long after its boot began.
    Ready(Duration),
    /// A boot failed.
    BootFailed(BootFailure),
    /// So many boots in a row failed that the breaker opened.
    BreakerOpened(u32),
    /// A boot succeeded after the breaker had opened.
    BreakerClosed,
    /// The profile's template could not be made: VMs boot from cold, and it is tried again.
    TemplateFailed(Arc<dyn Error + Send + Sync>),
    /// The profile has a template after all.
    TemplateMade,
    /// A VM went to a caller.
    Leased,
    /// It came back, used or, if untouched, as good as new.
    Returned {
        /// Whether it was parked again.
        untouched: bool,
    },
    /// Its caller keeps it.
    Withdrawn,
    /// A VM ended by itself.
    Ended,
    /// A VM did not prove healthy.
    Unhealthy(ProbeError),
    /// The pool ended the VM of a lease.
    Overdue(Overdue),
    /// A VM was destroyed.
    Destroyed,
    /// The size was changed, by a call or by demand.
    Resized(usize),
    /// Refill stopped (or went on) because of the host's memory.
    MemoryPressure(bool),
}
