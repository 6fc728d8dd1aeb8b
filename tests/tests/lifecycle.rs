#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]
//! How guests start and end, without Linux: guests of a few instructions.

use std::time::{Duration, Instant};

use hearth_tests::flat::{Code, MMIO_BASE, REPORT_PORT};
use hearth_tests::{Footprint, alone, kvm, within};
use hearth_vmm::virtio::vsock::{ConnectError, ListenError};
use hearth_vmm::{BalloonError, Exit, InternalError, Vm, VmConfig, VmStatus, leaked_vms};

/// Time to wait for an answer of a guest that never answers.
const SHORT: Duration = Duration::from_millis(100);

/// Creates the process-wide parts (event threads, teardown threads, `/dev/kvm`), so that the
/// footprints compared later differ only by a VM's resources.
fn warm_up() {
    Code::new().spin().boot().destroy();
    let idle = Footprint::now();
    drop(Code::new().spin().boot());
    let gone = |now: &Footprint| now.fds == idle.fds && !now.threads.contains_key("hearth-vcpu0");
    while !gone(&Footprint::now()) {
        std::thread::sleep(Duration::from_millis(5));
    }
}

async fn exit_of(vm: &Vm) -> Exit {
    within(2, "end of the guest", vm.exited()).await
}

#[tokio::test]
async fn every_end_that_a_guest_can_make_is_told_apart() {
    if !kvm() {
        return;
    }
    for (code, exit) in [
        (Code::new().report(1), Exit::PowerOff),
        (Code::new().report(2), Exit::Reboot),
        (Code::new().report(3), Exit::Halt),
        (Code::new().report(4), Exit::Panic),
        (Code::new().out(0x64, 0xfe), Exit::Reboot),
        (Code::new().triple_fault(), Exit::TripleFault),
        // The first cause wins: a panic that ends in a reboot stays a panic.
        (Code::new().report(4).report(2).out(0x64, 0xfe), Exit::Panic),
        (Code::new().report(1).triple_fault(), Exit::PowerOff),
        // Unknown reports, other keyboard commands and other ports do not end the guest.
        (
            Code::new()
                .out(REPORT_PORT, 0)
                .out(REPORT_PORT, 5)
                .out(0x64, 0xd1)
                .out(0x80, 1)
                .report(3),
            Exit::Halt,
        ),
    ] {
        let vm = code.spin().boot();
        assert_eq!(exit_of(&vm).await, exit);
        assert_eq!(vm.status(), VmStatus::Ended(exit.clone()));
        // The ended state is final, whatever is called.
        vm.kill();
        assert!(vm.resume().is_err() && vm.pause().is_err());
        assert_eq!(vm.status(), VmStatus::Ended(exit));
    }
}

#[tokio::test]
async fn an_instruction_that_kvm_cannot_emulate_is_named() {
    if !kvm() {
        return;
    }
    // Every KVM has to emulate code in a device's MMIO region, and the region holds no code.
    let vm = Code::new().device(0).raw(&[0xff, 0xe3]).boot();
    let exit = exit_of(&vm).await;
    let Exit::InternalError(InternalError { suberror, rip, .. }) = &exit else {
        panic!("{exit}");
    };
    assert_eq!(*suberror, 1, "{exit}");
    assert_eq!(*rip, u64::from(MMIO_BASE), "{exit}");
    // An instruction that only an emulated host does not know: its bytes are reported.
    if vm.profile() == hearth_vmm::CpuProfile::Emulated {
        let fwait = [0x9b, 0x90, 0x90];
        let vm = Code::new().raw(&fwait).report(1).spin().boot();
        let exit = exit_of(&vm).await;
        let Exit::InternalError(error) = &exit else {
            panic!("{exit}");
        };
        assert_eq!(error.instruction[..3], fwait, "{exit}");
        assert_eq!(error.rip, 0x10_0000, "{exit}");
        assert!(exit.to_string().contains("9b 90 90"), "{exit}");
    }
}

#[tokio::test]
async fn a_kill_ends_a_guest_that_spins_sleeps_or_has_not_started() {
    if !kvm() {
        return;
    }
    for code in [Code::new().spin(), Code::new().sleep()] {
        let vm = code.boot();
        let start = Instant::now();
        vm.kill();
        assert_eq!(exit_of(&vm).await, Exit::Killed);
        vm.destroy();
        assert!(
            start.elapsed() < Duration::from_secs(4),
            "{:?}",
            start.elapsed()
        );
    }
    let config = VmConfig::flat(Code::new().report(1).spin().bytes());
    let vm = Vm::create(&config.memory_mib(32).build().unwrap()).unwrap();
    assert_eq!(vm.status(), VmStatus::Paused);
    vm.kill();
    assert_eq!(exit_of(&vm).await, Exit::Killed);
    assert_eq!(vm.exits().total(), 0, "it never ran");
    assert_eq!(leaked_vms(), 0);
}

