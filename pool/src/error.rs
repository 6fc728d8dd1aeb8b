//! What can go wrong, one enum for each operation.

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
    /// None is ready; boot one, or wait with `acquire_timeout`.
    #[error("no VM of profile {profile:?} is ready: {why}")]
    Exhausted {
        /// The profile.
        profile: String,
        /// Why.
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
    /// None became ready in time.
    #[error("no VM of profile {profile:?} became ready within {waited:?}: {why}")]
    Timeout {
        /// The profile.
        profile: String,
        /// How long the caller waited.
        waited: Duration,
        /// Why there still is none.
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
    /// All that the request needs and the profile has not.
    pub mismatches: Vec<Mismatch>,
}

/// Why a boot added no VM to the pool.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum BootFailure {
    /// The backend could not make it; see [`source`](Error::source).
    Backend(Arc<dyn Error + Send + Sync>),
    /// It took longer than this.
    TimedOut(Duration),
    /// It was made but did not prove healthy.
    Unhealthy(ProbeError),
    /// The backend panicked.
    Panicked,
    /// The host's limits are reached.
    Denied(Denial),
    /// So many boots failed in a row that none is tried for a while.
    BreakerOpen(u32),
    /// The host is short of memory: no stock is made until it has some again.
    MemoryPressure,
    /// It was given up: nobody wants it any more.
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

/// What one call of `replenish` did.
#[derive(Debug, Clone)]
pub enum Replenished {
    /// One VM was added.
    Booted(VmId),
    /// The pool holds as many as it should.
    Full,
    /// The one boot failed.
    Failed(BootFailure),
}

/// Why an offered VM was not adopted. The VM comes back with it.
pub struct OfferError<V> {
    /// The VM, unless the runtime ended under the pool.
    pub vm: Option<V>,
    /// Why.
    pub why: OfferRefusal,
}

/// Why an offered VM was not adopted.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum OfferRefusal {
    /// The pool holds as many as it should.
    #[error("the pool is full")]
    Full,
    /// It was made for another profile, or has been handed out before.
    #[error("the VM was made for another profile, or has been used")]
    Unfit,
    /// It did not prove healthy.
    #[error("the VM did not prove healthy")]
    Unhealthy(#[source] ProbeError),
    /// The host's limits are reached.
    #[error("the host's limits are reached")]
    Denied(#[source] Denial),
    /// The pool does not run.
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

/// Why a pool did not start. All that was made is destroyed.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// It has been started already.
    #[error("the pool is running already")]
    Running,
    /// It is being stopped.
    #[error("the pool is stopping; await stop before starting again")]
    Stopping,
    /// A profile has not a single VM.
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
    /// VMs that the start was to make ready: none while the profile is drained, or with
    /// [`Refill::Manual`](crate::Refill::Manual).
    pub wanted: usize,
    /// VMs that are ready, whoever made them.
    pub booted: usize,
    /// What failed, and why.
    pub failures: Vec<StartFailure>,
}

impl ProfileStart {
    /// Whether it keeps the pool from starting: it has not a single VM, and should.
    #[must_use]
    pub fn is_lacking(&self) -> bool {
        self.booted == 0 && (self.wanted > 0 || !self.failures.is_empty())
    }
}

/// One thing that failed during a start.
#[derive(Debug, Clone)]
pub struct StartFailure {
    /// The VM; none if the backend could not even get ready for the profile.
    pub vm: Option<VmId>,
    /// Why.
    pub why: BootFailure,
}

/// The profile has no such name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown profile {name:?}; known are: {}", known.join(", "))]
pub struct UnknownProfile {
    /// The name asked for.
    pub name: String,
    /// All names.
    pub known: Vec<String>,
}

/// Why a profile keeps its size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ResizeError {
    /// There is no such profile.
    #[error(transparent)]
    UnknownProfile(#[from] UnknownProfile),
    /// All pools full would no longer fit.
    #[error("all pools full would need more than the limits allow")]
    TooLarge(#[source] Denial),
}

/// The deadline passed first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotReady {
    /// Some profile was not full.
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
