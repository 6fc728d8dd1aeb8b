#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]
//! Guests in pages of 2 MiB, as far as the host's configuration allows. The tests reserve no pages.

use std::time::Duration;

use hearth_agent::client::Command;
use hearth_tests::{Footprint, Guest, alone, error_chain, flat::Code, image, kvm, not_measured};
use hearth_vmm::memory::MemoryError;
use hearth_vmm::{BootError, HugePages, Vm, VmConfig};

/// Returns the number of 2 MiB pages that the host has reserved and that are free, and of those
/// that it would add on demand.
fn spare_pages() -> (u64, u64) {
    let read = |name| {
        let path = format!("/sys/kernel/mm/hugepages/hugepages-2048kB/{name}_hugepages");
        let text = std::fs::read_to_string(path).unwrap_or_default();
        text.trim().parse().unwrap_or(0)
    };
    let free: u64 = read("free");
    (free.saturating_sub(read("resv")), read("nr_overcommit"))
}

#[test]
fn a_host_with_too_few_pages_set_aside_refuses_with_what_to_do() {
    if !kvm() || !alone() {
        return;
    }
    let (free, more) = spare_pages();
    if more > 0 {
        return not_measured("the host sets pages of 2 MiB aside by itself");
    }
    Code::new().spin().boot().destroy();
    let before = Footprint::now();
    let wanted = free + 16;
    let config = VmConfig::flat(Code::new().spin().bytes()).memory_mib(2 * wanted);
    let config = config.huge_pages(HugePages::Reserved).build().unwrap();
    let refused = Vm::boot(&config).unwrap_err();
    let text = error_chain(&refused);
    let BootError::Memory(MemoryError::HugePages { pages, .. }) = refused else {
        panic!("{text}");
    };
    assert_eq!(pages, wanted);
    assert!(text.contains("sysctl vm.nr_hugepages"), "{text}");
    before.assert_restored(8, Duration::from_secs(10));
    // The same guest boots with ordinary pages.
    let config = VmConfig::flat(Code::new().spin().bytes()).memory_mib(32);
    let config = config.huge_pages(HugePages::Transparent);
    Vm::boot(&config.build().unwrap()).unwrap().destroy();
}

#[tokio::test]
async fn a_guest_in_reserved_pages_works_and_so_do_its_clones() {
    if !kvm() {
        return;
    }
    const MIB: u64 = 64;
    let (free, _) = spare_pages();
    if free < MIB / 2 {
        let text = format!(
            "{free} pages of 2 MiB are set aside and free; {} are needed",
            MIB / 2
        );
        return not_measured(&text);
    }
    let reserved = |config: hearth_vmm::VmConfigBuilder| {
        config.memory_mib(MIB).huge_pages(HugePages::Reserved)
    };
    let guest = Guest::prepared(reserved).await;
    // All pages are taken at once, although the guest has not touched all of them.
    assert_eq!(spare_pages().0, free - MIB / 2);
    let output = guest.run(Command::new("echo").arg("huge")).await;
    assert_eq!(output.stdout, b"huge\n");
    let template = guest.freeze();
    assert_eq!(spare_pages().0, free);
    let clone = Guest::of(&template).await;
    let output = clone.run(Command::new("alloc").arg("8")).await;
    assert_eq!(output.stdout, b"2048\n", "{output:?}");
}

#[tokio::test]
async fn a_host_that_follows_the_advice_gives_a_guest_huge_pages() {
    if !kvm() {
        return;
    }
    let policy = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
    let policy = std::fs::read_to_string(policy).unwrap_or_default();
    if !["[always]", "[advise]", "[within_size]"]
        .iter()
        .any(|word| policy.contains(word))
    {
        return not_measured("the host makes no transparent huge pages of shared memory");
    }
    let config = image().memory_mib(64).huge_pages(HugePages::Transparent);
    let vm = Vm::boot(&config.build().unwrap()).unwrap();
    let mapped = async {
        loop {
            let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
            let huge = |line: &str| line.starts_with("ShmemPmdMapped:") && !line.ends_with(" 0 kB");
            if smaps.lines().any(huge) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    hearth_tests::within(18, "a huge page", mapped).await;
    drop(vm);
}
