//! The host's kernel, access to KVM, and the kind of KVM.

use std::time::{Duration, Instant};

use hearth_vmm::host::PROFILE_VARIABLE;
use hearth_vmm::{CpuProfile, Host};

use super::Check;
use crate::failure::chain;

pub(super) fn checks() -> Vec<Check> {
    vec![kernel(), kvm(), new_vms(), split_locks()]
}

fn kernel() -> Check {
    let name = rustix::system::uname();
    Check::ok(
        "host",
        format!(
            "{} {} {}",
            name.sysname().to_string_lossy(),
            name.release().to_string_lossy(),
            name.machine().to_string_lossy()
        ),
    )
}

fn kvm() -> Check {
    let start = Instant::now();
    let host = match Host::get() {
        Ok(host) => host,
        Err(error) => {
            // The error's text says what is wrong and then what to do.
            let text = chain(&error);
            let (found, advice) = text.split_once(": ").unwrap_or((&text, "see dmesg"));
            return Check::fail("kvm", found, advice);
        }
    };
    let took = start.elapsed();
    let kind = match host.profile() {
        CpuProfile::Native => "guest kernels run on the processor",
        CpuProfile::Emulated => {
            "guest kernels run in KVM's instruction emulator (guest programs run natively); boots take seconds"
        }
    };
    let how = match host.probed() {
        Some(probe) => format!("probe guest {probe:.1?}"),
        None => format!("forced by {PROFILE_VARIABLE}"),
    };
    Check::ok(
        "kvm",
        format!(
            "/dev/kvm usable, up to {} vCPUs; {kind} ({how}, host probe {took:.1?} in all)",
            host.max_vcpus()
        ),
    )
}

/// How many VMs are made to measure the time. The shortest time counts: other programs take
/// processor time as well.
const VMS: usize = 3;
/// Pause before each VM: of two in a row the second does not wait.
const APART: Duration = Duration::from_millis(100);
/// Limit for a host that does not wait: it takes far less.
const WAIT: Duration = Duration::from_millis(2);

/// Checks whether the host's kernel makes the creator of a VM wait. Before Linux 6.13 it attaches a
/// thread of the VM's to the creator's control groups, which takes a grace period of RCU unless
/// they are mounted with `favordynmods` (Documentation/admin-guide/cgroup-v2.rst).
fn new_vms() -> Check {
    let name = "new VMs";
    let Ok(host) = Host::get() else {
        return Check::ok(name, "not tried, see kvm");
    };
    let mut shortest = Duration::MAX;
    for _ in 0..VMS {
        std::thread::sleep(APART);
        let start = Instant::now();
        let vm = host.kvm().create_vm();
        // Measured before the VM is dropped: that takes longer, and nothing waits for it.
        shortest = shortest.min(start.elapsed());
        if let Err(error) = vm {
            return Check::warn(
                name,
                format!("KVM refused to make one: {error}"),
                "see dmesg",
            );
        }
    }
    let found = format!("KVM makes one in {shortest:.1?}");
    match shortest < WAIT {
        true => Check::ok(name, found),
        false => Check::warn(
            name,
            format!("{found}: a process keeps one in stock, and forks that come faster wait"),
            "mount -o remount,favordynmods /sys/fs/cgroup (or kernel word cgroup_favordynmods), or use Linux 6.13 or later",
        ),
    }
}

/// With `split_lock_detect=fatal` (Documentation/admin-guide/kernel-parameters.txt) the host's
/// kernel sends SIGBUS to a program that locks memory across two cache lines. A vCPU thread gets it
/// for its guest as well.
fn split_locks() -> Check {
    let words = std::fs::read_to_string("/proc/cmdline").unwrap_or_default();
    if words
        .split_whitespace()
        .any(|word| word == "split_lock_detect=fatal")
    {
        return Check::warn(
            "split locks",
            "the host's kernel was booted with split_lock_detect=fatal: a guest's program can end its VM",
            "boot with split_lock_detect=warn",
        );
    }
    Check::ok("split locks", "not fatal")
}
