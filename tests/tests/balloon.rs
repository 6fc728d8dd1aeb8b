#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]
//! The balloon of a real guest. Where ring 0 is emulated, inflating by a MiB takes a tenth of a
//! second, and a program that writes to a MiB takes a second: amounts are small, and cases share a
//! guest where they can.

use std::time::Duration;

use hearth_agent::client::Command;
use hearth_tests::{Guest, kvm, patience, shared, within};
use hearth_vmm::{Balloon, BalloonError, VmStatus};
use tokio::io::AsyncReadExt;

/// The part of a requested amount that the balloon's contract lets the guest keep.
const SLACK_MIB: u64 = 20;
/// The amount requested from the guest where its memory must fall.
const ASKED_MIB: u32 = 40;
const MIB: u64 = 1 << 20;

/// Cases measure this process's memory, so they run one at a time.
static ONE_AT_A_TIME: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

fn deadline() -> Duration {
    patience(Duration::from_secs(5))
}

/// Returns the free memory that the guest reports, in MiB.
async fn free_mib(guest: &Guest) -> u64 {
    let mut agent = guest.connect().await;
    let pong = within(5, "ping", agent.ping(1)).await.unwrap();
    pong.memory.free_bytes / MIB
}

/// Fails unless the guest runs and can start a program.
async fn assert_alive(guest: &Guest) {
    assert_eq!(guest.vm.status(), VmStatus::Running);
    let output = guest.run(Command::new("echo").arg("alive")).await;
    assert_eq!(output.stdout, b"alive\n");
}

/// Empties the balloon of a guest that other cases use as well.
async fn emptied(balloon: &Balloon) {
    balloon.resize(0, deadline()).await.unwrap();
    assert_eq!(balloon.actual(), 0);
}

/// Runs a program that allocates `mib` MiB, writes to all of it, and ends.
async fn allocate(guest: &Guest, mib: u64) -> bool {
    let output = guest.run(Command::new("alloc").arg(mib.to_string())).await;
    let pages = (mib * 256).to_string();
    output.status.success() && output.stdout == format!("{pages}\n").as_bytes()
}

/// Returns the resident KiB of all guest memory in this process.
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

/// The amount is large enough that the slack is the smaller part of it.
#[tokio::test]
async fn guest_memory_falls_by_what_was_asked_for_and_comes_back() {
    if !kvm() {
        return;
    }
    let _alone = ONE_AT_A_TIME.lock().await;
    let guest = Guest::fork().await;
    let balloon = guest.vm.balloon();
    // The amount is large for a host that does other work as well.
    let limit = 2 * deadline();
    let before = free_mib(&guest).await;
    balloon.resize(ASKED_MIB, limit).await.unwrap();
    assert_eq!((balloon.target(), balloon.actual()), (ASKED_MIB, ASKED_MIB));
    let inflated = free_mib(&guest).await;
    assert!(
        before >= inflated + u64::from(ASKED_MIB) - SLACK_MIB,
        "{before} MiB free, then {inflated}"
    );
    balloon.resize(0, limit).await.unwrap();
    assert_eq!(balloon.actual(), 0);
    let deflated = free_mib(&guest).await;
    assert!(
        deflated + SLACK_MIB >= before,
        "{before} MiB free before, {deflated} after"
    );
    assert_alive(&guest).await;
}

