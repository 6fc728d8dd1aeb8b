#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]
//! The balloon of a real guest. A MiB takes a tenth of a second where ring 0 is emulated, so amounts
//! are small; each case has a clone of its own.

use std::time::Duration;

use hearth_agent::client::Command;
use hearth_tests::{Guest, kvm, patience, within};
use hearth_vmm::{BalloonError, VmStatus};

/// What the contract allows the guest to keep of what it was asked for.
const SLACK_MIB: u64 = 20;
const MIB: u64 = 1 << 20;

/// Cases look at this process's memory: one at a time.
static ONE_AT_A_TIME: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

fn deadline() -> Duration {
    patience(Duration::from_secs(5))
}

/// Free memory of the guest in MiB, as it says.
async fn free_mib(guest: &mut Guest) -> u64 {
    let pong = within(5, "ping", guest.agent.ping(rand())).await.unwrap();
    pong.memory.free_bytes / MIB
}

/// A nonce that was not used before.
fn rand() -> u64 {
    static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(1000);
    NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed)
}

/// A program that takes `mib` MiB, writes to all of it, and ends.
async fn allocate(guest: &Guest, mib: u64) -> bool {
    let output = guest.run(Command::new("alloc").arg(mib.to_string())).await;
    let pages = (mib * 256).to_string();
    output.status.success() && output.stdout == format!("{pages}\n").as_bytes()
}

/// Resident KiB of all guest memory in this process.
fn guest_rss_kib() -> u64 {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let (mut of_guest, mut total) = (false, 0);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        if first.contains('-') && !first.ends_with(':') {
            of_guest = line.contains("memfd:hearth-guest");
        } else if of_guest && first == "Rss:" {
            total += words.next().unwrap().parse::<u64>().unwrap();
        }
    }
    total
}

#[tokio::test]
async fn the_guest_gives_and_gets_back() {
    if !kvm() {
        return;
    }
    let _alone = ONE_AT_A_TIME.lock().await;
    let mut guest = Guest::fork().await;
    let balloon = guest.vm.balloon().clone();
    let before = free_mib(&mut guest).await;
    balloon.resize(32, deadline()).await.unwrap();
    assert_eq!((balloon.target(), balloon.actual()), (32, 32));
    let inflated = free_mib(&mut guest).await;
    assert!(
        before - inflated >= 32 - SLACK_MIB,
        "{before} MiB free, then {inflated}"
    );
    balloon.resize(0, deadline()).await.unwrap();
    assert_eq!(balloon.actual(), 0);
    let deflated = free_mib(&mut guest).await;
    assert!(
        deflated + SLACK_MIB >= before,
        "{before} MiB free before, {deflated} after"
    );
    // What came back can be used: 70 % of what is there.
    assert!(allocate(&guest, deflated * 7 / 10).await);
    assert_eq!(guest.vm.status(), VmStatus::Running);
}

#[tokio::test]
#[ignore = "long: a minute of page faults where ring 0 is emulated"]
async fn host_memory_falls_by_what_was_given() {
    if !kvm() {
        return;
    }
    let _alone = ONE_AT_A_TIME.lock().await;
    let guest = Guest::fork().await;
    // Pages that the guest never touched cost nothing and give nothing: touch some first.
    assert!(allocate(&guest, 64).await);
    let touched = guest_rss_kib();
    assert!(
        touched > 40 << 10,
        "{touched} KiB of 64 MiB touched are resident"
    );
    guest.vm.balloon().resize(48, deadline()).await.unwrap();
    let left = guest_rss_kib();
    // At most what the guest still has; freed pages may also have been reported one by one.
    assert!(
        left + ((48 - SLACK_MIB) << 10) <= touched.max(64 << 10),
        "{touched} KiB resident, {left} after 48 MiB were given"
    );
    // Given pages come back empty and usable.
    guest.vm.balloon().resize(0, deadline()).await.unwrap();
    assert!(allocate(&guest, 32).await);
}

