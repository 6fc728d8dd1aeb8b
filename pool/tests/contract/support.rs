//! What the contract tests share: pools on a fake backend, driven by hand or by themselves.

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

/// One profile of this size, no health passes by itself.
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

/// Started, refills by itself.
pub(crate) async fn running(fake: &FakeBackend, config: PoolConfig) -> Pool<FakeBackend> {
    let pool = make(fake, config);
    pool.start().await.expect("starts");
    pool
}

/// Started, empty, every boot is a call of `replenish`.
pub(crate) async fn by_hand(fake: &FakeBackend, config: PoolConfig) -> Pool<FakeBackend> {
    running(fake, config.refill(Refill::Manual)).await
}

/// Lets every task do what it can without time going by.
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

/// In the order in which they were made.
pub(crate) fn parked(fake: &FakeBackend) -> Vec<FakeVmHandle> {
    fake.live()
}

/// A boot that waits, and its gate.
pub(crate) fn gated(fake: &FakeBackend, profile: &str) -> Gate {
    let gate = Gate::new();
    fake.by_default(profile, Boot::Gate(gate.clone()));
    gate
}

/// Stops the pool and sees to it that nothing is left of it.
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

/// Opens the gate before a boot's first answer, and wants no VM any more when the answer is there
/// and the pool does not know yet.
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
