//! Helpers of the contract tests: pools on a fake backend, refilled by hand or automatically.

use std::time::Duration;

use hearth_pool::config::HealthConfig;
use hearth_pool::fake::{Boot, FakeBackend, FakeHost, FakeVmHandle, Gate};
use hearth_pool::{Counts, Phase, Pool, PoolConfig, Profile, Refill};

pub(crate) const PY: &str = "python";
pub(crate) const JS: &str = "javascript";

pub(crate) fn secs(secs: u64) -> Duration {
    Duration::from_secs(secs)
}

pub(crate) fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// Returns a configuration of one profile of this size, without automatic health checks.
pub(crate) fn config(size: usize) -> PoolConfig {
    PoolConfig::new(100)
        .profile(Profile::new(PY, PY).warm_pool_size(size))
        .health(quiet())
}

pub(crate) fn quiet() -> HealthConfig {
    let mut health = HealthConfig::default();
    health.interval_ms = 0;
    health
}

pub(crate) fn make(fake: &FakeBackend, config: PoolConfig) -> Pool<FakeBackend> {
    Pool::with_host(fake.clone(), config, FakeHost::new(None)).expect("a valid configuration")
}

/// Returns a started pool that refills automatically.
pub(crate) async fn running(fake: &FakeBackend, config: PoolConfig) -> Pool<FakeBackend> {
    let pool = make(fake, config);
    pool.start().await.expect("starts");
    pool
}

/// Returns a started, empty pool, in which every boot is a call of `replenish`.
pub(crate) async fn by_hand(fake: &FakeBackend, config: PoolConfig) -> Pool<FakeBackend> {
    running(fake, config.refill(Refill::Manual)).await
}

/// Lets every task run as far as it can without time passing.
pub(crate) async fn settle() {
    for _ in 0..200 {
        tokio::task::yield_now().await;
    }
}

pub(crate) fn counts(pool: &Pool<FakeBackend>, profile: &str) -> Counts {
    pool.status().profile(profile).expect("the profile").counts
}

pub(crate) fn ready(pool: &Pool<FakeBackend>) -> usize {
    counts(pool, PY).ready
}

/// Returns the live VMs in the order in which they were made.
pub(crate) fn parked(fake: &FakeBackend) -> Vec<FakeVmHandle> {
    fake.live()
}

/// Makes the profile's boots wait at a gate, and returns the gate.
pub(crate) fn gated(fake: &FakeBackend, profile: &str) -> Gate {
    let gate = Gate::new();
    fake.by_default(profile, Boot::Gate(gate.clone()));
    gate
}

/// Stops the pool and checks that nothing is left of it.
pub(crate) async fn stop_clean(pool: Pool<FakeBackend>, fake: &FakeBackend) {
    pool.stop().await;
    let status = pool.status();
    assert_eq!(status.phase, Phase::Stopped);
    assert_eq!(status.usage.vms, 0, "{status:?}");
    assert!(fake.live().is_empty(), "{:?}", fake.live());
    for profile in &status.profiles {
        let counts = profile.counts;
        let left = counts.ready
            + counts.checking
            + counts.booting
            + counts.leased
            + counts.retiring
            + counts.waiting;
        assert_eq!(left, 0, "{profile:?}");
    }
}

/// Opens the gate at a boot's first answer, and resizes the profile to zero when the answer is
/// there but the pool has not received it yet.
pub(crate) async fn shrunk_behind_the_answer(pool: &Pool<FakeBackend>, gate: Gate) {
    gate.held(1).await;
    gate.open();
    let shrinking = pool.clone();
    let shrink = tokio::spawn(async move {
        assert_eq!((gate.waiting(), counts(&shrinking, PY).booting), (0, 1));
        shrinking.resize(PY, 0).unwrap();
    });
    shrink.await.unwrap();
}
