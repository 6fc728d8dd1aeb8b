//! The probe guest: how fast does this host run 64-bit ring 0?
//!
//! Ten thousand rounds of `dec; jnz` take microseconds on hardware and about 8 ms where KVM
//! emulates ring 0. CPU names and flags cannot tell, so it is measured.

use std::time::{Duration, Instant};

use kvm_ioctls::{Kvm, VcpuExit};
use vm_memory::{Bytes, GuestAddress};

use super::{CpuProfile, HostError, ioctl};
use crate::boot::long_mode;
use crate::kvm::{create_vm, set_memory};
use crate::layout;
use crate::memory::{GuestRam, MIB};

/// Above this for 10,000 rounds, ring 0 is emulated: ten times what a slow nested host needs, a
/// quarter of what the emulator needs.
const THRESHOLD: Duration = Duration::from_millis(2);

/// `mov ecx, 10000; l: dec ecx; jnz l; hlt; jmp start`: one round ends at each `hlt`.
const CODE: [u8; 12] = [
    0xb9, 0x10, 0x27, 0x00, 0x00, // mov ecx, 10000
    0xff, 0xc9, // dec ecx
    0x75, 0xfc, // jnz -4
    0xf4, // hlt
    0xeb, 0xf4, // jmp -12
];

/// What the probe measured.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Probe {
    pub(crate) best: Duration,
}

impl Probe {
    /// Runs the probe guest on the calling thread; at most three rounds, fewer when the first is fast.
    pub(crate) fn run(kvm: &Kvm) -> Result<Probe, HostError> {
        let failed = |what: &dyn std::fmt::Display| HostError::Probe(what.to_string());
        let ram = GuestRam::new(2 * MIB).map_err(|e| failed(&e))?;
        ram.map()
            .write_slice(&CODE, GuestAddress(layout::HIGH_START))
            .map_err(|e| failed(&e))?;
        let vm = create_vm(kvm).map_err(|e| failed(&e))?;
        set_memory(&vm, &ram).map_err(|e| failed(&e))?;
        let mut vcpu = vm.create_vcpu(0).map_err(|e| ioctl("KVM_CREATE_VCPU", e))?;
        let mut sregs = vcpu.get_sregs().map_err(|e| ioctl("KVM_GET_SREGS", e))?;
        long_mode::enter(ram.map(), &mut sregs).map_err(|e| failed(&e))?;
        vcpu.set_sregs(&sregs)
            .map_err(|e| ioctl("KVM_SET_SREGS", e))?;
        let regs = kvm_bindings::kvm_regs {
            rip: layout::HIGH_START,
            rflags: 2,
            rsp: layout::BOOT_STACK,
            ..Default::default()
        };
        vcpu.set_regs(&regs).map_err(|e| ioctl("KVM_SET_REGS", e))?;
        let mut best = Duration::MAX;
        for _ in 0..3 {
            let start = Instant::now();
            match vcpu.run() {
                Ok(VcpuExit::Hlt) => best = best.min(start.elapsed()),
                Ok(other) => return Err(HostError::Probe(format!("exit {other:?}"))),
                Err(e) if e.errno() == libc::EINTR => {}
                Err(e) => return Err(ioctl("KVM_RUN", e)),
            }
            if best < THRESHOLD {
                break;
            }
        }
        Ok(Probe { best })
    }

    pub(crate) fn profile(self) -> CpuProfile {
        if self.best < THRESHOLD {
            CpuProfile::Native
        } else {
            CpuProfile::Emulated
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_threshold_tells_hardware_from_the_emulator() {
        assert_eq!(
            Probe {
                best: Duration::from_micros(150)
            }
            .profile(),
            CpuProfile::Native
        );
        assert_eq!(
            Probe {
                best: Duration::from_millis(8)
            }
            .profile(),
            CpuProfile::Emulated
        );
    }
}
