#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]
//! How real guests end, by themselves and by the host's action; two guests share nothing.

use std::time::{Duration, Instant};

use hearth_agent::client::Command;
use hearth_agent::proto::{AGENT_PORT, READY_PORT, ShutdownKind};
use hearth_tests::{Footprint, Guest, image, kvm, within};
use hearth_vmm::virtio::vsock::{ConnectError, ListenError};
use hearth_vmm::{CpuProfile, Exit, Host, Vm, VmStatus, leaked_vms};

/// Runs an applet that ends the guest, and returns the exit.
async fn run_and_die(guest: &Guest, applet: &str) -> Exit {
    // The guest may have ended before the start of the program is reported.
    if let Ok(exec) = guest.connect().await.exec(Command::new(applet)).await {
        let ended = within(6, applet, exec.wait()).await;
        assert!(
            ended.is_err(),
            "{applet} ended, the guest did not: {ended:?}"
        );
    }
    guest.exit().await
}

#[tokio::test]
async fn the_agent_powers_off_and_reboots() {
    if !kvm() {
        return;
    }
    for (kind, exit) in [
        (ShutdownKind::PowerOff, Exit::PowerOff),
        (ShutdownKind::Reboot, Exit::Reboot),
    ] {
        let guest = Guest::fork().await;
        let ended = guest.vm.exited();
        within(5, "shutdown", guest.agent.shutdown(kind))
            .await
            .unwrap();
        assert_eq!(within(6, "end", ended).await, exit);
        assert_eq!(guest.vm.status(), VmStatus::Ended(exit));
        let connect = guest.vm.vsock().connect(AGENT_PORT).await;
        assert_eq!(connect.unwrap_err(), ConnectError::VmEnded);
    }
}

#[tokio::test]
async fn programs_power_off_reboot_halt_and_panic() {
    if !kvm() {
        return;
    }
    for (applet, exit) in [
        ("poweroff", Exit::PowerOff),
        ("reboot", Exit::Reboot),
        ("halt", Exit::Halt),
        ("panic", Exit::Panic),
    ] {
        let guest = Guest::fork().await;
        assert_eq!(run_and_die(&guest, applet).await, exit, "{applet}");
    }
}

