//! A profile whose guest cannot be made a template.

use std::fs::OpenOptions;
use std::sync::Arc;
use std::time::Duration;

use hearth_pool::{Backend, EventKind, Making, Pool, PoolEvent};
use hearth_tests::{alone, kvm, within};
use rustix::fs::{SealFlags, fcntl_add_seals};
use tokio::sync::broadcast::Receiver;

use crate::rig::{BASE, Rig, alone_in_a_runtime, builder, config, full, run, stop};

/// Smaller files hold a kernel that is about to be sealed, not a guest's memory.
const GUEST_BYTES: u64 = 64 << 20;

/// Prevents further seals on the memory of any guest of this process, so that it cannot become a
/// template. Returns how many files it changed.
fn lock_seals() -> usize {
    let fds = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    let memory = fds.filter(|fd| {
        let name = std::fs::read_link(fd.path()).unwrap_or_default();
        name.to_string_lossy().contains("memfd:hearth-guest")
    });
    let locked = memory.filter(|fd| {
        let file = OpenOptions::new().read(true).write(true).open(fd.path());
        file.is_ok_and(|file| {
            let bytes = file.metadata().map_or(0, |file| file.len());
            bytes >= GUEST_BYTES && fcntl_add_seals(&file, SealFlags::SEAL).is_ok()
        })
    });
    locked.count()
}

async fn told(events: &mut Receiver<PoolEvent>) -> Option<String> {
    loop {
        match within(30, "word of the template", events.recv())
            .await
            .unwrap()
            .kind
        {
            EventKind::TemplateFailed(why) => {
                return Some(why.source().map_or_else(String::new, ToString::to_string));
            }
            EventKind::TemplateMade => return None,
            _ => {}
        }
    }
}

async fn refused_and_made_later() {
    let mut config = config(1);
    let retry = Duration::from_secs(2);
    config.boot.breaker_cooldown_ms = retry.as_millis() as u64;
    let backend = builder(&config).await.no_template_cache().build();
    let rig = Rig::of(Arc::new(backend));
    let profile = config.profiles[0].clone();
    let pool = Pool::new(rig.clone(), config).unwrap();
    let mut events = pool.subscribe();
    let locks = async {
        while lock_seals() == 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let (started, ()) = tokio::join!(pool.start(), locks);
    started.unwrap();
    let why = told(&mut events).await.unwrap();
    assert!(why.contains("memory could not be captured"), "{why}");
    assert_eq!(rig.making(&profile), Making::Boot);
    let guest = pool.acquire(BASE).unwrap();
    let output = run(&guest, guest.command("echo").arg("cold")).await;
    assert_eq!(output.stdout, b"cold\n");
    drop(guest);
    // The replacement may have been made before the retry was due; the one after it is not.
    full(&pool).await;
    tokio::time::sleep(retry * 2).await;
    drop(pool.acquire(BASE).unwrap());
    assert_eq!(told(&mut events).await, None);
    full(&pool).await;
    assert_eq!(rig.making(&profile), Making::Fork);
    within(6, "ping", pool.acquire(BASE).unwrap().ping())
        .await
        .unwrap();
    stop(pool).await;
}

#[test]
#[ignore = "long: three or four boots"]
fn a_guest_that_cannot_be_frozen_is_booted_cold_until_one_can() {
    if kvm() && alone() {
        alone_in_a_runtime(refused_and_made_later());
    }
}
