#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]
//! Programs in a real guest that try to gain privileges.

use std::time::Duration;

use hearth_agent::client::{Command, Output};
use hearth_agent::proto::{ExitStatus, Put, User, WindowSize};
use hearth_tests::{Guest, kernel_path, kvm, not_measured, within};
use hearth_vmm::{CpuProfile, GUEST_CID, VmStatus};
use tokio::io::AsyncReadExt;

const NOBODY: u32 = 65534;

/// Returns the address of the kernel's system call entry, found in its code in two ways that must
/// agree: the value that it loads into the LSTAR register, and the instructions at the entry.
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

/// Returns the bytes of an ELF file that are loaded at a virtual address.
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

/// Runs `jump-to` as an ordinary user. It sets up a system call (getpid) with flags that no program
/// may set, and jumps to the address in ring 3.
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
    // A permitted jump returns, so a jump that does not was stopped by the kernel.
    let (status, said) = jump(&guest, "self").await;
    assert_eq!(status, ExitStatus::Code(0), "{said}");
    assert!(said.starts_with("returned=false flags=0x"), "{said}");
    // The entry itself, an address inside it, and the kernel's other entries nearby: each must be a
    // fault of the program alone.
    for address in [entry, entry + 3, entry - 16, entry & !0xfff] {
        let (status, said) = jump(&guest, &format!("{address:#x}")).await;
        assert_eq!(status, ExitStatus::Signal(11), "{address:#x}: {said}");
        assert_eq!(said, "", "{address:#x}");
    }
    // The guest is unharmed: system calls work, by the path that was attacked.
    let output = guest.run(Command::new("id")).await;
    assert!(output.stdout.starts_with(b"uid=0"), "{output:?}");
    assert_eq!(guest.vm.status(), VmStatus::Running);
    // Where ring 0 is emulated, system calls arrive by this same fault, so the guarded branch was
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
    // It gets all of the processor except for the twentieth that the kernel reserves for other
    // programs.
    for nonce in 1..=3 {
        let pong = within(5, "a pong beside it", agent.ping(nonce)).await;
        pong.unwrap();
    }
    assert_eq!(guest.vm.status(), VmStatus::Running);
}

/// The program that makes an ordinary user's attempts: `tests/programs/attempts.rs`.
const ATTEMPTS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/attempts"));
const PLACE: &str = "/tmp/attempts";

// include/uapi/asm-generic/errno-base.h, errno.h
const EPERM: i32 = 1;
const ENOENT: i32 = 2;
const EIO: i32 = 5;
const EACCES: i32 = 13;
const ENODEV: i32 = 19;
const ENOSYS: i32 = 38;
const EADDRINUSE: i32 = 98;
const ECONNRESET: i32 = 104;

fn ordinary_user() -> User {
    User {
        uid: NOBODY,
        gid: NOBODY,
        groups: Vec::new(),
    }
}

/// Returns a command that makes one kind of attempt as an ordinary user.
fn attempt(what: &str) -> Command {
    Command::new(PLACE).arg(what).user(ordinary_user())
}

/// Returns a new guest with the program in it.
async fn guest_with_attempts() -> Guest {
    let guest = Guest::fork().await;
    let put = Put::new(PLACE).mode(0o755);
    let put = guest.connect().await.put(put, ATTEMPTS).await;
    put.unwrap();
    guest
}

/// Returns the name and the error number of each try.
fn tries(output: &Output) -> Vec<(String, i32)> {
    let said = String::from_utf8(output.stdout.clone()).unwrap();
    assert_eq!(output.status, ExitStatus::Code(0), "{said} {output:?}");
    let line = |line: &str| {
        let (what, error) = line.rsplit_once(' ').unwrap();
        (what.to_owned(), error.parse().unwrap())
    };
    said.lines().map(line).collect()
}

/// Asserts that the agent answers, runs programs, and still has its own identity.
async fn assert_unharmed(guest: &Guest) {
    let mut agent = guest.connect().await;
    assert_eq!(agent.hello().unwrap().instance, guest.instance);
    within(5, "a pong", agent.ping(1)).await.unwrap();
    let output = guest.run(Command::new("id")).await;
    assert!(output.stdout.starts_with(b"uid=0"), "{output:?}");
    assert_eq!(guest.vm.status(), VmStatus::Running);
}