/// `reboot=t` makes the kernel load an empty interrupt table and trap: a triple fault. Where ring 0
/// is emulated, the trap is an instruction that KVM does not know, and its bytes are reported.
#[tokio::test]
async fn a_triple_fault_or_an_unknown_instruction_made_by_the_kernel() {
    if !kvm() {
        return;
    }
    // Without our report port, which would report the reboot first.
    let words = Host::get().unwrap().profile().kernel_words().join(" ");
    let (guest, _) = Guest::boot(|config| {
        let ours = "panic=-1 reboot=t hearth.fast quiet 8250.nr_uarts=0";
        config.plain_cmdline().append(ours).append(&words)
    })
    .await;
    let emulated = guest.vm.profile() == CpuProfile::Emulated;
    let vm = guest.vm;
    within(5, "shutdown", guest.agent.shutdown(ShutdownKind::Reboot))
        .await
        .unwrap();
    match within(6, "end", vm.exited()).await {
        Exit::TripleFault if !emulated => {}
        Exit::InternalError(error) if emulated => {
            assert_eq!(error.suberror, 1);
            assert_eq!(error.instruction.first(), Some(&0xcc), "int3: {error:?}");
            assert!(error.rip >> 63 == 1, "in the kernel: {error:?}");
        }
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn killed_while_it_boots() {
    if !kvm() {
        return;
    }
    // Shortly after the start of the boot, and later.
    for after in [5, 500] {
        let vm = Vm::boot(&image().build().unwrap()).unwrap();
        let mut ready = vm.vsock().listen(READY_PORT).unwrap();
        let connect = vm.vsock().clone();
        let connecting = tokio::spawn(async move { connect.connect(AGENT_PORT).await.map(drop) });
        let early = tokio::time::timeout(Duration::from_millis(after), ready.accept()).await;
        assert!(early.is_err(), "it was up after {after} ms");
        let start = Instant::now();
        vm.kill();
        assert_eq!(within(1, "end", vm.exited()).await, Exit::Killed);
        let accepted = within(1, "accept", ready.accept()).await;
        assert_eq!(accepted.err(), Some(ListenError::VmEnded));
        let connected = within(1, "connect", connecting).await.unwrap();
        assert_eq!(connected, Err(ConnectError::VmEnded));
        vm.destroy();
        assert!(
            start.elapsed() < Duration::from_secs(4),
            "{:?}",
            start.elapsed()
        );
    }
    assert_eq!(leaked_vms(), 0);
}

#[tokio::test]
async fn killed_while_it_idles_and_while_a_program_runs() {
    if !kvm() {
        return;
    }
    let idle = Guest::fork().await;
    // Idle for long enough that the timer is off.
    tokio::time::sleep(Duration::from_millis(300)).await;
    idle.vm.kill();
    assert_eq!(idle.exit().await, Exit::Killed);
    let mut agent = idle.agent;
    assert!(within(1, "ping", agent.ping(9)).await.is_err());
    idle.vm.destroy();

    let busy = Guest::fork().await;
    let sleep = Command::new("sleep").arg("600");
    let exec = busy.connect().await.exec(sleep).await.unwrap();
    busy.vm.kill();
    assert_eq!(busy.exit().await, Exit::Killed);
    assert!(within(1, "wait", exec.wait()).await.is_err());
    busy.vm.destroy();
    assert_eq!(leaked_vms(), 0);
}

#[tokio::test]
async fn two_guests_at_once_share_nothing() {
    if !kvm() {
        return;
    }
    let (one, other) = tokio::join!(Guest::fork(), Guest::fork());
    assert_ne!(one.instance, other.instance);
    // One guest does not read what the other writes.
    let echo = async |guest: &Guest, text: &str| {
        let output = guest.run(Command::new("echo").arg(text)).await;
        String::from_utf8(output.stdout).unwrap()
    };
    let (said, heard) = tokio::join!(echo(&one, "one"), echo(&other, "other"));
    assert_eq!((said.as_str(), heard.as_str()), ("one\n", "other\n"));
    // Both listen on the same port: each guest connects to its own host side.
    let ports = (one.vm.vsock().listen(2000), other.vm.vsock().listen(2000));
    let (mut at_one, mut at_other) = (ports.0.unwrap(), ports.1.unwrap());
    let dial = Command::new("vsock-dial").arg("2000");
    let exec = one.connect().await.exec(dial).await.unwrap();
    let stream = within(5, "dial", at_one.accept()).await.unwrap();
    let nothing = tokio::time::timeout(Duration::from_millis(200), at_other.accept()).await;
    assert!(nothing.is_err(), "the other guest's port was dialled");
    drop(stream);
    assert!(
        within(5, "end", exec.wait())
            .await
            .unwrap()
            .status
            .success()
    );
    // A program in one guest does not count in the other.
    let sleep = Command::new("sleep").arg("600");
    let _exec = one.connect().await.exec(sleep).await.unwrap();
    let mut agents = (one.connect().await, other.connect().await);
    assert_eq!(agents.0.ping(1).await.unwrap().execs, 1);
    assert_eq!(agents.1.ping(1).await.unwrap().execs, 0);
    // The end of one guest does not end the other.
    one.vm.kill();
    assert_eq!(one.exit().await, Exit::Killed);
    assert_eq!(echo(&other, "alive").await, "alive\n");
    assert_eq!(other.vm.status(), VmStatus::Running);
}

#[tokio::test]
async fn a_guest_that_still_boots_is_given_up_without_a_trace() {
    if !kvm() {
        return;
    }
    // Other tests may run VMs meanwhile, so this one looks only at threads that its own guest adds:
    // none named like its third vCPU may stay.
    let vm = Vm::boot(&image().vcpus(3).build().unwrap()).unwrap();
    let mut ready = vm.vsock().listen(READY_PORT).unwrap();
    let limit = Duration::from_millis(5);
    assert!(tokio::time::timeout(limit, ready.accept()).await.is_err());
    let connect = vm.vsock().connect_timeout(AGENT_PORT, limit).await;
    assert_eq!(
        connect.unwrap_err(),
        ConnectError::TimedOut {
            port: AGENT_PORT,
            waited: limit
        }
    );
    assert!(Footprint::now().threads.contains_key("hearth-vcpu2"));
    drop((vm, ready));
    let gone = async {
        while Footprint::now().threads.contains_key("hearth-vcpu2") {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    within(1, "release", gone).await;
    assert_eq!(leaked_vms(), 0);
}
