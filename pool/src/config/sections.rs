//! The tables of the configuration. Set the fields that differ from the default and take the rest
//! from `Default`, so that a new field does not break your code:
//!
//! ```
//! use hearth_pool::config::HealthConfig;
//!
//! let health = HealthConfig { attempts: 5, ..Default::default() };
//! assert_eq!(health.interval_ms, HealthConfig::default().interval_ms);
//! ```

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::policy;

/// Whole milliseconds, saturating.
pub(crate) fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// When the pool boots by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Refill {
    /// At the start and whenever VMs are missing.
    #[default]
    Automatic,
    /// At the start only.
    AtStart,
    /// Never: every boot is a call of `replenish`.
    Manual,
}

/// Health checks of parked VMs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HealthConfig {
    /// Milliseconds between two health-check rounds; 0: no periodic rounds.
    pub interval_ms: u64,
    /// Probes before a VM that does not answer is given up (1 to 100).
    pub attempts: u32,
    /// Shortest wait between two probes, in milliseconds.
    pub backoff_min_ms: u64,
    /// Longest wait between two probes, in milliseconds.
    pub backoff_max_ms: u64,
    /// Longest wait for a pong, in milliseconds; scaled by the backend.
    pub ping_timeout_ms: u64,
}

impl Default for HealthConfig {
    fn default() -> Self {
        Self {
            interval_ms: ms(policy::HEALTH_INTERVAL),
            attempts: policy::HEALTH_ATTEMPTS,
            backoff_min_ms: ms(policy::HEALTH_BACKOFF_MIN),
            backoff_max_ms: ms(policy::HEALTH_BACKOFF_MAX),
            ping_timeout_ms: ms(policy::PING_TIMEOUT),
        }
    }
}

/// Boots, and the handling of boots that fail.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BootConfig {
    /// Longest boot, in milliseconds; scaled by the backend.
    pub timeout_ms: u64,
    /// Longest wait for a connection to the agent, in milliseconds; scaled by the backend.
    pub connect_timeout_ms: u64,
    /// Shortest wait after a failure, in milliseconds.
    pub backoff_min_ms: u64,
    /// Longest wait while the breaker is closed, in milliseconds.
    pub backoff_max_ms: u64,
    /// Failures in a row that open the breaker (at least 1).
    pub breaker_failures: u32,
    /// How long an open breaker waits before it permits one boot, in milliseconds; doubles each
    /// time that boot fails.
    pub breaker_cooldown_ms: u64,
    /// Longest such wait, in milliseconds.
    pub breaker_cooldown_max_ms: u64,
    /// Time after its boot, in milliseconds, within which the end or a failed check of a VM that
    /// was never leased counts as a failed boot; 0: it does not.
    pub early_death_ms: u64,
}

impl Default for BootConfig {
    fn default() -> Self {
        Self {
            timeout_ms: ms(policy::BOOT_TIMEOUT),
            connect_timeout_ms: ms(policy::CONNECT_TIMEOUT),
            backoff_min_ms: ms(policy::BOOT_BACKOFF_MIN),
            backoff_max_ms: ms(policy::BOOT_BACKOFF_MAX),
            breaker_failures: policy::BREAKER_FAILURES,
            breaker_cooldown_ms: ms(policy::BREAKER_COOLDOWN),
            breaker_cooldown_max_ms: ms(policy::BREAKER_COOLDOWN_MAX),
            early_death_ms: ms(policy::EARLY_DEATH),
        }
    }
}

/// Balloons of parked VMs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BalloonConfig {
    /// Guest memory in MiB to which an idle, cold-booted VM is reduced.
    pub idle_target_mib: u32,
    /// Longest balloon operation, in milliseconds; scaled by the backend.
    pub timeout_ms: u64,
}

impl Default for BalloonConfig {
    fn default() -> Self {
        Self {
            idle_target_mib: policy::BALLOON_IDLE_TARGET_MIB,
            timeout_ms: ms(policy::BALLOON_TIMEOUT),
        }
    }
}

/// Limits on all existing VMs, parked ones included, over all profiles.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LimitsConfig {
    /// Most VMs; 0: [`VMS_MAX`](crate::policy::VMS_MAX).
    pub vms: usize,
    /// Most vCPUs; 0: no limit.
    pub vcpus: u64,
    /// Most guest memory in MiB; 0: what the host has available, times the overcommit.
    pub memory_mib: u64,
    /// Guest memory that may be promised to VMs, in percent of the memory that the host has
    /// available when the pool is made; more than 100 overcommits it.
    pub memory_overcommit_percent: u32,
}

impl Default for LimitsConfig {
    fn default() -> Self {
        Self {
            vms: 0,
            vcpus: 0,
            memory_mib: 0,
            memory_overcommit_percent: policy::MEMORY_OVERCOMMIT_PERCENT,
        }
    }
}

/// What to do when the host runs short of memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PressureConfig {
    /// Memory stall of the host, in percent of the last ten seconds, above which refill stops, and
    /// starts and calls of `replenish` are refused; 0: the stall is ignored.
    pub stall_percent: u32,
    /// Interval at which a stopped refill reads the stall again, in milliseconds.
    pub recheck_ms: u64,
}

impl Default for PressureConfig {
    fn default() -> Self {
        Self {
            stall_percent: policy::PRESSURE_STALL_PERCENT,
            recheck_ms: ms(policy::PRESSURE_RECHECK),
        }
    }
}

/// Bounds on leases.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LeaseConfig {
    /// Longest lease in milliseconds, after which its VM is ended; 0: no limit.
    pub deadline_ms: u64,
    /// Longest time in milliseconds without activity of the VM; 0: no limit. On KVM, a started
    /// program whose handle is held, and a task that waits for an answer on a stream of the guest,
    /// count as activity. Once in each such period the waiting tasks are woken: one that does not
    /// read again before the next wake-up no longer counts.
    pub idle_ms: u64,
}

/// Bounds between which demand moves the size of a pool, by the rule that the ledger's `autoscale`
/// module states.
///
/// At the end of each window: if callers missed `m` VMs that were not ready, grow by `m`, at most
/// to twice the size; else if at least `l` VMs were ready all the time, shrink by half of `l`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Autoscale {
    /// Smallest size, at least 1.
    pub min: usize,
    /// Largest size.
    pub max: usize,
    /// How long demand is observed before the size moves, in milliseconds.
    #[serde(default = "default_window")]
    pub window_ms: u64,
}

fn default_window() -> u64 {
    30_000
}

impl Autoscale {
    /// Between `min` and `max`, with a window of 30 s.
    #[must_use]
    pub fn between(min: usize, max: usize) -> Self {
        Self {
            min,
            max,
            window_ms: default_window(),
        }
    }

    /// Sets the window.
    #[must_use]
    pub fn window(mut self, window: Duration) -> Self {
        self.window_ms = ms(window);
        self
    }
}
