//! The host's kernel, access to KVM, and the kind of KVM.

use std::time::Instant;

use hearth_vmm::host::PROFILE_VARIABLE;
use hearth_vmm::{CpuProfile, Host};

use super::Check;
use crate::failure::chain;

pub(super) fn checks() -> Vec<Check> {
    vec![kernel(), kvm(), split_locks()]
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
            // The error says both what is wrong and what to do.
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

/// With `split_lock_detect=fatal` (Documentation/admin-guide/kernel-parameters.txt) the host's kernel sends
/// SIGBUS to a program that locks memory across two cache lines, to a vCPU's thread for its guest, too.
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
