#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]
//! A process that is stopped (by a debugger or a frozen control group) for longer than the timeouts
//! of its waits.

use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use hearth_vmm::{Vm, VmConfig};

/// The environment variable that marks the child process.
const CHILD: &str = "HEARTH_TEST_FROZEN";
/// Longer than a stop or a pause may take (5 s).
const FROZEN: Duration = Duration::from_millis(5600);
/// The number of the child's VMs; each has a thread that waits for its vCPU nearly all the time.
const VMS: usize = 4;

/// Pauses and resumes VMs until its input ends, then ends them.
fn child() {
    let over = AtomicBool::new(false);
    let rounds = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..VMS {
            scope.spawn(|| {
                // jmp on the spot
                let config = VmConfig::flat([0xeb, 0xfe]).memory_mib(32);
                let vm = Vm::boot(&config.build().unwrap()).unwrap();
                while !over.load(Ordering::SeqCst) {
                    if let Err(error) = vm.pause().and_then(|()| vm.resume()) {
                        eprintln!("{error}");
                        // Exits at once: the other threads run until the input ends.
                        std::process::exit(1);
                    }
                    rounds.fetch_add(1, Ordering::SeqCst);
                }
                vm.destroy();
            });
        }
        while rounds.load(Ordering::SeqCst) < 10 * VMS {
            std::thread::yield_now();
        }
        println!("under way");
        let before = rounds.load(Ordering::SeqCst);
        let _ = std::io::stdin().read(&mut [0]);
        assert!(rounds.load(Ordering::SeqCst) > before);
        over.store(true, Ordering::SeqCst);
    });
    assert_eq!(hearth_vmm::leaked_vms(), 0);
}

/// Regression: pauses in progress failed, and VMs that were being ended were leaked.
#[test]
fn a_process_that_stood_still_goes_on_as_if_it_had_not() {
    if std::env::var_os(CHILD).is_some() {
        return child();
    }
    if !std::path::Path::new("/dev/kvm").exists() {
        // Past the test harness's output capture: the summary of `make test` counts these lines.
        let _ = std::io::Write::write_all(&mut std::io::stderr(), b"\nNOT MEASURED: no /dev/kvm\n");
        return;
    }
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "a_process_that_stood_still_goes_on_as_if_it_had_not",
            "--nocapture",
        ])
        .env(CHILD, "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut lines = lines.map(Result::unwrap);
    assert!(lines.any(|line| line.ends_with("under way")));
    let id = i32::try_from(child.id()).unwrap();
    for signal in [libc::SIGSTOP, libc::SIGCONT] {
        // SAFETY: a plain system call; the child was not waited for yet.
        assert_eq!(unsafe { libc::kill(id, signal) }, 0);
        if signal == libc::SIGSTOP {
            std::thread::sleep(FROZEN);
        }
    }
    // The child does some more rounds and then ends its VMs.
    std::thread::sleep(Duration::from_millis(100));
    drop(child.stdin.take());
    assert!(
        child.wait().unwrap().success(),
        "{:?}",
        lines.collect::<Vec<_>>()
    );
}