#[tokio::test]
async fn an_ordinary_user_can_neither_end_the_guest_nor_reach_its_agent() {
    if !kvm() {
        return;
    }
    let guest = guest_with_attempts().await;
    for applet in ["poweroff", "reboot", "halt", "panic"] {
        let output = guest.run(Command::new(applet).user(ordinary_user())).await;
        assert_eq!(output.status, ExitStatus::Code(1), "{applet}: {output:?}");
    }
    let output = guest.run(Command::new("id").user(ordinary_user())).await;
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(said.starts_with("uid=65534 gid=65534"), "{said}");
    let other = guest.connect().await;
    let other = other.exec(Command::new("sleep").arg("1000")).await.unwrap();
    let pid = other.pid().to_string();
    // Interfaces that our kernel lacks are refused too: `kcmp`, `/proc/1/io`.
    let refused = [EPERM, EACCES, ENOENT, ENOSYS];
    // (attack, what is tried, how many times at least, allowed errors of the kernel)
    let attacks: [(&str, &str, usize, &[i32]); 7] = [
        (
            "signals to the agent and to a program of root's",
            "signals",
            19,
            &[EPERM],
        ),
        (
            "the agent traced, looked into and written to",
            "trace",
            43,
            &refused,
        ),
        (
            "the agent slowed down, its limits lowered",
            "schedule",
            7,
            &[EPERM],
        ),
        (
            "devices, settings of the kernel, cgroups and files of root's",
            "files",
            54,
            &[EPERM, EACCES, ENOENT],
        ),
        (
            "the agent's port taken, the agent and the host dialled",
            "sockets",
            13,
            &[EACCES, EADDRINUSE, ENODEV, ECONNRESET],
        ),
        ("rights asked for", "rights", 11, &[EPERM]),
        (
            "all capabilities in namespaces of its own",
            "namespaces",
            17,
            &[EPERM, EACCES, ENOENT],
        ),
    ];
    let mut gains = Vec::new();
    for (attack, what, least, expected) in attacks {
        let attempt = attempt(what).arg(&pid).arg(GUEST_CID.to_string());
        let output = guest.run(attempt).await;
        let mut tried = tries(&output);
        eprintln!("{attack}: {tried:?}");
        if what == "namespaces" {
            // Having them is no gain; using them outside would be.
            assert_eq!(tried.remove(0), ("made".to_owned(), 0));
        }
        assert!(tried.len() >= least, "{attack}: {}", tried.len());
        for (one, error) in tried {
            if !expected.contains(&error) {
                gains.push(format!("{attack}: {one} gave {error}"));
            }
        }
        assert_unharmed(&guest).await;
    }
    assert!(gains.is_empty(), "{gains:#?}");
    drop(other);
}

#[tokio::test]
async fn what_everybody_may_write_to_is_neither_executed_by_root_nor_heeded_by_the_kernel() {
    if !kvm() {
        return;
    }
    let guest = guest_with_attempts().await;
    let output = guest.run(attempt("writable")).await;
    assert_eq!(output.status, ExitStatus::Code(0), "{output:?}");
    let said = String::from_utf8(output.stdout).unwrap();
    let mut found: Vec<&str> = said.lines().collect();
    found.sort_unstable();
    // Directories for everybody's files, where only a file's owner may delete or replace it, and
    // devices that only produce or discard data.
    let expected = [
        "/dev/full",
        "/dev/null",
        "/dev/ptmx",
        "/dev/pts/ptmx",
        "/dev/random",
        "/dev/shm",
        "/dev/tty",
        "/dev/urandom",
        "/dev/zero",
        "/tmp",
    ];
    assert_eq!(found, expected, "every file written to");
    // No user can place a program in the directories where root's programs are looked up by name
    // (`id`, below).
    let mut planted = tries(&guest.run(attempt("plant")).await);
    assert_eq!(planted.len(), 12, "{planted:?}");
    planted.retain(|(_, error)| ![EACCES, ENOENT].contains(error));
    assert_eq!(
        planted,
        Vec::new(),
        "a program laid where root looks for one"
    );
    assert_unharmed(&guest).await;
}

#[tokio::test]
async fn a_set_user_id_program_gives_no_rights_unless_it_is_let() {
    if !kvm() {
        return;
    }
    let guest = guest_with_attempts().await;
    let set_uid = Put::new("/tmp/set-uid").mode(0o4755);
    guest.connect().await.put(set_uid, ATTEMPTS).await.unwrap();
    let who = async |command: Command| {
        let output = guest.run(command.arg("who").user(ordinary_user())).await;
        String::from_utf8(output.stdout).unwrap()
    };
    let program = || Command::new("/tmp/set-uid");
    let said = who(program()).await;
    assert!(said.contains("Uid: 65534 65534 65534 65534"), "{said}");
    assert!(said.contains("CapEff: 0000000000000000"), "{said}");
    assert!(said.contains("NoNewPrivs: 1"), "{said}");
    // The same file takes effect where new privileges are allowed, so the file system did not stop
    // it.
    let said = who(program().allow_new_privileges()).await;
    assert!(said.contains("Uid: 65534 0 0 0"), "{said}");
    assert!(said.contains("NoNewPrivs: 0"), "{said}");
    // Root has all rights anyway; a program that it executes may change to another user.
    let output = guest.run(program().arg("who")).await;
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(said.contains("NoNewPrivs: 0"), "{said}");
}

