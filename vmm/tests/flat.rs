#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]
//! Tests of the monitor without Linux: the guests are a few instructions.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use hearth_vmm::{Exit, Vm, VmConfig, VmStatus};

/// `mov al, value; mov dx, port; out dx, al; hlt`
fn report(port: u16, value: u8) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    vec![0xb0, value, 0x66, 0xba, low, high, 0xee, 0xf4]
}

fn kvm() -> bool {
    let there = std::path::Path::new("/dev/kvm").exists();
    if !there {
        // Past the test harness's output capture: the summary of `make test` counts these lines.
        let _ = std::io::Write::write_all(&mut std::io::stderr(), b"\nNOT MEASURED: no /dev/kvm\n");
    }
    there
}

fn boot(code: impl Into<Vec<u8>>) -> Vm {
    Vm::boot(
        &VmConfig::flat(code)
            .memory_mib(32)
            .console(true)
            .build()
            .unwrap(),
    )
    .unwrap()
}

async fn exit_of(vm: &Vm) -> Exit {
    tokio::time::timeout(Duration::from_secs(10), vm.exited())
        .await
        .expect("the guest did not end")
}

#[tokio::test]
async fn every_way_to_end_is_told_apart() {
    if !kvm() {
        return;
    }
    for (code, exit) in [
        (report(0x5f0, 1), Exit::PowerOff),
        (report(0x5f0, 2), Exit::Reboot),
        (report(0x5f0, 3), Exit::Halt),
        (report(0x5f0, 4), Exit::Panic),
        (report(0x64, 0xfe), Exit::Reboot),
        // lidt of an empty table, then an interrupt: a triple fault.
        (
            vec![0x0f, 0x01, 0x1c, 0x25, 0x00, 0x00, 0x20, 0x00, 0x0f, 0x0b],
            Exit::TripleFault,
        ),
    ] {
        let vm = boot(code);
        assert_eq!(exit_of(&vm).await, exit);
        assert_eq!(vm.status(), VmStatus::Ended(exit));
        vm.destroy();
    }
}

/// Otherwise a resumed guest takes the processor from the thread that resumes it.
#[test]
fn a_guest_that_wakes_up_does_not_preempt_its_host() {
    if !kvm() {
        return;
    }
    // jmp on the spot
    let vm = boot([0xeb, 0xfe]);
    // proc_pid_stat(5): the scheduling policy is field 41; the first one after the name is field 3.
    let policies = || {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap();
        let stats =
            tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("stat")).ok());
        let vcpus = stats.filter(|stat| stat.contains("(hearth-vcpu"));
        let policy = |stat: String| {
            let (_, rest) = stat.rsplit_once(") ")?;
            rest.split(' ').nth(38)?.parse::<i32>().ok()
        };
        vcpus.map(|stat| policy(stat).unwrap()).collect::<Vec<_>>()
    };
    // They include threads of other tests, which may not have set their policy yet.
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let policies = policies();
        if !policies.is_empty() && policies.iter().all(|policy| *policy == libc::SCHED_BATCH) {
            break;
        }
        assert!(Instant::now() < deadline, "{policies:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
    vm.destroy();
}

/// LK#373, LK#561: the end of a VM ended the embedding program, or left it with other signal
/// handlers.
#[tokio::test]
async fn of_the_programs_signals_two_are_taken_and_no_other() {
    if !kvm() {
        return;
    }
    // proc_pid_status(5): masks of ignored and of caught signals, bit 0 for signal 1.
    let masks = || {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let mask = |name| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            u64::from_str_radix(line.unwrap().trim(), 16).unwrap()
        };
        (mask("SigIgn:"), mask("SigCgt:"))
    };
    let ours = 1 << (hearth_vmm::kick_signal() - 1) | 1 << (libc::SIGBUS - 1);
    let (ignored, caught) = masks();
    let vm = boot(vec![0xeb, 0xfe]);
    vm.pause().unwrap();
    vm.resume().unwrap();
    let clone = vm.snapshot().unwrap().fork().unwrap();
    vm.kill();
    assert_eq!(exit_of(&vm).await, Exit::Killed);
    clone.destroy();
    vm.destroy();
    assert_eq!(masks(), (ignored, caught | ours));
}

#[tokio::test]
async fn console_output_is_kept_after_the_end() {
    if !kvm() {
        return;
    }
    // mov dx, 0x3f8; mov al, 'h'; out; mov al, 'i'; out; then power off.
    let mut code = vec![0x66, 0xba, 0xf8, 0x03, 0xb0, b'h', 0xee, 0xb0, b'i', 0xee];
    code.extend(report(0x5f0, 1));
    let vm = boot(code);
    assert_eq!(exit_of(&vm).await, Exit::PowerOff);
    assert_eq!(vm.console().text(), "hi");
    assert!(vm.exits().total() >= 3);
}

#[tokio::test]
async fn a_spinning_guest_is_paused_resumed_and_killed_at_once() {
    if !kvm() {
        return;
    }
    let vm = boot(vec![0xeb, 0xfe]);
    assert_eq!(vm.status(), VmStatus::Running);
    for _ in 0..20 {
        vm.pause().unwrap();
        assert_eq!(vm.status(), VmStatus::Paused);
        vm.resume().unwrap();
    }
    let start = Instant::now();
    vm.kill();
    assert_eq!(exit_of(&vm).await, Exit::Killed);
    vm.destroy();
    assert!(
        start.elapsed() < Duration::from_secs(4),
        "a kill is bounded"
    );
    assert_eq!(hearth_vmm::leaked_vms(), 0);
}

