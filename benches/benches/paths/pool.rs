//! The hand-off and the return of a guest of the fake backend, which costs nothing to make.

use hearth_pool::config::HealthConfig;
use hearth_pool::fake::FakeBackend;
use hearth_pool::{Pool, PoolConfig, Profile};
use std::time::Duration;

use super::Walk;

const PROFILE: &str = "base";
const STUCK: Duration = Duration::from_secs(60);

pub(super) fn acquire_release() -> Walk {
    let runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = { runtime }.enable_time().build().unwrap();
    let health = HealthConfig {
        interval_ms: 0,
        ..HealthConfig::default()
    };
    let profile = Profile::new(PROFILE, PROFILE)
        .memory_mib(128)
        .warm_pool_size(4);
    let config = PoolConfig::new(8).profile(profile).health(health);
    let pool = Pool::new(FakeBackend::new(), config).unwrap();
    runtime.block_on(pool.start()).unwrap();
    Box::new(move || {
        runtime.block_on(async {
            pool.wait_ready(STUCK).await.unwrap();
            let lease = pool.acquire(PROFILE).unwrap();
            lease.release().await;
        });
    })
}
