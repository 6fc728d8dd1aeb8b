#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]
//! From the first instruction to the agent's pong, in the ways that a kernel can be entered.

use std::time::Duration;

use hearth_agent::client::Command;
use hearth_tests::{Guest, kvm, within};
use hearth_vmm::{CpuProfile, EntryChoice, VmStatus};

/// Tests here measure their boots: one at a time.
static ONE_AT_A_TIME: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

#[tokio::test]
async fn boot_to_pong() {
    if !kvm() {
        return;
    }
    let _alone = ONE_AT_A_TIME.lock().await;
    let (mut guest, phases) = Guest::boot(|config| config).await;
    println!("{phases:#?}\n{:?}", guest.vm.exits());
    assert_eq!(guest.vm.status(), VmStatus::Running);
    // The guest's clock and the host's tell the same story.
    assert!(phases.kernel > Duration::ZERO && phases.greeted >= phases.kernel);
    assert!(phases.pong >= phases.greeted - phases.kernel);
    let pong = within(5, "pong", guest.agent.ping(0xfeed)).await.unwrap();
    assert_eq!(pong.instance, guest.instance);
    assert!(pong.uptime >= phases.greeted);
    let total = pong.memory.total_bytes >> 20;
    assert!(
        (90..128).contains(&total),
        "{total} MiB of 128 are the guest's to use"
    );
    assert!(pong.memory.free_bytes < pong.memory.total_bytes);
    assert_eq!(pong.execs, 0);
    // Our kernel, with the words of the profile in force and no others.
    let version = guest.run(Command::new("uname")).await.stdout;
    assert!(version.starts_with(b"Linux "), "{version:?}");
    let words = guest
        .run(Command::new("cat").arg("/proc/cmdline"))
        .await
        .stdout;
    let words = String::from_utf8(words).unwrap();
    let emulated = guest.vm.profile() == CpuProfile::Emulated;
    assert_eq!(words.contains("hearth.emulated"), emulated, "{words}");
    assert_eq!(words.contains("clearcpuid"), emulated, "{words}");
    // Without a console nothing is printed, and nothing of it costs an exit.
    assert!(guest.vm.console().since(0).bytes.is_empty());
}

#[tokio::test]
async fn two_vcpus_by_pvh_with_a_console() {
    if !kvm() {
        return;
    }
    let _alone = ONE_AT_A_TIME.lock().await;
    let (guest, _) = Guest::boot(|config| {
        config
            .vcpus(2)
            .entry(EntryChoice::Pvh)
            .memory_mib(96)
            .console(true)
            .append("hearth_test=seen")
    })
    .await;
    let text = guest.vm.console().text();
    assert!(text.contains("Linux version"), "{text}");
    let cpus = guest
        .run(Command::new("cat").arg("/proc/cpuinfo"))
        .await
        .stdout;
    let cpus = String::from_utf8(cpus).unwrap();
    let count = cpus
        .lines()
        .filter(|line| line.starts_with("processor"))
        .count();
    assert_eq!(count, 2, "{cpus}");
    // Two cores of one package, not two threads of a core.
    for (name, value) in [("cpu cores", "2"), ("siblings", "2")] {
        let line = cpus.lines().find(|line| line.starts_with(name));
        // Kernels without topology code do not print it.
        if let Some(line) = line {
            assert!(line.ends_with(value), "{line}");
        }
    }
    let words = guest
        .run(Command::new("cat").arg("/proc/cmdline"))
        .await
        .stdout;
    let words = String::from_utf8(words).unwrap();
    assert!(words.trim_end().ends_with("hearth_test=seen"), "{words}");
}

#[tokio::test]
async fn the_least_memory_that_is_allowed_is_enough() {
    if !kvm() {
        return;
    }
    let _alone = ONE_AT_A_TIME.lock().await;
    let least = hearth_vmm::MIN_MEMORY_MIB;
    let (mut guest, _) = Guest::boot(|config| config.memory_mib(least)).await;
    let pong = within(5, "pong", guest.agent.ping(2)).await.unwrap();
    assert!(pong.memory.total_bytes < least << 20);
    let output = guest.run(Command::new("echo").arg("small")).await;
    assert_eq!(output.stdout, b"small\n");
}
