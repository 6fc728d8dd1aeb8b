//! The state of one vCPU, saved and restored in the order that KVM requires.

use kvm_bindings::{
    KVM_MP_STATE_RUNNABLE, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs,
    kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;

use crate::cpu::msrs::{self, Registers};
use crate::host::CpuProfile;
use crate::kvm::KvmError;

/// MSRs that are always saved: the time stamp counter, which is saved first, because the deadline
/// refers to it; the deadline, which is saved last, because it is restored after the APIC and after
/// the counter (Intel SDM volume 3, section 11.5.4.1); and processor properties that the guest has
/// read (IA32_ARCH_CAPABILITIES, IA32_BIOS_SIGN_ID), which may differ after a reboot of the host.
const KEPT: [u32; 4] = [msrs::TSC, msrs::TSC_DEADLINE, 0x10a, 0x8b];
/// Ticks by which the time stamp counter is moved away before it is set: more than a minute on any
/// processor.
const FAR: u64 = 1 << 40;
/// MSRs by which the guest sets the address for the wall clock's base: MSR_KVM_WALL_CLOCK and its
/// older number (Documentation/virt/kvm/x86/msr.rst). Not restored: KVM would write to that address
/// again, which costs each clone a page, and guests read the value only right after they set the
/// address.
const MSR_KVM_WALL_CLOCK: [u32; 2] = [0x11, 0x4b56_4d00];

/// Debug registers after a reset (Intel SDM volume 3, table 10-1).
const DEBUG_RESET: kvm_debugregs = kvm_debugregs {
    db: [0; 4],
    dr6: 0xffff_0ff0,
    dr7: 0x400,
    flags: 0,
    reserved: [0; 9],
};

/// Whether the extended control registers have their values after a reset: XCR0 with x87 state
/// alone (Intel SDM volume 3, table 10-1).
fn is_reset(xcrs: &kvm_xcrs) -> bool {
    let [xcr0, ..] = xcrs.xcrs;
    (xcrs.nr_xcrs, xcr0.xcr, xcr0.value) == (1, 0, 1)
}

/// The state of a vCPU in KVM except for CPUID, which follows from host and configuration.
#[derive(serde::Serialize, serde::Deserialize)]
pub(crate) struct VcpuState {
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: Box<kvm_xsave>,
    xcrs: kvm_xcrs,
    debugregs: kvm_debugregs,
    lapic: Box<kvm_lapic_state>,
    /// The MSRs in [`KEPT`], and those that differ from a vCPU that has not run.
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
}

impl std::fmt::Debug for VcpuState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VcpuState")
            .field("rip", &self.regs.rip)
            .finish_non_exhaustive()
    }
}

impl VcpuState {
    /// Saves a vCPU that does not run and has no unfinished exit. `msr_indices` is the host's list
    /// of MSRs, `fresh` the MSRs of a vCPU that has not run.
    pub(crate) fn save(
        vcpu: &VcpuFd,
        msr_indices: &[u32],
        fresh: &[kvm_msr_entry],
    ) -> Result<Self, KvmError> {
        Ok(Self {
            mp_state: vcpu
                .get_mp_state()
                .map_err(KvmError::of("KVM_GET_MP_STATE"))?,
            regs: vcpu.get_regs().map_err(KvmError::of("KVM_GET_REGS"))?,
            sregs: vcpu.get_sregs().map_err(KvmError::of("KVM_GET_SREGS"))?,
            xsave: Box::new(vcpu.get_xsave().map_err(KvmError::of("KVM_GET_XSAVE"))?),
            xcrs: vcpu.get_xcrs().map_err(KvmError::of("KVM_GET_XCRS"))?,
            debugregs: vcpu
                .get_debug_regs()
                .map_err(KvmError::of("KVM_GET_DEBUGREGS"))?,
            lapic: Box::new(vcpu.get_lapic().map_err(KvmError::of("KVM_GET_LAPIC"))?),
            msrs: read_msrs(vcpu, msr_indices, fresh)?,
            events: vcpu
                .get_vcpu_events()
                .map_err(KvmError::of("KVM_GET_VCPU_EVENTS"))?,
        })
    }

    /// Restores the fresh vCPU number `index`, whose CPUID is set. State that equals that after a
    /// reset is not set.
    pub(crate) fn restore(
        &self,
        vcpu: &VcpuFd,
        index: usize,
        profile: CpuProfile,
    ) -> Result<(), KvmError> {
        // KVM_CREATE_VCPU makes the first vCPU runnable; the others wait for it.
        if index > 0 || self.mp_state.mp_state != KVM_MP_STATE_RUNNABLE {
            vcpu.set_mp_state(self.mp_state)
                .map_err(KvmError::of("KVM_SET_MP_STATE"))?;
        }
        vcpu.set_regs(&self.regs)
            .map_err(KvmError::of("KVM_SET_REGS"))?;
        vcpu.set_sregs(&self.sregs)
            .map_err(KvmError::of("KVM_SET_SREGS"))?;
        // SAFETY: KVM reads no more than `kvm_xsave`'s 4096 bytes of a vCPU without dynamic
        // features (AMX), which no guest is shown (`cpu::features`).
        unsafe { vcpu.set_xsave(&self.xsave) }.map_err(KvmError::of("KVM_SET_XSAVE"))?;
        if !is_reset(&self.xcrs) {
            vcpu.set_xcrs(&self.xcrs)
                .map_err(KvmError::of("KVM_SET_XCRS"))?;
        }
        if self.debugregs != DEBUG_RESET {
            vcpu.set_debug_regs(&self.debugregs)
                .map_err(KvmError::of("KVM_SET_DEBUGREGS"))?;
        }
        vcpu.set_lapic(&self.lapic)
            .map_err(KvmError::of("KVM_SET_LAPIC"))?;
        self.restore_msrs(vcpu, index, profile)?;
        vcpu.set_vcpu_events(&self.events)
            .map_err(KvmError::of("KVM_SET_VCPU_EVENTS"))
    }

