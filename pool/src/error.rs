//! Error types, one for each operation.

use std::error::Error;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::backend::ProbeError;
use crate::ledger::Shortage;
use crate::permit::Denial;
use crate::profile::Mismatch;
use crate::slot::VmId;

/// Why no VM was handed out.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum AcquireError {
    /// No VM is ready; boot one, or wait with `acquire_timeout`.
    #[error("no VM of profile {profile:?} is ready: {why}")]
    Exhausted {
        /// The profile.
        profile: String,
        /// Why none is ready.
        why: Shortage,
    },
    /// No profile serves the request.
    #[error("no profile serves the request: {}", Listed(.0))]
    NotEligible(Vec<Ineligible>),
    /// There is no such profile.
    #[error("unknown profile {name:?}; known are: {}", known.join(", "))]
    UnknownProfile {
        /// The name asked for.
        name: String,
        /// All names.
        known: Vec<String>,
    },
    /// No VM became ready in time.
    #[error("no VM of profile {profile:?} became ready within {waited:?}: {why}")]
    Timeout {
        /// The profile.
        profile: String,
        /// How long the caller waited.
        waited: Duration,
        /// Why none is ready yet.
        why: Shortage,
    },
    /// The profile is being drained.
    #[error("profile {0:?} is being drained; undrain it first")]
    Draining(String),
    /// The pool stops or has stopped.
    #[error("the pool is stopping or has stopped; start it again once stop has returned")]
    Stopping,
    /// The pool was never started, or is being started just now.
    #[error("the pool has not been started, or its start is not over yet")]
    NotStarted,
}

/// Why one profile does not serve a request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{profile}: {}", Listed(.mismatches))]
pub struct Ineligible {
    /// The profile.
    pub profile: String,
    /// Everything that the request needs and the profile lacks.
    pub mismatches: Vec<Mismatch>,
}

/// Why a boot added no VM to the pool.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum BootFailure {
    /// The backend could not make the VM; see [`source`](Error::source).
    Backend(Arc<dyn Error + Send + Sync>),
    /// The boot took longer than this.
    TimedOut(Duration),
    /// The VM was made but failed its first check.
    Unhealthy(ProbeError),
    /// The backend panicked.
    Panicked,
    /// The host's limits are reached.
    Denied(Denial),
    /// This many boots failed in a row, so none is tried for a while.
    BreakerOpen(u32),
    /// The host is short of memory: until it recovers, only VMs for waiting callers are booted.
    MemoryPressure,
    /// The boot was cancelled: its VM is no longer needed.
    Cancelled,
    /// The pool stops.
    Stopping,
}

impl fmt::Display for BootFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Backend(_) => f.write_str("the VM could not be made"),
            Self::TimedOut(limit) => write!(
                f,
                "the VM was not up within {limit:?}; raise boot.timeout_ms if its image is slow"
            ),
            Self::Unhealthy(_) => f.write_str("the fresh VM did not prove healthy"),
            Self::Panicked => f.write_str("the backend panicked while it made the VM"),
            Self::Denied(_) => f.write_str("the host's limits are reached"),
            Self::BreakerOpen(failures) => write!(
                f,
                "the last {failures} boots failed, none is tried for a while; see the profile's last failure"
            ),
            Self::MemoryPressure => f.write_str(
                "the host is short of memory, so nothing is booted but for callers who wait; \
                 free some, or raise pressure.stall_percent",
            ),
            Self::Cancelled => f.write_str("the boot was given up"),
            Self::Stopping => f.write_str("the pool is stopping"),
        }
    }
}

impl Error for BootFailure {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Backend(cause) => Some(cause.as_ref()),
            Self::Unhealthy(cause) => Some(cause),
            Self::Denied(cause) => Some(cause),
            Self::TimedOut(_)
            | Self::Panicked
            | Self::BreakerOpen(_)
            | Self::MemoryPressure
            | Self::Cancelled
            | Self::Stopping => None,
        }
    }
}

/// Result of one call of `replenish`.
#[derive(Debug, Clone)]
pub enum Replenished {
    /// One VM was added.
    Booted(VmId),
    /// The profile holds as many VMs as it should.
    Full,
    /// The one boot failed.
    Failed(BootFailure),
}

/// An offered VM that was not adopted, and why.
pub struct OfferError<V> {
    /// The VM; none if the pool's runtime ended before it answered.
    pub vm: Option<V>,
    /// Why it was not adopted.
    pub why: OfferRefusal,
}

