#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]
//! A boot from the first instruction to the agent's pong.

use std::time::Duration;

use hearth_agent::client::Command;
use hearth_tests::{Guest, kvm, within};
use hearth_vmm::{CpuProfile, VmStatus};

#[tokio::test]
async fn boot_to_pong() {
    if !kvm() {
        return;
    }
    let (mut guest, phases) = Guest::boot(|config| config).await;
    println!("{phases:#?}\n{:?}", guest.vm.exits());
    assert_eq!(guest.vm.status(), VmStatus::Running);
    // The guest's clock and the host's agree.
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
    // The command line has the kernel parameters of the current CPU profile and no others.
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
    // Without a console nothing is printed, so printing costs no exit.
    assert!(guest.vm.console().since(0).bytes.is_empty());
}
