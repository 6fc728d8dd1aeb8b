//! Default values and bounds of a pool's settings, and the computation of its sizes.

use std::time::Duration;

/// Warm VMs per profile, in percent of `max_concurrent_vms`.
pub const WARM_POOL_PERCENT: u32 = 25;
/// Boots at a time per profile, in percent of the pool size.
pub const CONCURRENT_BOOTS_PERCENT: u32 = 50;
/// Time between two health-check rounds.
pub const HEALTH_INTERVAL: Duration = Duration::from_secs(10);
/// Probes per check before a VM that does not answer is given up.
pub const HEALTH_ATTEMPTS: u32 = 3;
/// Shortest wait between two probes of one check.
pub const HEALTH_BACKOFF_MIN: Duration = Duration::from_millis(100);
/// Longest wait between two probes of one check.
pub const HEALTH_BACKOFF_MAX: Duration = Duration::from_millis(2_000);
/// Longest wait for a pong; scaled by the backend.
pub const PING_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest wait for a connection to the agent; scaled by the backend.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest boot; scaled by the backend.
pub const BOOT_TIMEOUT: Duration = Duration::from_secs(30);
/// Shortest wait after a failed boot.
pub const BOOT_BACKOFF_MIN: Duration = Duration::from_millis(200);
/// Longest wait after a failed boot while the breaker is closed.
pub const BOOT_BACKOFF_MAX: Duration = Duration::from_secs(10);
/// Boots that fail in a row before the breaker opens.
pub const BREAKER_FAILURES: u32 = 5;
/// How long an open breaker waits before it permits one boot; doubles each time that boot fails.
pub const BREAKER_COOLDOWN: Duration = Duration::from_secs(30);
/// Longest such wait.
pub const BREAKER_COOLDOWN_MAX: Duration = Duration::from_secs(300);
/// Time after its boot within which the end of a VM that was never leased counts as a failed boot.
pub const EARLY_DEATH: Duration = Duration::from_secs(2);
/// Guest memory to which an idle, cold-booted VM is reduced.
pub const BALLOON_IDLE_TARGET_MIB: u32 = 64;
/// Longest balloon operation; scaled by the backend.
pub const BALLOON_TIMEOUT: Duration = Duration::from_secs(5);
/// Guest memory that may be promised to VMs, in percent of the host's available memory.
pub const MEMORY_OVERCOMMIT_PERCENT: u32 = 100;
/// Memory stall (`some avg10` of the host's pressure file, percent) above which refill stops.
pub const PRESSURE_STALL_PERCENT: u32 = 10;
/// Interval at which a stopped refill reads the pressure again; also how long one reading is valid.
pub const PRESSURE_RECHECK: Duration = Duration::from_secs(1);
/// How long `stop` waits for a step of the actor, and then again for its response to a wake-up,
/// before it concludes that the actor's runtime does not run.
pub const LOOP_SILENCE: Duration = Duration::from_secs(5);
/// Default time that `stop` waits for leases.
pub const STOP_DEADLINE: Duration = Duration::from_secs(30);
/// Longest destruction of one VM before the pool stops waiting for it; scaled by the backend.
pub const RETIRE_TIMEOUT: Duration = Duration::from_secs(30);
/// Smallest guest memory in MiB.
pub const MEMORY_MIN_MIB: u32 = 32;
/// Most vCPUs of one VM.
pub const VCPUS_MAX: u8 = 32;
/// Most VMs in one pool: a bound on every table, far above what one host runs.
pub const VMS_MAX: usize = 100_000;
/// Events that a slow subscriber may fall behind before it loses the oldest.
pub const EVENT_BACKLOG: usize = 1_024;

/// Warm VMs of a profile for which no size is given.
#[must_use]
pub fn warm_pool_size(max_concurrent_vms: usize, percent: u32) -> usize {
    share(max_concurrent_vms, percent)
}

/// Boots at a time for a pool of `size`.
#[must_use]
pub fn concurrent_boots(size: usize, percent: u32) -> usize {
    share(size, percent)
}

/// `max(1, floor(whole x percent / 100))`.
fn share(whole: usize, percent: u32) -> usize {
    let percent = usize::try_from(percent).unwrap_or(usize::MAX);
    (whole.saturating_mul(percent) / 100).max(1)
}
