//! The metrics of a pool, through the `metrics` facade. Install a recorder before making the pool.
//!
//! All carry the label `profile`.
//!
//! | name | kind | what |
//! |---|---|---|
//! | `hearth_pool_size` | gauge | VMs to keep warm |
//! | `hearth_pool_ready` | gauge | parked VMs that are not under check |
//! | `hearth_pool_checking` | gauge | parked VMs under check |
//! | `hearth_pool_booting` | gauge | VMs that are booting |
//! | `hearth_pool_leased` | gauge | leased VMs |
//! | `hearth_pool_retiring` | gauge | VMs being destroyed |
//! | `hearth_pool_waiting` | gauge | waiting callers |
//! | `hearth_pool_breaker_open` | gauge | 1 while the breaker is open |
//! | `hearth_pool_without_template` | gauge | 1 while VMs boot from cold for lack of a template |
//! | `hearth_pool_template_failures_total` | counter | times that the template could not be made |
//! | `hearth_pool_hits_total` | counter | callers served |
//! | `hearth_pool_misses_total` | counter | times a caller found nothing ready |
//! | `hearth_pool_boots_total` | counter | boots that succeeded |
//! | `hearth_pool_boot_failures_total` | counter | boots that failed or were refused, by `reason` |
//! | `hearth_pool_unhealthy_total` | counter | VMs that failed a check; label `reason` |
//! | `hearth_pool_died_total` | counter | VMs that ended by themselves before they were leased |
//! | `hearth_pool_overdue_total` | counter | leases ended by the pool; label `reason` |
//! | `hearth_pool_abandoned_total` | counter | destructions that exceeded the retire timeout |
//! | `hearth_pool_acquire_seconds` | histogram | of `acquire`, to the usable lease |
//! | `hearth_pool_wait_seconds` | histogram | of `acquire_timeout`, to the usable lease |
//! | `hearth_pool_boot_seconds` | histogram | from reservation to checked VM, booted from cold |
//! | `hearth_pool_fork_seconds` | histogram | the same for a fork |
//! | `hearth_pool_ping_seconds` | histogram | of one answered probe |
//! | `hearth_pool_destroy_seconds` | histogram | of destroying one VM |
//! | `hearth_pool_lease_seconds` | histogram | from hand-off to return |
//! | `hearth_pool_vm_private_bytes` | histogram | private memory of a parked VM |

use std::time::Duration;

use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};

use crate::backend::{Making, ProbeError};
use crate::error::BootFailure;
use crate::ledger::{Counts, Overdue};

/// Metric handles of one profile, looked up once.
pub(crate) struct ProfileMetrics {
    profile: String,
    size: Gauge,
    ready: Gauge,
    checking: Gauge,
    booting: Gauge,
    leased: Gauge,
    retiring: Gauge,
    waiting: Gauge,
    breaker_open: Gauge,
    pub(crate) without_template: Gauge,
    pub(crate) template_failures: Counter,
    pub(crate) hits: Counter,
    pub(crate) misses: Counter,
    boots: Counter,
    pub(crate) died: Counter,
    pub(crate) abandoned: Counter,
    pub(crate) acquire: Histogram,
    pub(crate) wait: Histogram,
    boot: Histogram,
    fork: Histogram,
    pub(crate) ping: Histogram,
    pub(crate) destroy: Histogram,
    pub(crate) lease: Histogram,
    pub(crate) private: Histogram,
}

impl ProfileMetrics {
    pub(crate) fn new(profile: &str) -> Self {
        let gauge = |name| gauge!(name, "profile" => profile.to_owned());
        let counter = |name| counter!(name, "profile" => profile.to_owned());
        let histogram = |name| histogram!(name, "profile" => profile.to_owned());
        Self {
            size: gauge("hearth_pool_size"),
            ready: gauge("hearth_pool_ready"),
            checking: gauge("hearth_pool_checking"),
            booting: gauge("hearth_pool_booting"),
            leased: gauge("hearth_pool_leased"),
            retiring: gauge("hearth_pool_retiring"),
            waiting: gauge("hearth_pool_waiting"),
            breaker_open: gauge("hearth_pool_breaker_open"),
            without_template: gauge("hearth_pool_without_template"),
            template_failures: counter("hearth_pool_template_failures_total"),
            hits: counter("hearth_pool_hits_total"),
            misses: counter("hearth_pool_misses_total"),
            boots: counter("hearth_pool_boots_total"),
            died: counter("hearth_pool_died_total"),
            abandoned: counter("hearth_pool_abandoned_total"),
            acquire: histogram("hearth_pool_acquire_seconds"),
            wait: histogram("hearth_pool_wait_seconds"),
            boot: histogram("hearth_pool_boot_seconds"),
            fork: histogram("hearth_pool_fork_seconds"),
            ping: histogram("hearth_pool_ping_seconds"),
            destroy: histogram("hearth_pool_destroy_seconds"),
            lease: histogram("hearth_pool_lease_seconds"),
            private: histogram("hearth_pool_vm_private_bytes"),
            profile: profile.to_owned(),
        }
    }

    pub(crate) fn show(&self, counts: &Counts) {
        self.size.set(float(counts.size));
        self.ready.set(float(counts.ready));
        self.checking.set(float(counts.checking));
        self.booting.set(float(counts.booting));
        self.leased.set(float(counts.leased));
        self.retiring.set(float(counts.retiring));
        self.waiting.set(float(counts.waiting));
        self.breaker_open
            .set(float(usize::from(counts.breaker_open)));
    }

    pub(crate) fn made(&self, how: Making, took: Duration) {
        self.boots.increment(1);
        match how {
            Making::Boot => self.boot.record(took),
            Making::Fork => self.fork.record(took),
        }
    }

    /// Counts a failed boot. `kind` is the backend's label for its error.
    pub(crate) fn boot_failed(&self, failure: &BootFailure, kind: Option<&'static str>) {
        let reason = match failure {
            BootFailure::Backend(_) => kind.unwrap_or("backend"),
            BootFailure::TimedOut(_) => "timeout",
            BootFailure::Unhealthy(_) => "unhealthy",
            BootFailure::Panicked => "panic",
            BootFailure::Denied(_) => "limits",
            BootFailure::BreakerOpen(_) => "breaker",
            BootFailure::MemoryPressure => "pressure",
            BootFailure::Cancelled | BootFailure::Stopping => "cancelled",
        };
        self.count("hearth_pool_boot_failures_total", reason);
    }

    pub(crate) fn unhealthy(&self, error: &ProbeError) {
        let reason = match error {
            ProbeError::Lost => "lost",
            ProbeError::TimedOut(_) => "timeout",
            ProbeError::Wrong(_) => "wrong",
            ProbeError::Dead => "dead",
        };
        self.count("hearth_pool_unhealthy_total", reason);
    }

    pub(crate) fn overdue(&self, why: Overdue) {
        let reason = match why {
            Overdue::Deadline => "deadline",
            Overdue::Idle => "idle",
            Overdue::Stopping => "stopping",
        };
        self.count("hearth_pool_overdue_total", reason);
    }

    fn count(&self, name: &'static str, reason: &'static str) {
        counter!(name, "profile" => self.profile.clone(), "reason" => reason).increment(1);
    }
}

/// Counts are far below the 2^32 to which this is exact.
fn float(count: usize) -> f64 {
    u32::try_from(count).map_or(f64::MAX, f64::from)
}