    fn restore_msrs(
        &self,
        vcpu: &impl Registers,
        index: usize,
        profile: CpuProfile,
    ) -> Result<(), KvmError> {
        let counter = self.msrs.first().filter(|msr| msr.index == msrs::TSC);
        // Only for the first vCPU: KVM gives the others the same counter.
        let counter = counter.filter(|_| index == 0 && profile == CpuProfile::Native);
        if let Some(counter) = counter {
            // KVM before 6.7 takes a value within a second of the counter that it expects, which is
            // that of a new VM, as an attempt to synchronise the vCPUs, and keeps its own counter.
            // The guest's time would stand still until that reached the saved value.
            let far = counter.data.wrapping_add(FAR);
            msrs::write(vcpu, &[msrs::entry(msrs::TSC, far)])?;
        }
        match self.msrs.split_last() {
            Some((deadline, others)) if is_armed(deadline) => {
                msrs::write(vcpu, others)?;
                msrs::write(vcpu, &[self.put_off(*deadline, vcpu)?])?;
            }
            _ => msrs::write(vcpu, &self.msrs)?,
        }
        match counter {
            Some(counter) => goes_on(vcpu, counter.data),
            None => Ok(()),
        }
    }

    /// Returns the deadline moved so that it is as far ahead as at the capture. Where the time
    /// stamp counter cannot be restored, it has advanced since: all deadlines would have passed,
    /// and each clone would begin with a needless timer interrupt.
    fn put_off(
        &self,
        deadline: kvm_msr_entry,
        vcpu: &impl Registers,
    ) -> Result<kvm_msr_entry, KvmError> {
        let Some(saved) = self.msrs.first().filter(|msr| msr.index == msrs::TSC) else {
            return Ok(deadline);
        };
        let now = msrs::read_one(vcpu, msrs::TSC)?;
        let passed = now.map_or(0, |now| now.wrapping_sub(saved.data));
        // Zero would stop the timer.
        let data = deadline.data.wrapping_add(passed).max(1);
        Ok(kvm_msr_entry { data, ..deadline })
    }
}

/// Checks that the time stamp counter has gone on from `from`, to which it was set. Also accepts a
/// counter that cannot be read.
fn goes_on(vcpu: &impl Registers, from: u64) -> Result<(), KvmError> {
    let now = msrs::read_one(vcpu, msrs::TSC)?;
    if now.is_none_or(|now| now.wrapping_sub(from) < FAR / 2) {
        return Ok(());
    }
    Err(KvmError {
        call: "KVM_SET_MSRS",
        source: std::io::Error::other("the clone's time stamp counter is not where it was set"),
    })
}

/// Whether this MSR is the timer's deadline, and armed (zero: not armed).
fn is_armed(msr: &kvm_msr_entry) -> bool {
    msr.index == msrs::TSC_DEADLINE && msr.data != 0
}

/// Reads the MSRs that are saved: those in [`KEPT`], and those that differ from a `fresh` vCPU's.
/// KVM lists more than a hundred, of which a guest has set two dozen; and a write to some of them,
/// whatever the value, makes KVM log a message on the host.
fn read_msrs(
    vcpu: &impl Registers,
    indices: &[u32],
    fresh: &[kvm_msr_entry],
) -> Result<Vec<kvm_msr_entry>, KvmError> {
    let listed = indices.iter().copied();
    let listed = listed.filter(|index| *index != msrs::MTRR_DEF_TYPE);
    let wanted = listed
        .filter(|index| !MSR_KVM_WALL_CLOCK.contains(index))
        .chain([msrs::MTRR_DEF_TYPE]);
    let mut read = msrs::read(vcpu, wanted)?;
    read.retain(|msr| KEPT.contains(&msr.index) || !fresh.contains(msr));
    read.sort_by_key(|msr| match msr.index {
        msrs::TSC => 0,
        msrs::TSC_DEADLINE => 2,
        _ => 1,
    });
    Ok(read)
}