#[tokio::test]
async fn a_killed_vm_stays_dead() {
    if !kvm() {
        return;
    }
    let vm = boot(vec![0xeb, 0xfe]);
    vm.kill();
    assert!(vm.resume().is_err());
    assert!(vm.pause().is_err());
    assert_eq!(vm.status(), VmStatus::Ended(Exit::Killed));
}

#[test]
fn a_guest_that_ended_is_not_resumed_however_soon_one_asks() {
    if !kvm() {
        return;
    }
    for _ in 0..50 {
        let vm = boot(report(0x5f0, 1));
        let deadline = Instant::now() + Duration::from_secs(10);
        // As soon as the end is reported: the vCPU thread is still exiting.
        while !matches!(vm.status(), VmStatus::Ended(_)) {
            assert!(Instant::now() < deadline, "the guest did not end");
        }
        assert!(vm.resume().is_err());
        vm.destroy();
    }
}

/// Increments a counter in memory at 2 MiB for ever: `inc dword [0x200000]; jmp`.
const COUNTER: [u8; 9] = [0xff, 0x04, 0x25, 0x00, 0x00, 0x20, 0x00, 0xeb, 0xf7];

#[tokio::test]
async fn a_template_is_forked_any_number_of_times_and_clones_of_clones_too() {
    if !kvm() {
        return;
    }
    let vm = boot(COUNTER);
    tokio::time::sleep(Duration::from_millis(20)).await;
    let branch = vm.snapshot().unwrap();
    assert_eq!(
        vm.status(),
        VmStatus::Running,
        "a snapshot lets the VM go on"
    );
    let template = vm.into_template().unwrap();
    for template in [&branch, &template] {
        let clones: Vec<Vm> = (0..5).map(|_| template.fork().unwrap()).collect();
        let again = clones[0].snapshot().unwrap();
        let grandchild = again.fork().unwrap();
        for vm in clones.iter().chain([&grandchild]) {
            assert_eq!(vm.status(), VmStatus::Running);
        }
        let third = grandchild.into_template().unwrap();
        assert!(third.footprint() > 0);
        third.fork().unwrap().destroy();
    }
}

#[tokio::test]
async fn an_exit_that_was_under_way_is_finished_before_the_capture() {
    if !kvm() {
        return;
    }
    // in al, 0x64 for ever: most pauses come in the middle of an exit.
    let vm = boot(vec![0xe4, 0x64, 0xeb, 0xfc]);
    for _ in 0..10 {
        let template = vm.snapshot().unwrap();
        let clone = template.fork().unwrap();
        runs(&clone).await;
    }
}

#[tokio::test]
async fn an_access_in_two_parts_is_finished_before_a_pause() {
    if !kvm() {
        return;
    }
    // Reads eight bytes across the end of the first device's MMIO region: the end of its
    // configuration (zeroes), then the second device's magic number. A pause that dropped the
    // second part would change the value.
    let mut code = vec![
        // The fourth GiB gets a page directory at 2 MiB with one large page: see the boot page
        // tables.
        0xc7, 0x04, 0x25, 0x00, 0x04, 0x20, 0x00, 0x83, 0x00, 0x00, 0xd0,
        // mov dword [0xa018], 0x200003
        0xc7, 0x04, 0x25, 0x18, 0xa0, 0x00, 0x00, 0x03, 0x00, 0x20, 0x00,
        // mov ebx, 0xd0000ffc; mov rcx, "virt" << 32
        0xbb, 0xfc, 0x0f, 0x00, 0xd0, 0x48, 0xb9, 0, 0, 0, 0, 0x76, 0x69, 0x72, 0x74,
        // l: mov rax, [rbx]; cmp rax, rcx; je l
        0x48, 0x8b, 0x03, 0x48, 0x39, 0xc8, 0x74, 0xf8,
    ];
    code.extend(report(0x5f0, 4));
    let vm = boot(code);
    for _ in 0..300 {
        vm.pause().unwrap();
        vm.resume().unwrap();
        tokio::time::sleep(Duration::from_micros(200)).await;
    }
    assert!(vm.exits().mmio.load(Ordering::Relaxed) > 300);
    assert_eq!(vm.status(), VmStatus::Running, "it read something else");
}

#[test]
fn vcpus_can_be_kicked_where_their_owner_blocks_all_signals() {
    if !kvm() {
        return;
    }
    let embedder = std::thread::spawn(|| {
        vmm_sys_util::signal::block_signal(hearth_vmm::kick_signal()).unwrap();
        let vm = boot(vec![0xeb, 0xfe]);
        vm.pause().unwrap();
        vm.resume().unwrap();
        vm.destroy();
    });
    embedder.join().unwrap();
    assert_eq!(hearth_vmm::leaked_vms(), 0);
}

#[tokio::test]
async fn a_clone_has_the_debug_registers_of_its_template() {
    if !kvm() {
        return;
    }
    let mut code = vec![
        // mov rax, 0x1234; mov dr0, rax
        0x48, 0xc7, 0xc0, 0x34, 0x12, 0x00, 0x00, 0x0f, 0x23, 0xc0,
        // l: mov rax, dr0; cmp eax, 0x1234; jne out; in al, 0x64; jmp l
        0x0f, 0x21, 0xc0, 0x3d, 0x34, 0x12, 0x00, 0x00, 0x75, 0x04, 0xe4, 0x64, 0xeb, 0xf2,
    ];
    code.extend(report(0x5f0, 4));
    let vm = boot(code);
    runs(&vm).await;
    let template = vm.into_template().unwrap();
    runs(&template.fork().unwrap()).await;
}

/// Waits until the guest has gone through its loop a few times.
async fn runs(vm: &Vm) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while vm.exits().total() < 5 {
        assert_eq!(vm.status(), VmStatus::Running);
        assert!(Instant::now() < deadline, "the guest does not run");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}
