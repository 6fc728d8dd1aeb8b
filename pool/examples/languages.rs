//! Runs code in guests whose interpreters are warm, and prints the time from asking for a guest to
//! the value of `6 * 7`.
//!
//! `cargo run --release --example languages [python] [javascript] [shell]`; all three when none is
//! named. The first time, the images are built (seconds) and an interpreter of each is started for
//! the template (where ring 0 is emulated, a minute for Node.js); both are cached.

use std::error::Error;
use std::time::{Duration, Instant};

use hearth_agent::client::{Call, CallEnd};
use hearth_images::{Images, Recipe, Silent};
use hearth_pool::kvm::{KvmBackend, KvmImage};
use hearth_pool::{Language, Pool, PoolConfig, Profile};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let named: Result<Vec<Language>, _> =
        std::env::args().skip(1).map(|name| name.parse()).collect();
    let named = named?;
    let languages = if named.is_empty() {
        Language::ALL.to_vec()
    } else {
        named
    };
    for language in languages {
        show(language).await?;
    }
    Ok(())
}

async fn show(language: Language) -> Result<(), Box<dyn Error>> {
    let start = Instant::now();
    let image = tokio::task::spawn_blocking(move || {
        let images = Images::open(None)?;
        let base = images.base(&Silent)?;
        let root = images.root(&Recipe::built_in(language.as_str())?, &Silent)?;
        Ok::<_, Box<dyn Error + Send + Sync>>(KvmImage::new(base.kernel, base.initramfs).root(root))
    });
    let image = image.await?.map_err(|error| error.to_string())?;
    println!("{language}");
    phase("image", start.elapsed(), "found or built");

    let config = PoolConfig::new(2).profile(Profile::of(language).warm_pool_size(2));
    let backend = KvmBackend::builder(&config)?.image(language.as_str(), image);
    let pool = Pool::new(backend.build(), config)?;
    let start = Instant::now();
    pool.start().await?;
    phase(
        "start",
        start.elapsed(),
        "two guests with an interpreter that has run code",
    );

    let start = Instant::now();
    let guest = pool.acquire(language)?;
    phase(
        "acquire",
        start.elapsed(),
        "a ready guest changed its owner",
    );
    let mut session = guest.session().await?;
    let code = match language {
        Language::Shell => "echo $((6 * 7))",
        _ => "6 * 7",
    };
    let outcome = session.run(code).await?;
    phase(
        "value",
        start.elapsed(),
        "since acquire began: the code has run",
    );
    println!(
        "  {code} => {:?}, printed {:?}",
        outcome.end,
        String::from_utf8_lossy(&outcome.stdout)
    );

    let start = Instant::now();
    let again = session.run(code).await?;
    phase(
        "again",
        start.elapsed(),
        "another call, in the same interpreter",
    );

    let endless = match language {
        Language::Python => "while True: pass",
        Language::Javascript => "for (;;);",
        _ => "sleep 1000",
    };
    let start = Instant::now();
    let outcome = session
        .run(Call::new(endless).timeout(Duration::from_millis(100)))
        .await?;
    phase(
        "stopped",
        start.elapsed(),
        "code without an end, given 100 ms",
    );
    let kept = again.end == session.run(code).await?.end;
    drop((session, guest));
    pool.stop().await;
    match (outcome.timed_out, again.end) {
        (true, CallEnd::Value(_)) if kept => Ok(()),
        (_, end) => Err(format!("{language}: {end:?}").into()),
    }
}

fn phase(name: &str, took: Duration, what: &str) {
    let micros = took.as_micros();
    println!("  {name:<8} {micros:>12} us  {what}");
}
