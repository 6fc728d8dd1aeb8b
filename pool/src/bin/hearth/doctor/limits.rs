//! Limits of the host and of this process that bound how many guests run at once.

use std::fs;

use hearth_pool::{Host as _, ThisHost};
use hearth_vmm::{DEFAULT_MEMORY_MIB, MIN_MEMORY_MIB};
use rustix::process::{Resource, getrlimit};

use super::Check;

/// File descriptors of a VM with one vCPU, and some to spare for its owner.
const DESCRIPTORS_PER_VM: u64 = 16;
/// Fewer VMs than this draw a warning.
const MODEST_VMS: u64 = 100;
/// Threads of a VM with one vCPU.
const THREADS_PER_VM: u64 = 1;

pub(super) fn checks() -> Vec<Check> {
    vec![descriptors(), processes(), memory(), overcommit()]
}

fn descriptors() -> Check {
    let limit = getrlimit(Resource::Nofile);
    let soft = limit.current.unwrap_or(u64::MAX);
    let found = format!("{} (soft limit)", count(soft));
    if soft / DESCRIPTORS_PER_VM >= MODEST_VMS {
        return Check::ok("files", found);
    }
    let hard = limit
        .maximum
        .map_or("unlimited".to_owned(), |max| max.to_string());
    Check::warn(
        "files",
        found,
        format!(
            "enough for about {} VMs; raise it with: ulimit -n {hard}",
            soft / DESCRIPTORS_PER_VM
        ),
    )
}

fn processes() -> Check {
    let user = getrlimit(Resource::Nproc).current.unwrap_or(u64::MAX);
    let system = number("/proc/sys/kernel/threads-max").unwrap_or(u64::MAX);
    let threads = user.min(system);
    let found = format!("{} threads at most", count(threads));
    if threads / THREADS_PER_VM >= MODEST_VMS * 2 {
        return Check::ok("threads", found);
    }
    Check::warn(
        "threads",
        found,
        "each vCPU is a thread; raise it with ulimit -u or sysctl kernel.threads-max",
    )
}

fn memory() -> Check {
    let Some(available) = ThisHost.memory_available_mib() else {
        return Check::warn("memory", "/proc/meminfo is not readable", "mount /proc");
    };
    let found = format!(
        "{available} MiB available, enough for {} guests of {DEFAULT_MEMORY_MIB} MiB",
        available / DEFAULT_MEMORY_MIB
    );
    if available < MIN_MEMORY_MIB {
        Check::fail("memory", found, "end other programs or add memory")
    } else if available < DEFAULT_MEMORY_MIB {
        Check::warn(
            "memory",
            found,
            "end other programs, or give guests less with --memory",
        )
    } else {
        Check::ok("memory", found)
    }
}

fn overcommit() -> Check {
    match number("/proc/sys/vm/overcommit_memory") {
        Some(2) => Check::warn(
            "overcommit",
            "strict: guest memory counts in full when it is made, not when it is used",
            "to run more guests: sudo sysctl vm.overcommit_memory=0",
        ),
        Some(mode) => Check::ok(
            "overcommit",
            format!("mode {mode}: guest memory counts when it is used"),
        ),
        None => Check::ok("overcommit", "not known"),
    }
}

fn number(path: &str) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn count(limit: u64) -> String {
    if limit == u64::MAX {
        "unlimited".to_owned()
    } else {
        limit.to_string()
    }
}