#[tokio::test]
async fn a_terminal_of_another_request_is_neither_typed_on_nor_taken_over() {
    if !kvm() {
        return;
    }
    let guest = guest_with_attempts().await;
    let size = WindowSize::default();
    for (owner, expected) in [
        // A terminal of another user cannot even be opened.
        (None, &[("open", EACCES)][..]),
        // A terminal of the same user, who may write to it as to any other file of its own.
        (
            Some(ordinary_user()),
            &[("type", EPERM), ("control", EPERM), ("control", EPERM)],
        ),
    ] {
        let sleep = Command::new("sleep").arg("1000").terminal(size);
        let sleep = match owner {
            Some(owner) => sleep.user(owner),
            None => sleep,
        };
        let exec = guest.connect().await.exec(sleep).await.unwrap();
        let found = guest.run(Command::new("ls").arg("/dev/pts")).await;
        let found = String::from_utf8(found.stdout).unwrap();
        let number = found.lines().find(|name| *name != "ptmx").unwrap();
        let place = format!("/dev/pts/{number}");
        let output = guest.run(attempt("terminal").arg(&place)).await;
        for ((what, error), (one, wanted)) in tries(&output).iter().zip(expected) {
            assert_eq!(what, one, "{place}");
            assert!(
                error == wanted || *error == EIO,
                "{place}: {what} gave {error}"
            );
        }
        assert_eq!(tries(&output).len(), expected.len());
        drop(exec);
        let gone = async {
            while guest.run(Command::new("ls").arg("/dev/pts")).await.stdout != b"ptmx\n" {}
        };
        within(10, "end of the terminal", gone).await;
    }
    assert_unharmed(&guest).await;
}

#[tokio::test]
async fn a_user_that_stops_all_its_processes_does_not_stop_the_guest() {
    if !kvm() {
        return;
    }
    let guest = guest_with_attempts().await;
    let mut stopper = guest
        .connect()
        .await
        .exec(attempt("stop-all"))
        .await
        .unwrap();
    let mut said = stopper.stdout().unwrap();
    assert_eq!(said.read_u8().await.unwrap(), b's');
    for round in 0..8 {
        // Programs of the same user are stopped before or after they start. Their timeout ends
        // them.
        let limited = Command::new("true").user(ordinary_user());
        let limited = limited.timeout(Duration::from_millis(100));
        let output = guest.run(limited.grace(Duration::from_millis(50))).await;
        let ended = output.status == ExitStatus::Code(0);
        assert!(ended || output.timed_out, "{round}: {output:?}");
        assert_unharmed(&guest).await;
    }
    drop((stopper, said));
    let output = guest.run(Command::new("id").user(ordinary_user())).await;
    assert!(output.stdout.starts_with(b"uid=65534"), "{output:?}");
}

#[tokio::test]
#[ignore = "long: makes all processes that a guest allows"]
async fn a_user_that_takes_all_processes_and_all_memory_does_not_silence_the_agent() {
    if !kvm() {
        return;
    }
    let guest = guest_with_attempts().await;
    let mut forks = guest.connect().await.exec(attempt("fork")).await.unwrap();
    let mut said = forks.stdout().unwrap();
    let mut made = String::new();
    while !made.ends_with('\n') {
        let byte = within(60, "all processes", said.read_u8()).await;
        made.push(char::from(byte.unwrap()));
    }
    let count: u32 = made.trim().strip_prefix("made ").unwrap().parse().unwrap();
    assert!(count > 16, "{made}");
    assert_unharmed(&guest).await;
    drop((forks, said));
    let mut memory = guest.connect().await.exec(attempt("memory")).await.unwrap();
    let mut said = memory.stdout().unwrap();
    assert_eq!(said.read_u8().await.unwrap(), b't');
    let mut agent = guest.connect().await;
    for nonce in 1..=3 {
        within(10, "a pong beside it", agent.ping(nonce))
            .await
            .unwrap();
    }
    drop(said);
    let ended = within(60, "its end", memory.wait()).await.unwrap();
    assert_eq!(ended.status, ExitStatus::Signal(9), "{ended:?}");
    assert_unharmed(&guest).await;
}