#[tokio::test]
async fn a_guest_that_exits_without_end_is_killed_and_paused_all_the_same() {
    if !kvm() {
        return;
    }
    // l: out 0x80, al; jmp l
    let vm = Code::new().raw(&[0xe6, 0x80, 0xeb, 0xfc]).boot();
    for _ in 0..10 {
        vm.pause().unwrap();
        let still = vm.exits().total();
        tokio::time::sleep(Duration::from_millis(5)).await;
        assert_eq!(vm.exits().total(), still, "a paused guest runs");
        vm.resume().unwrap();
    }
    vm.kill();
    assert_eq!(exit_of(&vm).await, Exit::Killed);
}

#[tokio::test]
async fn everyone_who_waits_is_told_also_after_the_vm_is_gone() {
    if !kvm() {
        return;
    }
    let vm = Code::new().spin().boot();
    let early: Vec<_> = (0..8).map(|_| tokio::spawn(vm.exited())).collect();
    let late = vm.exited();
    let console = vm.console().clone();
    let vsock = vm.vsock().clone();
    let balloon = vm.balloon().clone();
    drop(vm);
    for waiter in early {
        assert_eq!(within(1, "waiter", waiter).await.unwrap(), Exit::Killed);
    }
    assert_eq!(within(1, "late waiter", late).await, Exit::Killed);
    assert!(within(1, "console", console.read(0)).await.end);
    // Handles outlive their VM and report that it has ended.
    let connect = within(1, "connect", vsock.connect(1)).await;
    assert_eq!(connect.unwrap_err(), ConnectError::VmEnded);
    assert_eq!(vsock.listen(1).unwrap_err(), ListenError::VmEnded);
    assert!(matches!(
        balloon.stats(SHORT).await,
        Err(BalloonError::NoAnswer)
    ));
}

#[tokio::test]
async fn waiters_of_a_guest_that_ends_are_woken() {
    if !kvm() {
        return;
    }
    let config = VmConfig::flat(Code::new().report(1).spin().bytes());
    let vm = Vm::create(&config.memory_mib(32).build().unwrap()).unwrap();
    let vsock = vm.vsock().clone();
    let mut listener = vsock.listen(9).unwrap();
    let connecting = tokio::spawn(async move { vsock.connect(7).await });
    let accepting = tokio::spawn(async move { listener.accept().await.err() });
    tokio::time::sleep(Duration::from_millis(20)).await;
    vm.resume().unwrap();
    let connect = within(2, "connect", connecting).await.unwrap();
    assert_eq!(connect.unwrap_err(), ConnectError::VmEnded);
    let accept = within(2, "accept", accepting).await.unwrap();
    assert_eq!(accept, Some(ListenError::VmEnded));
    assert_eq!(vm.status(), VmStatus::Ended(Exit::PowerOff));
}

#[tokio::test]
async fn a_guest_that_never_answers_times_out_and_leaves_nothing() {
    if !kvm() || !alone() {
        return;
    }
    warm_up();
    let before = Footprint::now();
    for code in [Code::new().spin(), Code::new().sleep()] {
        let vm = code.boot();
        let connect = vm.vsock().connect_timeout(1024, SHORT).await;
        assert_eq!(
            connect.unwrap_err(),
            ConnectError::TimedOut {
                port: 1024,
                waited: SHORT
            }
        );
        let deadline = tokio::time::Instant::now() + SHORT;
        let retried = vm.vsock().connect_retry(1024, deadline).await;
        assert!(
            matches!(retried, Err(ConnectError::TimedOut { port: 1024, .. })),
            "{retried:?}"
        );
        let mut ready = vm.vsock().listen(1025).unwrap();
        assert!(tokio::time::timeout(SHORT, ready.accept()).await.is_err());
        assert_eq!(vm.balloon().stats(SHORT).await, Err(BalloonError::NoAnswer));
        assert_eq!(
            vm.balloon().resize(8, SHORT).await,
            Err(BalloonError::Deadline {
                asked: 8,
                actual: 0
            })
        );
        assert_eq!(vm.balloon().target(), 0, "a missed target is taken back");
        assert_eq!(vm.status(), VmStatus::Running);
    }
    before.assert_restored(8, Duration::from_secs(10));
    assert_eq!(leaked_vms(), 0);
}

