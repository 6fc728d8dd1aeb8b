//! The state of one vCPU, saved and restored in the order that KVM wants.

use kvm_bindings::{
    KVM_MP_STATE_RUNNABLE, Msrs, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry,
    kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;

use crate::kvm::KvmError;

/// IA32_TSC_DEADLINE; restored after the APIC and after the TSC (Intel SDM volume 3, section
/// 11.5.4.1), so it is kept last.
pub(super) const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// Where the guest wants the wall clock's base written, MSR_KVM_WALL_CLOCK and its older number
/// (Documentation/virt/kvm/x86/msr.rst). Not restored: KVM would write there once more, a page of each clone
/// for a value that is only read when it was just asked for.
const MSR_KVM_WALL_CLOCK: [u32; 2] = [0x11, 0x4b56_4d00];
/// IA32_MTRR_DEF_TYPE: set at boot, but not in KVM's list.
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// IA32_TSC; first, because the deadline refers to it.
pub(super) const MSR_TSC: u32 = 0x10;

/// Debug registers after a reset (Intel SDM volume 3, table 10-1).
const DEBUG_RESET: kvm_debugregs = kvm_debugregs {
    db: [0; 4],
    dr6: 0xffff_0ff0,
    dr7: 0x400,
    flags: 0,
    reserved: [0; 9],
};

/// Whether these are the extended control registers after a reset: XCR0 with x87 state alone (Intel SDM
/// volume 3, table 10-1).
fn is_reset(xcrs: &kvm_xcrs) -> bool {
    let [xcr0, ..] = xcrs.xcrs;
    (xcrs.nr_xcrs, xcr0.xcr, xcr0.value) == (1, 0, 1)
}

/// Everything that KVM keeps of a vCPU but for CPUID, which follows from host and configuration.
#[derive(serde::Serialize, serde::Deserialize)]
pub(crate) struct VcpuState {
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: Box<kvm_xsave>,
    xcrs: kvm_xcrs,
    debugregs: kvm_debugregs,
    lapic: Box<kvm_lapic_state>,
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
    /// Saves a vCPU that does not run and has no exit unfinished. `msr_indices` is the host's list.
    pub(crate) fn save(vcpu: &VcpuFd, msr_indices: &[u32]) -> Result<Self, KvmError> {
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
            msrs: read_msrs(vcpu, msr_indices)?,
            events: vcpu
                .get_vcpu_events()
                .map_err(KvmError::of("KVM_GET_VCPU_EVENTS"))?,
        })
    }

    /// Restores a fresh vCPU, the `index`th, whose CPUID is set. What it has from its reset is not set.
    pub(crate) fn restore(&self, vcpu: &VcpuFd, index: usize) -> Result<(), KvmError> {
        // The first vCPU is runnable from the start, the others wait for it (KVM_CREATE_VCPU).
        if index > 0 || self.mp_state.mp_state != KVM_MP_STATE_RUNNABLE {
            vcpu.set_mp_state(self.mp_state)
                .map_err(KvmError::of("KVM_SET_MP_STATE"))?;
        }
        vcpu.set_regs(&self.regs)
            .map_err(KvmError::of("KVM_SET_REGS"))?;
        vcpu.set_sregs(&self.sregs)
            .map_err(KvmError::of("KVM_SET_SREGS"))?;
        // SAFETY: KVM reads no more than `kvm_xsave`'s 4096 bytes unless the process asked for
        // larger features (AMX) with arch_prctl, which this library never does.
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
        match self.msrs.split_last() {
            Some((deadline, others)) if is_armed(deadline) => {
                write_msrs(vcpu, others)?;
                write_msrs(vcpu, &[self.put_off(*deadline, vcpu)?])?;
            }
            _ => write_msrs(vcpu, &self.msrs)?,
        }
        vcpu.set_vcpu_events(&self.events)
            .map_err(KvmError::of("KVM_SET_VCPU_EVENTS"))
    }

    /// The deadline as far ahead as it was. Where the time stamp counter cannot be restored it has gone on since: all
    /// deadlines would be over, and each clone would begin with a timer interrupt for nothing.
    fn put_off(&self, deadline: kvm_msr_entry, vcpu: &VcpuFd) -> Result<kvm_msr_entry, KvmError> {
        let Some(saved) = self.msrs.first().filter(|msr| msr.index == MSR_TSC) else {
            return Ok(deadline);
        };
        let now = read_msrs(vcpu, &[MSR_TSC])?;
        let now = now.iter().find(|msr| msr.index == MSR_TSC);
        let passed = now.map_or(0, |now| now.data.wrapping_sub(saved.data));
        // Back at zero it would stop the timer.
        let data = deadline.data.wrapping_add(passed).max(1);
        Ok(kvm_msr_entry { data, ..deadline })
    }
}

/// Whether this is the timer's deadline, and there is one (zero: none).
fn is_armed(msr: &kvm_msr_entry) -> bool {
    msr.index == MSR_TSC_DEADLINE && msr.data != 0
}

fn msr_list(entries: &[kvm_msr_entry]) -> Result<Msrs, KvmError> {
    Msrs::from_entries(entries).map_err(|_| KvmError {
        call: "MSR list",
        source: std::io::ErrorKind::InvalidInput.into(),
    })
}

/// Reads all that can be read. KVM stops at the first MSR that it cannot read (some are listed but
/// not given to this guest); that one is left out.
fn read_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, KvmError> {
    let listed = indices.iter().filter(|index| **index != MSR_MTRR_DEF_TYPE);
    let mut left: Vec<kvm_msr_entry> = listed
        .filter(|index| !MSR_KVM_WALL_CLOCK.contains(index))
        .chain([&MSR_MTRR_DEF_TYPE])
        .map(|index| kvm_msr_entry {
            index: *index,
            ..Default::default()
        })
        .collect();
    let mut read = Vec::with_capacity(left.len());
    while !left.is_empty() {
        let mut list = msr_list(&left)?;
        let count = vcpu
            .get_msrs(&mut list)
            .map_err(KvmError::of("KVM_GET_MSRS"))?;
        read.extend_from_slice(list.as_slice().get(..count).unwrap_or(&[]));
        left.drain(..(count + 1).min(left.len()));
    }
    read.sort_by_key(|msr| match msr.index {
        MSR_TSC => 0,
        MSR_TSC_DEADLINE => 2,
        _ => 1,
    });
    Ok(read)
}

/// Writes all that can be written, in order; an MSR that KVM only lets read is passed over.
fn write_msrs(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), KvmError> {
    let mut left = entries;
    while !left.is_empty() {
        let count = vcpu
            .set_msrs(&msr_list(left)?)
            .map_err(KvmError::of("KVM_SET_MSRS"))?;
        left = left.get(count + 1..).unwrap_or(&[]);
    }
    Ok(())
}

#[cfg(any(test, feature = "testing"))]
impl VcpuState {
    /// Of a vCPU that never ran.
    pub(super) fn blank() -> Self {
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
