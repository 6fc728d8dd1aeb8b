//! Shared parts of the warm pool's scenarios: one template, and pools of its forks.

use std::sync::Arc;
use std::time::Duration;

use hearth_pool::config::HealthConfig;
use hearth_pool::kvm::{KvmBackend, KvmImage};
use hearth_pool::{Backend, Lease, Parking, Pool, PoolConfig, Profile, Refill, Replenished};

use super::ScenarioError;
use super::boot::{Files, Shape};

/// The one profile.
pub const PROFILE: &str = "base";
/// How long filling a pool may take before the run is given up.
const STUCK: Duration = Duration::from_secs(300);

/// A pool of real guests.
pub type Guests = Pool<Arc<KvmBackend>>;
/// A leased guest of the pool.
pub type Guest = Lease<Arc<KvmBackend>>;

/// Returns a backend that has made its template.
///
/// # Errors
/// When the host cannot run guests, or this one does not come up.
pub async fn backend(files: Files<'_>) -> Result<Arc<KvmBackend>, ScenarioError> {
    let config = config(files.shape, 1, Refill::Manual);
    let image = KvmImage::new(files.kernel, files.initramfs);
    let builder = KvmBackend::builder(&config).map_err(ScenarioError::at("host"))?;
    let backend = builder.image(PROFILE, image).build();
    for profile in &config.profiles {
        let made = backend.prepare(profile).await;
        made.map_err(ScenarioError::at("template"))?;
    }
    Ok(Arc::new(backend))
}

/// Returns the configuration of a pool of `size` guests without health checks, which only the
/// scenario disturbs.
#[must_use]
pub fn config(shape: Shape, size: usize, refill: Refill) -> PoolConfig {
    let health = HealthConfig {
        interval_ms: 0,
        ..HealthConfig::default()
    };
    let profile = Profile::new(PROFILE, PROFILE)
        .memory_mib(shape.memory_mib)
        .vcpus(shape.vcpus)
        .warm_pool_size(size);
    PoolConfig::new(2 * size.max(1))
        .profile(profile)
        .health(health)
        .refill(refill)
}

/// Starts a pool. It is full then, unless it is filled by hand.
///
/// # Errors
/// When it does not start.
pub async fn start(
    backend: &Arc<KvmBackend>,
    config: PoolConfig,
    parking: Parking,
) -> Result<Guests, ScenarioError> {
    let pool = Pool::new(Arc::clone(backend), config.park(parking))
        .map_err(ScenarioError::at("configuration"))?;
    pool.start().await.map_err(ScenarioError::at("start"))?;
    if pool.config().refill == Refill::Automatic {
        full(&pool).await?;
    }
    Ok(pool)
}

/// Waits until the pool is full.
///
/// # Errors
/// When that takes too long.
pub async fn full(pool: &Guests) -> Result<(), ScenarioError> {
    let full = pool.wait_ready(STUCK).await;
    full.map_err(ScenarioError::at("full pool"))
}

/// Fills a pool by hand, as many guests at a time as it allows.
///
/// # Errors
/// When a guest cannot be made.
pub async fn fill(pool: &Guests, size: usize) -> Result<(), ScenarioError> {
    let steps = futures::future::join_all((0..size).map(|_| pool.replenish(PROFILE))).await;
    for step in steps {
        match step.map_err(ScenarioError::at("replenish"))? {
            Replenished::Failed(why) => return Err(ScenarioError::at("boot")(why)),
            Replenished::Booted(_) | Replenished::Full => {}
        }
    }
    Ok(())
}