#[tokio::test]
#[ignore = "long: a minute of page faults where ring 0 is emulated"]
async fn freed_memory_is_reported_without_being_asked() {
    if !kvm() {
        return;
    }
    let _alone = ONE_AT_A_TIME.lock().await;
    let guest = Guest::fork().await;
    assert!(allocate(&guest, 48).await);
    // The guest reports free blocks some seconds after they were freed.
    let reported = async {
        while guest.vm.balloon().reported() < 16 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    within(6, "free page reporting", reported).await;
    assert!(
        allocate(&guest, 48).await,
        "reported pages are usable again"
    );
}

#[tokio::test]
async fn cycles_rows_and_a_guest_that_holds_memory() {
    if !kvm() {
        return;
    }
    let _alone = ONE_AT_A_TIME.lock().await;
    let mut guest = Guest::fork().await;
    let balloon = guest.vm.balloon().clone();
    for _ in 0..5 {
        balloon.resize(4, deadline()).await.unwrap();
        balloon.resize(0, deadline()).await.unwrap();
    }
    for target in [4, 8, 16] {
        balloon.resize(target, deadline()).await.unwrap();
        assert_eq!(balloon.actual(), target);
    }
    balloon.resize(0, deadline()).await.unwrap();
    // A program holds 50 MiB (in a pipe's reader that never ends) while the balloon grows.
    let hold = Command::new("alloc").args(["50", "600"]);
    let exec = guest.connect().await.exec(hold).await.unwrap();
    balloon.resize(16, deadline()).await.unwrap();
    let free = free_mib(&mut guest).await;
    assert!(free > 0);
    assert_eq!(guest.vm.status(), VmStatus::Running);
    drop(exec);
    let output = guest.run(Command::new("echo").arg("alive")).await;
    assert_eq!(output.stdout, b"alive\n");
}

#[tokio::test]
async fn targets_that_cannot_be_and_deadlines_that_are_missed() {
    if !kvm() {
        return;
    }
    let _alone = ONE_AT_A_TIME.lock().await;
    let mut guest = Guest::fork().await;
    let balloon = guest.vm.balloon().clone();
    for asked in [113, 128, 129, u32::MAX] {
        assert_eq!(
            balloon.resize(asked, deadline()).await,
            Err(BalloonError::TooLarge { asked, memory: 128 })
        );
        assert_eq!(balloon.target(), 0, "a refused target changes nothing");
    }
    let soon = Duration::from_millis(100);
    let missed = balloon.resize(100, soon).await;
    let Err(BalloonError::Deadline { asked: 100, actual }) = missed else {
        panic!("{missed:?}");
    };
    // It keeps what it reached and does not go on.
    assert!(actual < 100);
    let settled = async {
        loop {
            let (actual, target) = (balloon.actual(), balloon.target());
            if actual == target {
                return actual;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let kept = within(10, "the balloon to settle", settled).await;
    assert!(kept < 100, "{kept} MiB");
    let output = guest.run(Command::new("echo").arg("alive")).await;
    assert_eq!(output.stdout, b"alive\n");
    assert!(free_mib(&mut guest).await > 0);
}

#[tokio::test]
async fn statistics_are_fresh_and_plausible() {
    if !kvm() {
        return;
    }
    let _alone = ONE_AT_A_TIME.lock().await;
    let guest = Guest::fork().await;
    let limit = deadline();
    let stats = guest.vm.balloon().stats(limit).await.unwrap();
    let (total, free, available) = (
        stats.total.unwrap(),
        stats.free.unwrap(),
        stats.available.unwrap(),
    );
    assert!(total < 128 * MIB && total > 64 * MIB, "{stats:?}");
    assert!(free <= total && available <= total, "{stats:?}");
    guest.vm.balloon().resize(24, limit).await.unwrap();
    let later = guest.vm.balloon().stats(limit).await.unwrap();
    let fell = free.saturating_sub(later.free.unwrap()) / MIB;
    assert!(fell + SLACK_MIB >= 24, "free memory fell by {fell} MiB");
}