#[cfg(any(test, feature = "testing"))]
impl VcpuState {
    /// The state of a vCPU that never ran.
    pub(crate) fn blank() -> Self {
        Self {
            mp_state: Default::default(),
            regs: Default::default(),
            sregs: Default::default(),
            xsave: Default::default(),
            xcrs: Default::default(),
            debugregs: Default::default(),
            lapic: Default::default(),
            msrs: vec![kvm_msr_entry::default()],
            events: Default::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::collections::BTreeMap;
    use std::io::Write as _;

    use kvm_bindings::Msrs;

    use super::*;
    use crate::host::Host;
    use crate::kvm::{create_irqchip, create_vcpu, create_vm};

    /// A mock vCPU of KVM before 6.7, which ignores a time stamp counter near the one that it
    /// expects.
    #[derive(Default)]
    struct Played {
        msrs: RefCell<BTreeMap<u32, u64>>,
        writes: RefCell<Vec<u32>>,
        keeps_its_counter: bool,
    }

    /// Ticks per second.
    const SECOND: u64 = 2_000_000_000;

    impl Registers for Played {
        fn get(&self, list: &mut Msrs) -> Result<usize, KvmError> {
            for (done, msr) in list.as_mut_slice().iter_mut().enumerate() {
                match self.msrs.borrow().get(&msr.index) {
                    Some(data) => msr.data = *data,
                    None => return Ok(done),
                }
            }
            Ok(list.as_slice().len())
        }

        fn set(&self, list: &Msrs) -> Result<usize, KvmError> {
            for msr in list.as_slice() {
                self.writes.borrow_mut().push(msr.index);
                let mut msrs = self.msrs.borrow_mut();
                let data = msrs.entry(msr.index).or_default();
                let near = data.abs_diff(msr.data) < SECOND;
                let ignored = msr.index == msrs::TSC && (near || self.keeps_its_counter);
                if !ignored {
                    *data = msr.data;
                }
            }
            Ok(list.as_slice().len())
        }
    }

    fn state(msrs: &[(u32, u64)]) -> VcpuState {
        let msrs = msrs.iter().map(|(index, data)| msrs::entry(*index, *data));
        VcpuState {
            msrs: msrs.collect(),
            ..VcpuState::blank()
        }
    }

    #[test]
    fn a_young_guest_s_clock_goes_on_where_it_was_on_kernels_that_would_set_it_back() {
        let saved = state(&[(msrs::TSC, SECOND / 2), (msrs::TSC_DEADLINE, 0)]);
        let young = Played::default();
        saved.restore_msrs(&young, 0, CpuProfile::Native).unwrap();
        assert_eq!(young.msrs.borrow()[&msrs::TSC], SECOND / 2);
        // KVM that never takes the counter cannot run a clone, unless the guest's counter is known
        // to be the host's.
        let stubborn = Played {
            keeps_its_counter: true,
            ..Played::default()
        };
        let refused = saved.restore_msrs(&stubborn, 0, CpuProfile::Native);
        assert_eq!(refused.unwrap_err().call, "KVM_SET_MSRS");
        saved
            .restore_msrs(&stubborn, 0, CpuProfile::Emulated)
            .unwrap();
    }

    #[test]
    fn what_a_vcpu_has_anyway_is_neither_kept_nor_written() {
        let vcpu = Played::default();
        let fresh = [(0x174, 0), (0x1d9, 0), (0x277, 7), (0x10a, 5)];
        let fresh: Vec<_> = fresh
            .iter()
            .map(|(index, data)| msrs::entry(*index, *data))
            .collect();
        let now = [
            (0x10, 1),
            (0x174, 16),
            (0x1d9, 0),
            (0x277, 7),
            (0x10a, 5),
            (0x6e0, 0),
        ];
        vcpu.msrs.borrow_mut().extend(now);
        let indices = now.map(|(index, _)| index);
        let kept = read_msrs(&vcpu, &indices, &fresh).unwrap();
        let kept: Vec<u32> = kept.iter().map(|msr| msr.index).collect();
        // The counter first, the deadline last; processor properties that the guest has read
        // always.
        assert_eq!(kept, [0x10, 0x174, 0x10a, 0x6e0]);
    }

    /// On the host's own KVM, with guests between 1 ms and 5 s old.
    #[test]
    fn a_clone_s_time_stamp_counter_is_not_behind_its_template_s() {
        let host = match Host::get() {
            Ok(host) if host.profile() == CpuProfile::Native => host,
            _ => {
                let why = "no KVM that has a guest's time stamp counter set";
                let _ = writeln!(std::io::stderr(), "\nNOT MEASURED: {why}");
                return;
            }
        };
        for millis in [1, 100, 900, 5_000] {
            let vm = create_vm(host.kvm()).unwrap();
            create_irqchip(&vm, false).unwrap();
            let vcpu = create_vcpu(&vm, 0, host.cpuid()).unwrap();
            let khz = u64::from(vcpu.get_tsc_khz().unwrap());
            let saved = khz * millis;
            let state = state(&[(msrs::TSC, saved), (msrs::TSC_DEADLINE, 0)]);
            state.restore_msrs(&vcpu, 0, CpuProfile::Native).unwrap();
            let now = msrs::read_one(&vcpu, msrs::TSC).unwrap().unwrap();
            let since = now.checked_sub(saved);
            assert!(
                since.is_some_and(|since| since < 10_000 * khz),
                "{now} after {saved}"
            );
        }
    }
}
