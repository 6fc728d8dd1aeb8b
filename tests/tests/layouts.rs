#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]
//! Guests of every memory layout: the minimum, all that fits below the gap for devices, and a
//! second range above 4 GiB.

use std::ops::Range;

use hearth_agent::client::Command;
use hearth_tests::{Guest, kvm, within};
use hearth_vmm::MIN_MEMORY_MIB;
use hearth_vmm::memory::{GAP_START, MIB, ranges};

/// Tests here use much memory or measure boots, so they run one at a time.
static ONE_AT_A_TIME: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// Returns the ranges of memory above 1 MiB that the guest sees (`/proc/iomem`).
async fn system_ram(guest: &Guest) -> Vec<Range<u64>> {
    let output = guest.run(Command::new("cat").arg("/proc/iomem")).await;
    let text = String::from_utf8(output.stdout).unwrap();
    let lines = text
        .lines()
        .filter_map(|line| line.strip_suffix(" : System RAM"));
    let stretches = lines.map(|line| {
        let (first, last) = line.split_once('-').unwrap();
        let number = |text| u64::from_str_radix(text, 16).unwrap();
        number(first)..number(last) + 1
    });
    stretches.filter(|stretch| stretch.start >= MIB).collect()
}

/// Asserts that the guest can use all of its `mib` MiB except for `kernel` MiB and the page
/// descriptors (64 bytes for each 4096).
async fn has_its_memory(guest: &mut Guest, mib: u64, kernel: u64) {
    let pong = within(5, "pong", guest.agent.ping(2)).await.unwrap();
    let (total, all) = (pong.memory.total_bytes, mib * MIB);
    eprintln!("{mib} MiB: the guest can use {} KiB", total >> 10);
    let least = all - all / 64 - kernel * MIB;
    assert!((least..all).contains(&total), "{total} of {all}");
    let wanted = ranges(all).into_iter().map(|(start, len)| {
        let end = start.0 + len;
        start.0.max(MIB)..end
    });
    let wanted: Vec<_> = wanted.collect();
    assert_eq!(system_ram(guest).await, wanted, "{mib} MiB");
}

/// Boots a guest and checks its memory, then that of a clone, which also writes to it.
async fn boots_and_forks(mib: u64) {
    let (mut guest, phases) = Guest::boot(|config| config.memory_mib(mib)).await;
    eprintln!("{mib} MiB: {phases:?}");
    has_its_memory(&mut guest, mib, 24).await;
    let template = guest.freeze();
    assert_eq!(template.memory_bytes(), mib * MIB);
    let mut clone = Guest::of(&template).await;
    has_its_memory(&mut clone, mib, 24).await;
    // Writes 4096 pages, 16 MiB, from the top of memory down.
    let output = clone.run(Command::new("alloc").arg("16")).await;
    assert_eq!(output.stdout, b"4096\n", "{output:?}");
}

#[tokio::test]
async fn the_least_memory_that_is_allowed_is_enough() {
    if !kvm() {
        return;
    }
    let _alone = ONE_AT_A_TIME.lock().await;
    let (mut guest, _) = Guest::boot(|config| config.memory_mib(MIN_MEMORY_MIB)).await;
    has_its_memory(&mut guest, MIN_MEMORY_MIB, 16).await;
    let output = guest.run(Command::new("echo").arg("small")).await;
    assert_eq!(output.stdout, b"small\n");
}

#[tokio::test]
#[ignore = "long: 3 GiB take a while to be described where ring 0 is emulated"]
async fn all_that_fits_below_the_gap_is_one_stretch() {
    if !kvm() {
        return;
    }
    let _alone = ONE_AT_A_TIME.lock().await;
    boots_and_forks(GAP_START / MIB).await;
}

#[tokio::test]
#[ignore = "long: 5 GiB take a minute to be described where ring 0 is emulated"]
async fn what_does_not_fit_below_the_gap_goes_on_above_4_gib() {
    if !kvm() {
        return;
    }
    let _alone = ONE_AT_A_TIME.lock().await;
    boots_and_forks(5 << 10).await;
}

#[tokio::test]
#[ignore = "long: boots a guest of 3 GiB and a little where ring 0 is emulated"]
async fn a_mib_beyond_the_gap_is_the_guests_too() {
    if !kvm() {
        return;
    }
    let _alone = ONE_AT_A_TIME.lock().await;
    boots_and_forks(GAP_START / MIB + 1).await;
}
