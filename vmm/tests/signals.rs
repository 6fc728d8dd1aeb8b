#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]
//! The library leaves the embedding program's signals alone, and a child of fork(2) leaves its
//! parent's VMs alone. Each test runs in a process of its own, another run of this binary.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use hearth_vmm::{
    BootError, HostError, PauseError, SnapshotError, VcpuError, Vm, VmConfig, kick_signal,
};

/// The environment variable that is set in the process of one test.
const ALONE: &str = "HEARTH_TEST_ALONE";

/// Runs the calling test in a process of its own and returns `false`; returns `true` in that
/// process.
fn alone() -> bool {
    if std::env::var_os(ALONE).is_some() {
        return true;
    }
    if !std::path::Path::new("/dev/kvm").exists() {
        // Past the test harness's output capture: the summary of `make test` counts these lines.
        let _ = std::io::Write::write_all(&mut std::io::stderr(), b"\nNOT MEASURED: no /dev/kvm\n");
        return false;
    }
    let thread = std::thread::current();
    let name = thread.name().unwrap();
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture", "--test-threads=2"])
        .env(ALONE, "1")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{}\n{text}{errors}",
        output.status
    );
    false
}

/// `in al, 0x64` for ever.
fn boot() -> Result<Vm, BootError> {
    let config = VmConfig::flat([0xe4, 0x64, 0xeb, 0xfc]).memory_mib(32);
    Vm::boot(&config.build().unwrap())
}

fn runs(vm: &Vm) {
    let deadline = Instant::now() + Duration::from_secs(30);
    let begin = vm.exits().total();
    while vm.exits().total() < begin + 5 {
        assert!(Instant::now() < deadline, "it does not run");
        std::thread::sleep(Duration::from_millis(1));
    }
}

extern "C" fn of_the_program(_: libc::c_int) {}

fn handle(signal: i32) {
    let handler = of_the_program as *const () as libc::sighandler_t;
    // SAFETY: a handler that does nothing may run at any time.
    assert_ne!(unsafe { libc::signal(signal, handler) }, libc::SIG_ERR);
}

fn is_handled_by_the_program(signal: i32) -> bool {
    // SAFETY: all-zero is a valid sigaction, which the call fills.
    let action = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        assert_eq!(
            libc::sigaction(signal, std::ptr::null(), &raw mut action),
            0
        );
        action
    };
    action.sa_sigaction == of_the_program as *const () as libc::sighandler_t
}

#[test]
fn a_signal_that_the_program_handles_is_not_taken_from_it() {
    if !alone() {
        return;
    }
    let taken = [libc::SIGSTKFLT, libc::SIGRTMIN() + 6];
    taken.into_iter().for_each(handle);
    let vm = boot().unwrap();
    assert_eq!(kick_signal(), libc::SIGRTMIN() + 7);
    assert!(taken.into_iter().all(is_handled_by_the_program));
    for _ in 0..3 {
        vm.pause().unwrap();
        vm.resume().unwrap();
        runs(&vm);
    }
    // If the program replaces the handler later, the next VM that needs a new thread gets an error.
    handle(kick_signal());
    let refused = loop {
        // The first VMs get threads that were made before.
        match boot() {
            Ok(vm) => std::mem::forget(vm),
            Err(error) => break error,
        }
    };
    let signal = kick_signal();
    assert!(
        matches!(refused, BootError::Vcpu(VcpuError::SignalTaken(taken)) if taken == signal),
        "{refused}"
    );
}

/// Otherwise a handler of the program would run under a seccomp filter, on a small stack.
#[test]
fn threads_of_the_library_take_none_of_the_programs_signals() {
    if !alone() {
        return;
    }
    let vm = boot().unwrap();
    runs(&vm);
    vm.destroy();
    drop(boot().unwrap());
    let bit = |signal: i32| 1u64 << (signal - 1);
    let synchronous = [
        libc::SIGBUS,
        libc::SIGFPE,
        libc::SIGILL,
        libc::SIGSEGV,
        libc::SIGSYS,
        libc::SIGTRAP,
    ];
    // Signals 9 and 19 cannot be blocked, 32 and 33 are reserved by the C library.
    let open = synchronous.map(bit).into_iter().sum::<u64>() | bit(9) | bit(19) | bit(32) | bit(33);
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap();
        let masks: Vec<(String, u64)> = tasks
            .filter_map(|task| {
                let status = std::fs::read_to_string(task.ok()?.path().join("status")).ok()?;
                let field = |name| status.lines().find_map(|line| line.strip_prefix(name));
                let name = field("Name:")?.trim().to_owned();
                let blocked = u64::from_str_radix(field("SigBlk:")?.trim(), 16).ok()?;
                name.starts_with("hearth-").then_some((name, blocked))
            })
            .collect();
        let is_closed = |(name, blocked): &(String, u64)| {
            let own = match name.contains("vcpu") || name.contains("spare") {
                true => bit(kick_signal()),
                false => 0,
            };
            *blocked == !(open | own)
        };
        let kinds = ["events", "spare", "teardown"];
        let all = kinds.map(|kind| masks.iter().any(|(name, _)| name.contains(kind)));
        if all == [true; 3] && masks.iter().all(is_closed) {
            return;
        }
        assert!(Instant::now() < deadline, "{masks:x?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The number of descriptors that event threads listen to (epoll entries).
fn listened_to() -> usize {
    let all = std::fs::read_dir("/proc/self/fdinfo").unwrap();
    let texts = all.filter_map(|fd| std::fs::read_to_string(fd.ok()?.path()).ok());
    let lines = |text: String| text.lines().filter(|line| line.starts_with("tfd:")).count();
    texts.map(lines).sum()
}

#[test]
fn in_a_forked_child_nothing_is_made_and_nothing_of_the_parents_is_touched() {
    if !alone() {
        return;
    }
    let vm = boot().unwrap();
    let other = boot().unwrap();
    let template = vm.snapshot().unwrap();
    let prepared = template.prepare().unwrap();
    let listened = listened_to();
    // SAFETY: the child makes only the calls under test, and ends without unwinding or exit
    // handlers.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let forked = |error: BootError| matches!(error, BootError::Host(HostError::Forked(_)));
        let refused = [
            boot().err().is_some_and(forked),
            template.fork().err().is_some_and(forked),
            template.prepare().err().is_some_and(forked),
            prepared.fork().err().is_some_and(forked),
            matches!(
                other.snapshot(),
                Err(SnapshotError::Pause(PauseError::Forked))
            ),
            matches!(other.pause(), Err(PauseError::Forked)),
            matches!(other.resume(), Err(PauseError::Forked)),
        ];
        other.kill();
        drop(other);
        vm.destroy();
        let wrong = refused.iter().position(|refused| !refused);
        // SAFETY: ends the child at once.
        unsafe { libc::_exit(wrong.map_or(0, |at| 1 + at as i32)) };
    }
    let deadline = Instant::now() + Duration::from_secs(20);
    let mut status = 0;
    loop {
        // SAFETY: the status is a live integer.
        match unsafe { libc::waitpid(child, &raw mut status, libc::WNOHANG) } {
            0 => assert!(Instant::now() < deadline, "the child hangs"),
            ended => break assert_eq!(ended, child),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(libc::WIFEXITED(status), "{status:x}");
    assert_eq!(libc::WEXITSTATUS(status), 0, "which was not refused");
    assert_eq!(listened_to(), listened);
    for vm in [vm, other, prepared.fork().unwrap(), boot().unwrap()] {
        runs(&vm);
        vm.pause().unwrap();
        vm.destroy();
    }
    assert_eq!(hearth_vmm::leaked_vms(), 0);
}
