#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]
//! The library's threads inherit nothing from the thread that happens to make a VM. There is only
//! one test, because it needs the first VM of its process.

use hearth_vmm::{Vm, VmConfig};

/// The name of each thread of the process, and the mask of processors on which it may run.
fn processors() -> Vec<(String, String)> {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let statuses =
        tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("status")).ok());
    let field = |status: &str, name| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap().trim().to_owned()
    };
    let threads = statuses.map(|status| (field(&status, "Name:"), field(&status, "Cpus_allowed:")));
    threads.collect()
}

fn boot() -> Vm {
    // jmp on the spot
    Vm::boot(&VmConfig::flat([0xeb, 0xfe]).memory_mib(32).build().unwrap()).unwrap()
}

/// Regression: a VM's vCPU ran only on the one processor of the thread that had made another VM,
/// long after that VM was gone.
#[test]
fn threads_run_where_the_process_may_whoever_made_the_first_vm() {
    let missing = match std::thread::available_parallelism() {
        _ if !std::path::Path::new("/dev/kvm").exists() => Some("no /dev/kvm"),
        Ok(count) if count.get() < 2 => Some("one processor"),
        _ => None,
    };
    if let Some(missing) = missing {
        // Past the test harness's output capture: the summary of `make test` counts these lines.
        let text = format!("\nNOT MEASURED: {missing}\n");
        let _ = std::io::Write::write_all(&mut std::io::stderr(), text.as_bytes());
        return;
    }
    let main = std::fs::read_to_string("/proc/self/status").unwrap();
    let main = main
        .lines()
        .find_map(|line| line.strip_prefix("Cpus_allowed:"))
        .unwrap()
        .trim();
    let narrow = std::thread::spawn(|| {
        // SAFETY: a live set, of one processor, for the calling thread.
        unsafe {
            let mut set: libc::cpu_set_t = std::mem::zeroed();
            let bytes = std::mem::size_of_val(&set);
            let here = usize::try_from(libc::sched_getcpu()).unwrap();
            libc::CPU_SET(here, &mut set);
            assert_eq!(libc::sched_setaffinity(0, bytes, &raw const set), 0);
        }
        boot().destroy();
        boot()
    });
    let vms = [narrow.join().unwrap(), boot()];
    for vm in &vms {
        // After a pause the vCPU thread has its name.
        vm.pause().unwrap();
    }
    let ours: Vec<_> = processors()
        .into_iter()
        .filter(|(name, _)| name.starts_with("hearth-"))
        .collect();
    assert!(
        ours.iter()
            .filter(|(name, _)| name.starts_with("hearth-vcpu"))
            .count()
            >= 2,
        "{ours:?}"
    );
    for (name, allowed) in &ours {
        assert_eq!(allowed, main, "{name}");
    }
    for vm in vms {
        vm.destroy();
    }
}
