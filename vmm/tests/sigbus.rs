#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]
//! SIGBUS on a vCPU thread ends that thread's VM; elsewhere it is left to the embedding program.

use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use hearth_vmm::{Exit, Template, Vm, VmConfig, VmStatus};

/// The timeout after which no answer is expected any more.
const STUCK: Duration = Duration::from_secs(30);
/// The environment variable that names the action of a child process.
const ACT: &str = "HEARTH_TEST_SIGBUS";

/// Runs the tests one at a time: they look at all vCPU threads of the process.
static ALONE: Mutex<()> = Mutex::new(());

fn kvm() -> bool {
    let there = std::path::Path::new("/dev/kvm").exists();
    if !there {
        // Past the test harness's output capture: the summary of `make test` counts these lines.
        let _ = std::io::Write::write_all(&mut std::io::stderr(), b"\nNOT MEASURED: no /dev/kvm\n");
    }
    there
}

/// Increments a counter in memory at 2 MiB for ever: `inc dword [0x200000]; jmp`.
const COUNTER: [u8; 9] = [0xff, 0x04, 0x25, 0x00, 0x00, 0x20, 0x00, 0xeb, 0xf7];

fn boot() -> Vm {
    Vm::boot(&VmConfig::flat(COUNTER).memory_mib(32).build().unwrap()).unwrap()
}

fn exit_of(vm: &Vm) -> Exit {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .unwrap();
    let end = runtime.block_on(async { tokio::time::timeout(STUCK, vm.exited()).await });
    end.expect("the guest did not end")
}

/// Threads of this process that run a vCPU.
fn vcpu_threads() -> Vec<i32> {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let tasks = tasks.filter_map(|task| {
        let task = task.ok()?;
        let name = std::fs::read_to_string(task.path().join("comm")).ok()?;
        let id = task.file_name().to_str()?.parse().ok()?;
        name.starts_with("hearth-vcpu").then_some(id)
    });
    tasks.collect()
}

/// The thread of `vm`, which must be the only vCPU thread. It runs the vCPU when this returns.
fn thread_of(vm: &Vm) -> i32 {
    vm.pause().unwrap();
    vm.resume().unwrap();
    let end = Instant::now() + STUCK;
    loop {
        match vcpu_threads().as_slice() {
            [thread] => return *thread,
            others => assert!(Instant::now() < end, "{others:?}"),
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn send(thread: i32) {
    // SAFETY: a plain system call; the thread is one of this process.
    let sent = unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, libc::SIGBUS) };
    assert_eq!(sent, 0);
}

/// Regression: the signal ended the embedding program.
#[test]
fn sigbus_on_a_vcpus_thread_ends_its_vm_and_no_other() {
    if !kvm() {
        return;
    }
    let _alone = ALONE.lock().unwrap_or_else(|e| e.into_inner());
    let vm = boot();
    let thread = thread_of(&vm);
    let other = boot();
    send(thread);
    assert_eq!(exit_of(&vm), Exit::BusError);
    assert_eq!(other.status(), VmStatus::Running);
    other.pause().unwrap();
    other.resume().unwrap();
    vm.destroy();
    // The thread can serve the next VM.
    let next = boot();
    next.pause().unwrap();
    assert_eq!(next.status(), VmStatus::Paused);
    next.destroy();
    other.destroy();
    assert_eq!(hearth_vmm::leaked_vms(), 0);
}

#[test]
fn a_clone_whose_templates_file_is_cut_off_ends_by_itself() {
    if !kvm() {
        return;
    }
    let _alone = ALONE.lock().unwrap_or_else(|e| e.into_inner());
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("template");
    boot().into_template().unwrap().save(&path).unwrap();
    let vm = Template::load_trusted(&path)
        .unwrap()
        .fork_paused()
        .unwrap();
    let memory = std::fs::File::options()
        .write(true)
        .open(path.join("memory"))
        .unwrap();
    memory.set_len(0).unwrap();
    vm.resume().unwrap();
    // Where KVM no longer finds page tables, the guest's processor shuts down.
    let exit = exit_of(&vm);
    let wanted = matches!(
        exit,
        Exit::BusError | Exit::TripleFault | Exit::InternalError(_)
    );
    assert!(wanted, "{exit}");
    vm.destroy();
    let next = boot();
    next.pause().unwrap();
    next.destroy();
}

static HEARD: AtomicU32 = AtomicU32::new(0);

extern "C" fn hear(_: libc::c_int) {
    HEARD.fetch_add(1, Ordering::SeqCst);
}

/// Does the action of a child; its exit status is the result.
fn act(what: &str) {
    match what {
        // A handler of the program is still called for the program's own threads, but not for a
        // vCPU thread.
        "chained" => {
            let handler: extern "C" fn(libc::c_int) = hear;
            // SAFETY: the handler does nothing but count.
            unsafe { libc::signal(libc::SIGBUS, handler as usize) };
            let vm = boot();
            let thread = thread_of(&vm);
            // SAFETY: a signal to this thread, which has a handler.
            unsafe { libc::raise(libc::SIGBUS) };
            assert_eq!(HEARD.load(Ordering::SeqCst), 1);
            send(thread);
            assert_eq!(exit_of(&vm), Exit::BusError);
            assert_eq!(HEARD.load(Ordering::SeqCst), 1);
        }
        // The program has no handler: it ends as it would without the library.
        "default" => {
            // SAFETY: the default disposition.
            unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
            let _vm = boot();
            // SAFETY: ends this process.
            unsafe { libc::raise(libc::SIGBUS) };
        }
        // A notice of lost memory that was not accessed: it is sent once, whereas a fault repeats
        // itself.
        "notice" => {
            // SAFETY: the default disposition; no process of a test has another use for it.
            unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
            let _vm = boot();
            // SAFETY: all-zero bytes are a valid siginfo_t; a process may send itself any code of
            // the kernel's (rt_sigqueueinfo(2)).
            unsafe {
                let mut notice: libc::siginfo_t = std::mem::zeroed();
                notice.si_signo = libc::SIGBUS;
                notice.si_code = libc::BUS_MCEERR_AO;
                let (us, thread) = (libc::getpid(), libc::gettid());
                let call = libc::SYS_rt_tgsigqueueinfo;
                assert_eq!(
                    libc::syscall(call, us, thread, libc::SIGBUS, &raw const notice),
                    0
                );
            }
        }
        // SIGBUS handling is switched off: a vCPU thread is like any other thread.
        "off" => {
            assert!(hearth_vmm::leave_sigbus_alone());
            // SAFETY: the default disposition.
            unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
            let vm = boot();
            send(thread_of(&vm));
            let _ = exit_of(&vm);
        }
        other => panic!("{other}"),
    }
}

#[test]
fn the_programs_own_handling_of_sigbus_stays() {
    if !kvm() {
        return;
    }
    if let Ok(what) = std::env::var(ACT) {
        return act(&what);
    }
    let child = |what| {
        Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "the_programs_own_handling_of_sigbus_stays",
                "--nocapture",
            ])
            .env(ACT, what)
            .output()
            .unwrap()
    };
    let chained = child("chained");
    assert!(chained.status.success(), "{chained:?}");
    for what in ["default", "notice", "off"] {
        let ended = child(what);
        assert_eq!(
            ended.status.signal(),
            Some(libc::SIGBUS),
            "{what}: {ended:?}"
        );
    }
    let _alone = ALONE.lock().unwrap_or_else(|e| e.into_inner());
    let vm = boot();
    assert!(!hearth_vmm::leave_sigbus_alone(), "it is too late");
    vm.destroy();
}
