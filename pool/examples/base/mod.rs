//! Shared by the examples: a pool of guests of the base image.
//!
//! The first run builds the guest's kernel, which takes minutes.

use std::error::Error;

use hearth_images::{Images, Silent};
use hearth_pool::kvm::{KvmBackend, KvmImage};
use hearth_pool::{Pool, PoolConfig, Profile};

/// The profile of the pool.
pub(crate) const BASE: &str = "base";

/// Returns a pool that keeps `warm` guests, started and full.
pub(crate) async fn pool(warm: usize) -> Result<Pool<KvmBackend>, Box<dyn Error>> {
    let image = tokio::task::spawn_blocking(|| Images::open(None)?.base(&Silent)).await??;
    let profile = Profile::new(BASE, BASE)
        .memory_mib(128)
        .warm_pool_size(warm);
    let config = PoolConfig::new(2 * warm).profile(profile);
    let image = KvmImage::new(image.kernel, image.initramfs);
    let backend = KvmBackend::builder(&config)?.image(BASE, image).build();
    let pool = Pool::new(backend, config)?;
    pool.start().await?;
    Ok(pool)
}
