#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]
//! Programs in a real guest that try to become more than they are.

use hearth_agent::client::Command;
use hearth_agent::proto::{ExitStatus, User};
use hearth_tests::{Guest, kernel_path, kvm, not_measured, within};
use hearth_vmm::{CpuProfile, VmStatus};
use tokio::io::AsyncReadExt;

const NOBODY: u32 = 65534;

/// Where the kernel takes system calls, read from its code in two ways that must agree: the value that
/// it loads for the LSTAR register, and what an entry begins with.
fn syscall_entry(kernel: &[u8]) -> Option<u64> {
    /// `mov ecx, MSR_LSTAR`, after `mov rax, entry`.
    const LOAD: [u8; 8] = [0x48, 0xc7, 0xc0, 0, 0, 0, 0, 0xb9];
    const LSTAR: [u8; 4] = 0xc000_0082_u32.to_le_bytes();
    /// `swapgs; mov gs:[...], rsp`
    const ENTRY: [u8; 6] = [0x0f, 0x01, 0xf8, 0x65, 0x48, 0x89];
    /// `endbr64`
    const ENDBR: [u8; 4] = [0xf3, 0x0f, 0x1e, 0xfa];
    let loaded = kernel.windows(12).find_map(|code| {
        let matches = code[..3] == LOAD[..3] && code[7] == LOAD[7] && code[8..] == LSTAR;
        let value = i32::from_le_bytes(code[3..7].try_into().unwrap());
        matches.then_some(i64::from(value).cast_unsigned())
    })?;
    let code = code_at(kernel, loaded)?;
    let code = code.strip_prefix(&ENDBR).unwrap_or(code);
    assert!(
        code.starts_with(&ENTRY),
        "what lies at {loaded:#x} is no entry: {:02x?}",
        &code[..8]
    );
    Some(loaded)
}

/// The bytes of an ELF file that are loaded at a virtual address.
fn code_at(elf: &[u8], address: u64) -> Option<&[u8]> {
    let number = |at: usize| Some(u64::from_le_bytes(elf.get(at..at + 8)?.try_into().ok()?));
    let headers = usize::try_from(number(32)?).ok()?;
    let count = usize::from(u16::from_le_bytes(elf.get(56..58)?.try_into().ok()?));
    (0..count).find_map(|index| {
        let at = headers + 56 * index;
        let (offset, start, len) = (number(at + 8)?, number(at + 16)?, number(at + 32)?);
        let inside = address.checked_sub(start).filter(|inside| *inside < len)?;
        elf.get(usize::try_from(offset + inside).ok()?..)
    })
}

/// Runs `jump-to` as an ordinary user: it sets up a system call (getpid) with flags that no program may
/// set, and jumps to the address in ring 3.
async fn jump(guest: &Guest, address: &str) -> (ExitStatus, String) {
    let user = User {
        uid: NOBODY,
        gid: NOBODY,
        groups: Vec::new(),
    };
    let command = Command::new("jump-to").arg(address);
    let output = guest.run(command.user(user)).await;
    (
        output.status,
        String::from_utf8_lossy(&output.stdout).into_owned(),
    )
}

#[tokio::test]
async fn a_program_that_jumps_to_the_system_call_entry_gains_nothing() {
    if !kvm() {
        return;
    }
    let kernel = std::fs::read(kernel_path()).unwrap();
    let Some(entry) = syscall_entry(&kernel) else {
        return not_measured("the kernel's system call entry was not found in its code");
    };
    let guest = Guest::fork().await;
    // A jump that may be made comes back, so that one that does not was stopped by the kernel.
    let (status, said) = jump(&guest, "self").await;
    assert_eq!(status, ExitStatus::Code(0), "{said}");
    assert!(said.starts_with("returned=false flags=0x"), "{said}");
    // The entry itself, into it, and the kernel's other doors nearby: each is a fault of the program
    // and of nobody else.
    for address in [entry, entry + 3, entry - 16, entry & !0xfff] {
        let (status, said) = jump(&guest, &format!("{address:#x}")).await;
        assert_eq!(status, ExitStatus::Signal(11), "{address:#x}: {said}");
        assert_eq!(said, "", "{address:#x}");
    }
    // The guest is none the worse: system calls work, by the path that was attacked.
    let output = guest.run(Command::new("id")).await;
    assert!(output.stdout.starts_with(b"uid=0"), "{output:?}");
    assert_eq!(guest.vm.status(), VmStatus::Running);
    // Where ring 0 is emulated, this very fault is how system calls come in, so the guarded branch was
    // reached; on hardware the kernel has no such branch.
    let words = guest
        .run(Command::new("cat").arg("/proc/cmdline"))
        .await
        .stdout;
    let words = String::from_utf8(words).unwrap();
    let emulated = guest.vm.profile() == CpuProfile::Emulated;
    assert_eq!(words.contains("hearth.emulated"), emulated, "{words}");
}

#[tokio::test]
async fn a_program_of_real_time_priority_does_not_silence_the_agent() {
    if !kvm() {
        return;
    }
    let guest = Guest::fork().await;
    let mut agent = guest.connect().await;
    let hog = guest.connect().await;
    let mut exec = hog.exec(Command::new("starve-agent")).await.unwrap();
    let mut said = exec.stdout().unwrap();
    assert_eq!(said.read_u8().await.unwrap(), b's');
    // It has all of the processor but the twentieth that the kernel keeps for others.
    for nonce in 1..=3 {
        let pong = within(5, "a pong beside it", agent.ping(nonce)).await;
        pong.unwrap();
    }
    assert_eq!(guest.vm.status(), VmStatus::Running);
}

#[tokio::test]
async fn an_ordinary_user_can_neither_end_the_guest_nor_reach_its_agent() {
    if !kvm() {
        return;
    }
    let guest = Guest::fork().await;
    let user = || User {
        uid: NOBODY,
        gid: NOBODY,
        groups: Vec::new(),
    };
    for applet in ["poweroff", "reboot", "halt", "panic"] {
        let output = guest.run(Command::new(applet).user(user())).await;
        assert_eq!(output.status, ExitStatus::Code(1), "{applet}: {output:?}");
    }
    let output = guest.run(Command::new("id").user(user())).await;
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(said.starts_with("uid=65534 gid=65534"), "{said}");
    assert_eq!(guest.vm.status(), VmStatus::Running);
}