/// Why an offered VM was not adopted.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum OfferRefusal {
    /// The profile holds as many VMs as it should.
    #[error("the pool is full")]
    Full,
    /// The VM was made for another profile, or has been handed out before.
    #[error("the VM was made for another profile, or has been used")]
    Unfit,
    /// The VM failed its check.
    #[error("the VM did not prove healthy")]
    Unhealthy(#[source] ProbeError),
    /// The host's limits are reached.
    #[error("the host's limits are reached")]
    Denied(#[source] Denial),
    /// The pool is not running.
    #[error("the pool is stopping or has not been started")]
    Stopping,
    /// There is no such profile.
    #[error("unknown profile {0:?}")]
    UnknownProfile(String),
}

impl<V> fmt::Display for OfferError<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the offered VM was refused")
    }
}

impl<V> fmt::Debug for OfferError<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OfferError")
            .field("why", &self.why)
            .finish_non_exhaustive()
    }
}

impl<V> Error for OfferError<V> {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        Some(&self.why)
    }
}

/// Why a pool did not start. All VMs that the start made are destroyed.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// It has been started already.
    #[error("the pool is running already")]
    Running,
    /// It is being stopped.
    #[error("the pool is stopping; await stop before starting again")]
    Stopping,
    /// A profile has no VM at all.
    #[error("no VM at all could be booted for: {}", names(.0))]
    NoVm(StartReport),
    /// There is no tokio runtime to run on.
    #[error("a pool must be started within a tokio runtime")]
    NoRuntime,
}

/// How a start went, profile by profile.
#[derive(Debug, Clone, Default)]
pub struct StartReport {
    /// In the order of the configuration.
    pub profiles: Vec<ProfileStart>,
}

/// How the start of one profile went.
#[derive(Debug, Clone)]
pub struct ProfileStart {
    /// The profile.
    pub profile: String,
    /// VMs that the start had to make ready: 0 while the profile is drained, or with
    /// [`Refill::Manual`](crate::Refill::Manual).
    pub wanted: usize,
    /// VMs that are ready, made by this start or otherwise.
    pub booted: usize,
    /// What failed, and why.
    pub failures: Vec<StartFailure>,
}

impl ProfileStart {
    /// Whether this profile keeps the pool from starting: it has no VM although some were wanted or
    /// something failed.
    #[must_use]
    pub fn is_lacking(&self) -> bool {
        self.booted == 0 && (self.wanted > 0 || !self.failures.is_empty())
    }
}

/// One thing that failed during a start.
#[derive(Debug, Clone)]
pub struct StartFailure {
    /// The VM whose boot failed; none if the backend could not prepare the profile, or no boot was
    /// begun.
    pub vm: Option<VmId>,
    /// Why it failed.
    pub why: BootFailure,
}

/// There is no profile of this name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown profile {name:?}; known are: {}", known.join(", "))]
pub struct UnknownProfile {
    /// The name asked for.
    pub name: String,
    /// All names.
    pub known: Vec<String>,
}

/// Why a profile was not resized.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ResizeError {
    /// There is no such profile.
    #[error(transparent)]
    UnknownProfile(#[from] UnknownProfile),
    /// All profiles at their full size would exceed the limits.
    #[error("all pools full would need more than the limits allow")]
    TooLarge(#[source] Denial),
}

/// Why the wait for a full pool failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotReady {
    /// Some profile was not full within this time.
    #[error("the pool was not full within {0:?}")]
    Timeout(Duration),
    /// The pool stops or has not been started.
    #[error("the pool is stopping or has not been started")]
    NotRunning,
}

fn names(report: &StartReport) -> String {
    let lacking = report.profiles.iter().filter(|start| start.is_lacking());
    let names: Vec<_> = lacking
        .map(
            |profile| match profile.failures.first().map(|first| &first.why) {
                Some(BootFailure::Backend(cause)) => format!("{} ({cause})", profile.profile),
                Some(failure) => format!("{} ({failure})", profile.profile),
                None => profile.profile.clone(),
            },
        )
        .collect();
    names.join(", ")
}

struct Listed<'a, T>(&'a [T]);

impl<T: fmt::Display> fmt::Display for Listed<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, item) in self.0.iter().enumerate() {
            let comma = if index == 0 { "" } else { "; " };
            write!(f, "{comma}{item}")?;
        }
        Ok(())
    }
}
