//! KVM capabilities that restrict guests further, where the host's kernel has them: performance
//! counters, MSRs whose writes KVM logs on the host, bus locks (they stall the memory of all
//! processors), and loops that let no interrupt through.

use kvm_bindings::{
    KVM_BUS_LOCK_DETECTION_EXIT, KVM_CAP_PMU_CAPABILITY, KVM_CAP_X86_BUS_LOCK_EXIT,
    KVM_CAP_X86_MSR_FILTER, KVM_CAP_X86_NOTIFY_VMEXIT, KVM_PMU_CAP_DISABLE,
    KVM_X86_NOTIFY_VMEXIT_ENABLED, KVM_X86_NOTIFY_VMEXIT_USER, kvm_enable_cap,
};
use kvm_ioctls::{Kvm, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VmFd};

use crate::kvm::KvmError;

/// The restrictions that the host's KVM supports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Caps {
    /// KVM exits at each bus lock (Linux 5.12, Intel; Documentation/virt/kvm/api.rst, 7.22).
    bus_locks: bool,
    /// KVM exits when a guest lets no interrupt through (Linux 6.0, Intel; 7.34).
    notify: bool,
    /// KVM can create VMs without performance counters (Linux 5.18; 8.35).
    no_pmu: bool,
    /// KVM can deny writes to chosen MSRs (Linux 5.10; 4.137).
    msr_filter: bool,
}

/// MSRs that KVM does not implement but lets guests write, logging each write on the host
/// (`kvm_pr_unimpl_wrmsr` in arch/x86/kvm): the first and how many. With the filter, a write raises
/// the same fault as for an MSR that no processor has.
const LOGGED: &[(u32, u32)] = &[
    // BBL_CR_CTL3
    (0x11e, 1),
    // HWCR, MMIO_CONF_BASE, VM_CR and VM_IGNNE of AMD
    (0xc001_0015, 1),
    (0xc001_0058, 1),
    (0xc001_0114, 2),
];
/// The same for performance counters and branch records: the counters of the P6 and their control,
/// debug control, those of the K7.
const LOGGED_OF_PMU: &[(u32, u32)] = &[(0xc1, 2), (0x186, 2), (0x1d9, 1), (0xc001_0000, 8)];
/// Bitmap for the longest range, a bit per MSR. No bit is set: no MSR may be written.
const DENIED: [u8; 1] = [0];

impl Caps {
    pub(crate) fn of(kvm: &Kvm) -> Self {
        Self::answered(|cap| kvm.check_extension_raw(cap.into()))
    }

    /// Builds the value from `ask`, which answers as `KVM_CHECK_EXTENSION`.
    fn answered(ask: impl Fn(u32) -> i32) -> Self {
        let has = |cap, bit: u32| ask(cap) > 0 && ask(cap).cast_unsigned() & bit != 0;
        Self {
            bus_locks: has(KVM_CAP_X86_BUS_LOCK_EXIT, KVM_BUS_LOCK_DETECTION_EXIT),
            notify: has(KVM_CAP_X86_NOTIFY_VMEXIT, u32::MAX),
            no_pmu: has(KVM_CAP_PMU_CAPABILITY, KVM_PMU_CAP_DISABLE),
            msr_filter: has(KVM_CAP_X86_MSR_FILTER, u32::MAX),
        }
    }

    /// Restricts a VM that was just created, before it has memory slots and interrupt controllers.
    /// With `pmu` the VM keeps the performance counters, if the host has any.
    ///
    /// Setting the filter waits for a grace period of the VM's SRCU
    /// (`kvm_vm_ioctl_set_msr_filter`): 70 us for the VM's first, which saves the memory slots half
    /// of that; 15 ms after `KVM_CREATE_IRQCHIP`, which starts a grace period that is not
    /// expedited.
    pub(crate) fn confine(self, vm: &VmFd, pmu: bool) -> Result<(), KvmError> {
        for cap in self.enabled(pmu) {
            vm.enable_cap(&cap)
                .map_err(KvmError::of("KVM_ENABLE_CAP"))?;
        }
        if !self.msr_filter {
            return Ok(());
        }
        let of_pmu = if pmu { &[] } else { LOGGED_OF_PMU };
        let ranges: Vec<MsrFilterRange<'_>> = LOGGED
            .iter()
            .chain(of_pmu)
            .map(|(base, count)| MsrFilterRange {
                flags: MsrFilterRangeFlags::WRITE,
                base: *base,
                msr_count: *count,
                bitmap: &DENIED,
            })
            .collect();
        vm.set_msr_filter(MsrFilterDefaultAction::ALLOW, &ranges)
            .map_err(KvmError::of("KVM_X86_SET_MSR_FILTER"))
    }

    fn enabled(self, pmu: bool) -> Vec<kvm_enable_cap> {
        // The upper half holds the notify window. Zero adds nothing to the processor's own window.
        let notify = KVM_X86_NOTIFY_VMEXIT_ENABLED | KVM_X86_NOTIFY_VMEXIT_USER;
        let caps = [
            (
                self.bus_locks,
                KVM_CAP_X86_BUS_LOCK_EXIT,
                KVM_BUS_LOCK_DETECTION_EXIT,
            ),
            (self.notify, KVM_CAP_X86_NOTIFY_VMEXIT, notify),
            (
                self.no_pmu && !pmu,
                KVM_CAP_PMU_CAPABILITY,
                KVM_PMU_CAP_DISABLE,
            ),
        ];
        let wanted = caps.into_iter().filter(|(wanted, ..)| *wanted);
        wanted
            .map(|(_, cap, argument)| kvm_enable_cap {
                cap,
                args: [argument.into(), 0, 0, 0],
                ..Default::default()
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the capabilities enabled on a host with these answers.
    fn enabled(answers: &[(u32, i32)], pmu: bool) -> Vec<(u32, u64)> {
        let answer = |cap| {
            answers
                .iter()
                .find(|(of, _)| *of == cap)
                .map_or(0, |(_, it)| *it)
        };
        let caps = Caps::answered(answer).enabled(pmu);
        caps.iter().map(|cap| (cap.cap, cap.args[0])).collect()
    }

    #[test]
    fn a_host_is_asked_for_what_it_has_and_no_more() {
        assert_eq!(enabled(&[], false), []);
        // KVM answers with a bit mask of its modes: off is bit 0, an exit is bit 1.
        let bus_locks = KVM_CAP_X86_BUS_LOCK_EXIT;
        assert_eq!(enabled(&[(bus_locks, 3)], false), [(bus_locks, 2)]);
        assert_eq!(enabled(&[(bus_locks, 1)], false), []);
        let notify = KVM_CAP_X86_NOTIFY_VMEXIT;
        assert_eq!(enabled(&[(notify, 1)], false), [(notify, 3)]);
        let pmu = KVM_CAP_PMU_CAPABILITY;
        assert_eq!(enabled(&[(pmu, 1)], false), [(pmu, 1)]);
        assert_eq!(enabled(&[(pmu, 1)], true), []);
        // An error counts as not supported.
        assert_eq!(
            enabled(&[(bus_locks, -1), (notify, -22), (pmu, -1)], false),
            []
        );
    }

    #[test]
    fn each_range_of_denied_msrs_has_its_bits() {
        let ranges = LOGGED.iter().chain(LOGGED_OF_PMU);
        for (_, count) in ranges {
            assert!(count.div_ceil(8) as usize <= DENIED.len());
        }
    }
}
