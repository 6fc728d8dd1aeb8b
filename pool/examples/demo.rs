//! The program of `make demo`: runs one program in a guest from a warm pool, and prints the time of
//! each step.
//!
//! The guest's kernel and initramfs are built first if they are not cached, which takes minutes.

use std::error::Error;
use std::time::{Duration, Instant};

use hearth_agent::client::OutputLimits;
use hearth_images::{Images, Silent};
use hearth_pool::kvm::{KvmBackend, KvmImage};
use hearth_pool::{EventKind, Pool, PoolConfig, Profile};
use hearth_vmm::Host;

/// VMs kept warm.
const WARM: usize = 2;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let start = Instant::now();
    let image = tokio::task::spawn_blocking(|| Images::open(None)?.base(&Silent)).await??;
    phase(
        "image",
        start.elapsed(),
        "kernel and initramfs found or built",
    );

    let start = Instant::now();
    let kind = Host::get()?.profile();
    phase(
        "host",
        start.elapsed(),
        &format!("probed: ring 0 is {kind:?}").to_lowercase(),
    );

    let profile = Profile::new("demo", "base")
        .memory_mib(128)
        .warm_pool_size(WARM);
    let config = PoolConfig::new(4).profile(profile);
    let backend = KvmBackend::builder(&config)?
        .image("base", KvmImage::new(image.kernel, image.initramfs))
        .build();
    let pool = Pool::new(backend, config)?;
    let mut events = pool.subscribe();

    let start = Instant::now();
    pool.start().await?;
    phase(
        "start",
        start.elapsed(),
        "one guest booted as a template, the pool filled",
    );
    while let Ok(event) = events.try_recv() {
        if let EventKind::Ready(took) = event.kind {
            phase(
                "  ready",
                took,
                "one of the pool's guests, made and checked",
            );
        }
    }

    let start = Instant::now();
    let guest = pool.acquire("demo")?;
    phase(
        "acquire",
        start.elapsed(),
        "a ready guest changed its owner",
    );

    let start = Instant::now();
    guest.ping().await?;
    phase("ping", start.elapsed(), "its agent answered");

    let start = Instant::now();
    let command = guest.command("uname");
    let output = guest
        .exec(command)
        .await?
        .output(OutputLimits::default())
        .await?;
    phase("exec", start.elapsed(), "`uname` ran in the guest");

    let start = Instant::now();
    guest.release().await;
    phase("release", start.elapsed(), "the guest is destroyed");
    let start = Instant::now();
    pool.stop().await;
    phase("stop", start.elapsed(), "nothing of the pool is left");

    println!(
        "\nthe program in the guest ended with {} and said:",
        output.status
    );
    print!("{}", String::from_utf8_lossy(&output.stdout));
    if output.status.success() {
        Ok(())
    } else {
        Err("the program failed".into())
    }
}

fn phase(name: &str, took: Duration, what: &str) {
    let micros = took.as_micros();
    println!("{name:<10} {micros:>12} us  {what}");
}
