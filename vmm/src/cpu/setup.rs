//! Sets up the registers of a vCPU that boots (as opposed to one that is restored).

use kvm_bindings::{kvm_msr_entry, kvm_regs};
use kvm_ioctls::VcpuFd;
use vm_memory::GuestMemoryMmap;

use super::msrs;
use crate::boot::{Entry, EntryMode, long_mode};
use crate::kvm::KvmError;
use crate::layout;

/// Bit of IA32_MISC_ENABLE (Intel SDM volume 4, table 2-2).
const FAST_STRINGS: u64 = 1;
/// Fields of IA32_MTRR_DEF_TYPE (Intel SDM volume 3, section 12.11.2.1): enable bit and default
/// type.
const MTRR_ENABLED: u64 = 1 << 11;
const WRITE_BACK: u64 = 6;
/// Local vector table entries in the APIC page (Intel SDM volume 3, section 11.5.1).
const APIC_LVT0: usize = 0x350;
const APIC_LVT1: usize = 0x360;
/// Delivery modes: external interrupt and NMI.
const APIC_MODE_EXTINT: u32 = 0x700;
const APIC_MODE_NMI: u32 = 0x400;

/// Sets the MSRs and the local APIC of any vCPU, and the entry state of the first. The other vCPUs
/// wait for the first one's start-up interrupt.
pub(crate) fn boot(
    vcpu: &VcpuFd,
    index: u8,
    ram: &GuestMemoryMmap,
    entry: &Entry,
) -> Result<(), KvmError> {
    let bad_ram = |_| KvmError {
        call: "guest memory",
        source: std::io::ErrorKind::InvalidInput.into(),
    };
    // Fast strings, in addition to the bits that KVM reports.
    let misc = msrs::read_one(vcpu, msrs::MISC_ENABLE)?.map(|misc| misc | FAST_STRINGS);
    let misc = misc.map(|misc| msrs::entry(msrs::MISC_ENABLE, misc));
    let mtrr = msrs::entry(msrs::MTRR_DEF_TYPE, MTRR_ENABLED | WRITE_BACK);
    let all: Vec<kvm_msr_entry> = misc.into_iter().chain([mtrr]).collect();
    msrs::write(vcpu, &all)?;
    let mut lapic = vcpu.get_lapic().map_err(KvmError::of("KVM_GET_LAPIC"))?;
    for (register, mode) in [(APIC_LVT0, APIC_MODE_EXTINT), (APIC_LVT1, APIC_MODE_NMI)] {
        if let Some(bytes) = lapic.regs.get_mut(register..register + 4) {
            for (byte, value) in bytes.iter_mut().zip(mode.to_le_bytes()) {
                *byte = value.cast_signed();
            }
        }
    }
    vcpu.set_lapic(&lapic)
        .map_err(KvmError::of("KVM_SET_LAPIC"))?;
    if index > 0 {
        return Ok(());
    }
    let mut sregs = vcpu.get_sregs().map_err(KvmError::of("KVM_GET_SREGS"))?;
    match entry.mode {
        EntryMode::Linux64 => long_mode::enter(ram, &mut sregs).map_err(bad_ram)?,
        EntryMode::Pvh => long_mode::enter_protected(ram, &mut sregs).map_err(bad_ram)?,
    }
    vcpu.set_sregs(&sregs)
        .map_err(KvmError::of("KVM_SET_SREGS"))?;
    let mut regs = kvm_regs {
        rip: entry.address,
        rflags: 2,
        rsp: layout::BOOT_STACK,
        rbp: layout::BOOT_STACK,
        ..Default::default()
    };
    match entry.mode {
        EntryMode::Linux64 => regs.rsi = layout::ZERO_PAGE,
        EntryMode::Pvh => regs.rbx = layout::PVH_INFO,
    }
    vcpu.set_regs(&regs).map_err(KvmError::of("KVM_SET_REGS"))
}