#[tokio::test]
async fn what_deflating_returns_can_be_used() {
    if !kvm() {
        return;
    }
    let _alone = ONE_AT_A_TIME.lock().await;
    // A small guest, because most of its memory is written to.
    let guest = Guest::prepared(|config| config.memory_mib(48)).await;
    let balloon = guest.vm.balloon();
    balloon.resize(24, deadline()).await.unwrap();
    let left = free_mib(&guest).await;
    emptied(balloon).await;
    // 70 % of the free memory, which is more than was free before the balloon was emptied.
    let wanted = free_mib(&guest).await * 7 / 10;
    assert!(wanted > left, "{wanted} of {left} MiB");
    assert!(allocate(&guest, wanted).await);
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
    // Inflating by pages that the guest never touched frees nothing on the host: touch some first.
    // Freed pages are soon reported as free, so only those that a program holds are sure to be
    // resident.
    let holder = guest.connect().await;
    let hold = Command::new("alloc").args(["64", "5"]);
    let mut holder = holder.exec(hold).await.unwrap();
    let mut said = holder.stdout().unwrap();
    within(30, "64 MiB written", said.read_u8()).await.unwrap();
    let touched = guest_rss_kib();
    assert!(
        touched >= 64 << 10,
        "{touched} KiB of 64 MiB touched are resident"
    );
    let ended = within(5, "end of the holder", holder.wait()).await;
    assert!(ended.unwrap().status.success());
    guest.vm.balloon().resize(48, deadline()).await.unwrap();
    let left = guest_rss_kib();
    assert!(
        left + ((48 - SLACK_MIB) << 10) <= touched,
        "{touched} KiB resident, {left} after 48 MiB were given"
    );
    // Pages that were given to the balloon come back empty and usable.
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
async fn five_cycles() {
    if !kvm() {
        return;
    }
    let _alone = ONE_AT_A_TIME.lock().await;
    let guest = shared().await;
    let balloon = guest.vm.balloon();
    for _ in 0..5 {
        balloon.resize(2, deadline()).await.unwrap();
        emptied(balloon).await;
    }
    assert_alive(guest).await;
}

#[tokio::test]
async fn three_inflates_in_a_row_and_a_target_of_16_mib() {
    if !kvm() {
        return;
    }
    let _alone = ONE_AT_A_TIME.lock().await;
    let guest = shared().await;
    let balloon = guest.vm.balloon();
    for target in [4, 8, 16] {
        balloon.resize(target, deadline()).await.unwrap();
        assert_eq!(balloon.actual(), target);
    }
    assert_alive(guest).await;
    emptied(balloon).await;
}

/// Inflates the balloon while a program holds `mib` MiB that it has written to.
async fn inflate_while_a_program_holds(mib: u64) {
    let _alone = ONE_AT_A_TIME.lock().await;
    let guest = Guest::fork().await;
    let before = free_mib(&guest).await;
    let hold = Command::new("alloc").args([&mib.to_string(), "600"]);
    let mut holder = guest.connect().await.exec(hold).await.unwrap();
    let mut said = holder.stdout().unwrap();
    within(30, "memory written", said.read_u8()).await.unwrap();
    let held = free_mib(&guest).await;
    // Per-CPU lists held up to a 64th of all memory, which is free but not counted as free; the
    // program gets that first.
    assert!(
        held + mib <= before + 2,
        "{before} MiB free, {held} beside it"
    );
    guest.vm.balloon().resize(8, deadline()).await.unwrap();
    assert_alive(&guest).await;
    // The guest took no memory from the program and did not kill it.
    let mut agent = guest.connect().await;
    let pong = within(5, "ping", agent.ping(1)).await.unwrap();
    assert_eq!(pong.execs, 1);
    drop(holder);
}

#[tokio::test]
async fn an_inflate_while_a_program_holds_5_mib() {
    if kvm() {
        inflate_while_a_program_holds(5).await;
    }
}

#[tokio::test]
#[ignore = "long: a minute of page faults where ring 0 is emulated"]
async fn an_inflate_while_a_program_holds_50_mib() {
    if kvm() {
        inflate_while_a_program_holds(50).await;
    }
}

#[tokio::test]
async fn targets_that_cannot_be_are_refused() {
    if !kvm() {
        return;
    }
    let _alone = ONE_AT_A_TIME.lock().await;
    let guest = shared().await;
    let balloon = guest.vm.balloon();
    let before = balloon.target();
    for asked in [113, 128, 129, u32::MAX] {
        assert_eq!(
            balloon.resize(asked, deadline()).await,
            Err(BalloonError::TooLarge { asked, memory: 128 })
        );
        assert_eq!(balloon.target(), before, "a refused target changes nothing");
    }
    assert_alive(guest).await;
}

#[tokio::test]
async fn an_inflate_that_misses_its_deadline_keeps_what_it_reached() {
    if !kvm() {
        return;
    }
    let _alone = ONE_AT_A_TIME.lock().await;
    let guest = shared().await;
    let balloon = guest.vm.balloon();
    let soon = Duration::from_millis(100);
    let missed = balloon.resize(100, soon).await;
    let Err(BalloonError::Deadline { asked: 100, actual }) = missed else {
        panic!("{missed:?}");
    };
    // The guest does not inflate further.
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
    assert_alive(guest).await;
    assert!(free_mib(guest).await > 0);
    emptied(balloon).await;
}

#[tokio::test]
async fn statistics_are_fresh_and_plausible() {
    if !kvm() {
        return;
    }
    let _alone = ONE_AT_A_TIME.lock().await;
    let guest = shared().await;
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
    // Stale statistics would not have changed at all.
    let fell = free.saturating_sub(later.free.unwrap()) / MIB;
    assert!(fell >= 16, "free memory fell by {fell} MiB");
    emptied(guest.vm.balloon()).await;
}