#[tokio::test]
async fn two_vms_at_once_do_not_see_each_other() {
    if !kvm() {
        return;
    }
    let one = Code::new().print("one").spin().boot();
    let other = Code::new().print("other").spin().boot();
    for (vm, text) in [(&one, "one"), (&other, "other")] {
        let printed = async {
            while vm.console().text().len() < text.len() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            vm.console().text()
        };
        assert_eq!(within(2, text, printed).await, text);
    }
    // Listens on the same port of both at once.
    let _listeners = (
        one.vsock().listen(5).unwrap(),
        other.vsock().listen(5).unwrap(),
    );
    assert_eq!(one.vsock().listen(5).unwrap_err(), ListenError::InUse(5));
    one.balloon().set_target(3).unwrap();
    assert_eq!(other.balloon().target(), 0);
    one.kill();
    assert_eq!(exit_of(&one).await, Exit::Killed);
    assert_eq!(other.status(), VmStatus::Running);
    let connect = other.vsock().connect_timeout(1, SHORT).await.unwrap_err();
    assert!(
        matches!(connect, ConnectError::TimedOut { .. }),
        "{connect}"
    );
    let connect = one.vsock().connect(1).await.unwrap_err();
    assert_eq!(connect, ConnectError::VmEnded);
}

#[tokio::test]
async fn two_vcpus_stop_together() {
    if !kvm() {
        return;
    }
    for vcpus in [2, 4] {
        let config = VmConfig::flat(Code::new().spin().bytes()).memory_mib(32);
        let vm = Vm::boot(&config.vcpus(vcpus).build().unwrap()).unwrap();
        vm.pause().unwrap();
        vm.resume().unwrap();
        vm.kill();
        assert_eq!(exit_of(&vm).await, Exit::Killed);
        vm.destroy();
    }
    assert_eq!(leaked_vms(), 0);
}

#[tokio::test]
async fn vms_dropped_at_every_stage_leave_nothing() {
    if !kvm() || !alone() {
        return;
    }
    let round = async || {
        let config = VmConfig::flat(Code::new().spin().bytes()).memory_mib(32);
        let config = config.vcpus(2).build().unwrap();
        // Never started; running; paused; with a stream that is being connected and a listener.
        drop(Vm::create(&config).unwrap());
        drop(Vm::boot(&config).unwrap());
        let paused = Vm::boot(&config).unwrap();
        paused.pause().unwrap();
        drop(paused);
        let busy = Vm::boot(&config).unwrap();
        let _listener = busy.vsock().listen(1).unwrap();
        let vsock = busy.vsock().clone();
        let connecting = tokio::spawn(async move { vsock.connect(2).await.is_err() });
        tokio::task::yield_now().await;
        drop(busy);
        assert!(within(1, "connect", connecting).await.unwrap());
    };
    warm_up();
    let idle = Footprint::now();
    for _ in 0..3 {
        round().await;
        idle.assert_restored(1000, Duration::from_secs(10));
    }
    let before = Footprint::now();
    for _ in 0..15 {
        round().await;
        // VMs are dropped faster than they are torn down, and the C library keeps as many stacks as
        // there were threads at the same time.
        before.assert_restored(1000, Duration::from_secs(10));
    }
    // 60 VMs that each left one mapping would exceed this by far.
    before.assert_restored(24, Duration::from_secs(10));
    assert_eq!(leaked_vms(), 0);
}

/// Returns whether the process has a thread or a mapping of a guest.
fn remains() -> bool {
    let now = Footprint::now();
    let thread = now.threads.contains_key("hearth-vcpu0");
    thread
        || now
            .mappings
            .keys()
            .any(|name| name.contains("hearth-guest"))
}

#[tokio::test]
async fn a_vm_that_others_own_can_be_taken_apart_and_what_it_carries_goes_last() {
    if !kvm() || !alone() {
        return;
    }
    /// Reports at its drop whether anything of the VM was still there.
    struct Last(std::sync::mpsc::Sender<bool>);
    impl Drop for Last {
        fn drop(&mut self) {
            let _ = self.0.send(remains());
        }
    }
    warm_up();
    let (said, remained) = std::sync::mpsc::channel();
    let vm = std::sync::Arc::new(Code::new().spin().boot());
    assert!(remains());
    vm.on_drop(Last(said.clone()));
    assert!(remained.try_recv().is_err());
    let owner = std::sync::Arc::clone(&vm);
    vm.teardown();
    assert_eq!(remained.try_recv(), Ok(false));
    assert_eq!(owner.status(), VmStatus::Ended(Exit::Killed));
    assert!(owner.snapshot().is_err());
    // A second call is harmless; a drop guard that comes too late is dropped at once.
    owner.teardown();
    owner.on_drop(Last(said.clone()));
    assert_eq!(remained.try_recv(), Ok(false));
    // The guard also goes last when the VM is only dropped.
    let vm = Code::new().spin().boot();
    vm.on_drop(Last(said));
    drop(vm);
    let limit = hearth_tests::patience(Duration::from_secs(5));
    assert_eq!(remained.recv_timeout(limit), Ok(false));
}
