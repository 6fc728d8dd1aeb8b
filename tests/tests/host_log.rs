#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]
//! Guests leave no lines in the log of the host's kernel, whether they behave or write to forbidden
//! registers.

use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};

use hearth_tests::flat::Code;
use hearth_tests::{Guest, alone, kvm, not_measured, within};
use hearth_vmm::Exit;
use rustix::fs::{Mode, OFlags};

/// Opens the log of the host's kernel at its end; reports the test as skipped if it cannot be read.
fn log() -> Option<File> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let log = rustix::fs::open("/dev/kmsg", flags, Mode::empty()).map(File::from);
    let at_its_end = log.map_err(Into::into).and_then(|mut log| {
        log.seek(SeekFrom::End(0))?;
        Ok::<_, std::io::Error>(log)
    });
    match at_its_end {
        Ok(log) => Some(log),
        Err(_) => {
            not_measured("the kernel's log is not for this user to read");
            None
        }
    }
}

/// Returns the lines that KVM has logged since then; each read returns one
/// (Documentation/ABI/testing/dev-kmsg). Leaves out those of a paravirtual KVM that logs each fault
/// of a guest anyway.
fn of_kvm(log: &mut File) -> Vec<String> {
    let mut lines = Vec::new();
    let mut line = [0; 8192];
    loop {
        match log.read(&mut line) {
            Ok(0) => break,
            Ok(len) => lines.push(String::from_utf8_lossy(&line[..len]).into_owned()),
            // Some lines were overwritten before they could be read.
            Err(e) if e.kind() == ErrorKind::BrokenPipe => {}
            Err(_) => break,
        }
    }
    lines.retain(|line| line.contains("kvm") || line.contains("MSR"));
    lines.retain(|line| !line.contains("kvm-pvm"));
    lines
}

/// Regression, on AMD-V: KVM logged a line for each boot, on a performance counter, and one or two
/// for each clone, on debug control.
#[tokio::test]
async fn a_boot_and_a_hundred_clones_leave_nothing_in_the_host_s_log() {
    if !kvm() || !alone() {
        return;
    }
    let Some(mut log) = log() else { return };
    let template = Guest::template().await;
    for _ in 0..100 {
        let clone = Guest::of(template).await;
        clone.vm.destroy();
    }
    let lines = of_kvm(&mut log);
    assert!(lines.is_empty(), "{lines:#?}");
}

/// KVM logs a write to each of these MSRs, on processors of one vendor or the other, if the write
/// gets as far as KVM's list of MSRs.
#[tokio::test]
async fn a_guest_that_writes_msrs_that_no_guest_has_leaves_nothing_in_the_host_s_log() {
    if !kvm() || !alone() {
        return;
    }
    let Some(mut log) = log() else { return };
    let denied = [
        0xc1_u32,
        0x11e,
        0x186,
        0x1d9,
        0xc001_0000,
        0xc001_0004,
        0xc001_0007,
        0xc001_0015,
        0xc001_0058,
        0xc001_0115,
    ];
    for msr in denied {
        let [a, b, c, d] = msr.to_le_bytes();
        // mov ecx, msr; mov eax, 0x3ff; xor edx, edx; wrmsr
        let write = [
            0xb9, a, b, c, d, 0xb8, 0xff, 0x03, 0, 0, 0x31, 0xd2, 0x0f, 0x30,
        ];
        // A fault ends the guest, as it has no handlers; where KVM accepts the write, the guest
        // continues.
        let vm = Code::new().raw(&write).report(1).boot();
        let exit = within(10, "its end", vm.exited()).await;
        assert!(
            matches!(exit, Exit::TripleFault | Exit::PowerOff),
            "{msr:#x}: {exit:?}"
        );
        vm.destroy();
    }
    let lines = of_kvm(&mut log);
    assert!(lines.is_empty(), "{lines:#?}");
}
