//! The shortest way from nothing to a program's output: a warm pool of one profile, one hand-off.
//!
//! The first run builds the guest's kernel, which takes minutes; `HEARTH_KERNEL` names one of your own.

use std::error::Error;
use std::path::Path;
use std::time::Instant;

use hearth_agent::client::OutputLimits;
use hearth_images::{GuestImage, Images, ImagesError, Silent};
use hearth_pool::kvm::{KvmBackend, KvmImage};
use hearth_pool::{Pool, PoolConfig, Profile};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let image = tokio::task::spawn_blocking(image).await??;
    let config = PoolConfig::new(4).profile(
        Profile::new("base", "base")
            .memory_mib(128)
            .warm_pool_size(2),
    );
    let backend = KvmBackend::builder(&config)?
        .image(
            "base",
            KvmImage {
                kernel: image.kernel,
                initramfs: image.initramfs,
                append: String::new(),
            },
        )
        .build();
    let pool = Pool::new(backend, config)?;

    let began = Instant::now();
    let report = pool.start().await?;
    println!("started in {:?}: {report:?}", began.elapsed());

    let began = Instant::now();
    let guest = pool.acquire("base")?;
    println!("acquired {} in {:?}", guest.id(), began.elapsed());
    guest.ping().await?;
    println!("pong after {:?}", began.elapsed());
    let command = guest.command("uname").arg("-r");
    let output = guest
        .exec(command)
        .await?
        .output(OutputLimits::default())
        .await?;
    print!(
        "{} after {:?}: {}",
        output.status,
        began.elapsed(),
        String::from_utf8_lossy(&output.stdout)
    );
    guest.release().await;

    pool.stop().await;
    println!("{:?}", pool.status());
    Ok(())
}

/// Our kernel, or the one that `HEARTH_KERNEL` names, and the agent.
fn image() -> Result<GuestImage, ImagesError> {
    let images = Images::open(None)?;
    match std::env::var_os("HEARTH_KERNEL") {
        Some(kernel) => images.with_kernel(Path::new(&kernel), &Silent),
        None => images.base(&Silent),
    }
}
