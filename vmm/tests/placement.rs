#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]
//! The embedding program decides where vCPU threads run.

use std::error::Error as _;
use std::io;
use std::sync::{Arc, Mutex};

use hearth_vmm::{BootError, VcpuError, VcpuThread, Vm, VmConfig};

fn kvm() -> bool {
    let there = std::path::Path::new("/dev/kvm").exists();
    if !there {
        // Past the test harness's output capture: the summary of `make test` counts these lines.
        let _ = io::Write::write_all(&mut io::stderr(), b"\nNOT MEASURED: no /dev/kvm\n");
    }
    there
}

/// The processors of a thread of this process; `None` if it has ended.
fn processors(thread: i32) -> Option<String> {
    let status = std::fs::read_to_string(format!("/proc/self/task/{thread}/status")).ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    Some(line.unwrap().trim().to_owned())
}

/// The threads that were passed to a hook, which pins them to the first processor of this process.
#[derive(Clone, Default)]
struct Placed(Arc<Mutex<Vec<VcpuThread>>>);

impl Placed {
    fn hook(&self) -> impl Fn(&VcpuThread) -> io::Result<()> + Send + Sync + 'static {
        let placed = Arc::clone(&self.0);
        move |thread| {
            placed.lock().unwrap().push(*thread);
            thread.pin(&[first_processor()])
        }
    }

    fn take(&self) -> Vec<VcpuThread> {
        std::mem::take(&mut *self.0.lock().unwrap())
    }
}

fn first_processor() -> usize {
    let list = processors(std::process::id().cast_signed()).unwrap();
    let digits: String = list.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().unwrap()
}

/// jmp on the spot
const SPIN: [u8; 2] = [0xeb, 0xfe];

fn assert_placed(threads: &[VcpuThread]) {
    let indices: Vec<usize> = threads.iter().map(VcpuThread::index).collect();
    assert_eq!(indices, [0, 1]);
    for thread in threads {
        let allowed = processors(thread.id());
        assert_eq!(allowed, Some(first_processor().to_string()), "{thread:?}");
    }
}

#[test]
fn threads_of_a_boot_a_fork_and_a_shell_run_where_the_hook_says_and_no_others_do() {
    if !kvm() {
        return;
    }
    let placed = Placed::default();
    let config = VmConfig::flat(SPIN).memory_mib(32).vcpus(2);
    let booted = Vm::boot(&config.place_vcpus(placed.hook()).build().unwrap()).unwrap();
    let of_boot = placed.take();
    assert_placed(&of_boot);

    let template = booted.snapshot().unwrap();
    let unplaced = template.fork().unwrap();
    assert!(placed.take().is_empty(), "a template does not keep it");
    let template = template.place_vcpus(placed.hook());
    let fork = template.fork().unwrap();
    assert_placed(&placed.take());
    let prepared = template.prepare().unwrap();
    assert_placed(&placed.take());
    let of_prepared = prepared.fork().unwrap();
    assert!(placed.take().is_empty(), "it is told of each thread once");

    for vm in [booted, unplaced, fork, of_prepared] {
        vm.destroy();
    }
    // Threads that were placed for one VM are not used for another.
    let other = Vm::boot(&VmConfig::flat(SPIN).memory_mib(32).build().unwrap()).unwrap();
    other.pause().unwrap();
    let all = processors(std::process::id().cast_signed());
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let threads = tasks.filter_map(|task| task.ok()?.file_name().to_str()?.parse::<i32>().ok());
    for thread in threads {
        let name = std::fs::read_to_string(format!("/proc/self/task/{thread}/comm"));
        let name = name.unwrap_or_default();
        let allowed = processors(thread);
        if name.starts_with("hearth-") && allowed.is_some() {
            assert_eq!(allowed, all, "{name}");
        }
    }
    other.destroy();
}

#[test]
fn a_vm_whose_threads_are_not_placed_is_not_made() {
    if !kvm() {
        return;
    }
    let refuse = |_: &VcpuThread| Err(io::Error::other("no room"));
    let config = VmConfig::flat(SPIN).memory_mib(32);
    let refused = Vm::boot(&config.place_vcpus(refuse).build().unwrap()).unwrap_err();
    assert!(
        matches!(refused, BootError::Vcpu(VcpuError::Placement(_))),
        "{refused}"
    );
    assert_eq!(refused.source().unwrap().to_string(), "no room");
    // Nor if the hook pins to a processor that no host has.
    let far = |thread: &VcpuThread| thread.pin(&[usize::MAX]);
    let config = VmConfig::flat(SPIN).memory_mib(32);
    assert!(Vm::boot(&config.place_vcpus(far).build().unwrap()).is_err());
}
