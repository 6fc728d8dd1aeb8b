//! The state of a VM's interrupt controllers, timer and clock.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
    kvm_pit_state2,
};
use kvm_ioctls::VmFd;

use crate::kvm::KvmError;

/// The state of a VM in KVM, apart from its vCPUs and memory.
#[derive(serde::Serialize, serde::Deserialize)]
pub(crate) struct ChipState {
    irqchips: [kvm_irqchip; 3],
    pit: Option<kvm_pit_state2>,
    clock: kvm_clock_data,
}

impl std::fmt::Debug for ChipState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChipState")
            .field("clock", &self.clock.clock)
            .finish_non_exhaustive()
    }
}

impl ChipState {
    /// Saves the state of a VM whose vCPUs do not run.
    pub(crate) fn save(vm: &VmFd, pit: bool) -> Result<Self, KvmError> {
        let chip = |chip_id| {
            let mut chip = kvm_irqchip {
                chip_id,
                ..Default::default()
            };
            vm.get_irqchip(&mut chip)
                .map_err(KvmError::of("KVM_GET_IRQCHIP"))
                .map(|()| chip)
        };
        let irqchips = [
            chip(KVM_IRQCHIP_PIC_MASTER)?,
            chip(KVM_IRQCHIP_PIC_SLAVE)?,
            chip(KVM_IRQCHIP_IOAPIC)?,
        ];
        let pit = match pit {
            true => Some(vm.get_pit2().map_err(KvmError::of("KVM_GET_PIT2"))?),
            false => None,
        };
        let mut clock = vm.get_clock().map_err(KvmError::of("KVM_GET_CLOCK"))?;
        // Without flags, KVM restores the clock as it was: the guest's monotonic clock goes on from
        // the capture.
        clock.flags = 0;
        Ok(Self {
            irqchips,
            pit,
            clock,
        })
    }

    /// Restores a VM that has interrupt controllers (and a PIT, if one was saved).
    pub(crate) fn restore(&self, vm: &VmFd) -> Result<(), KvmError> {
        for chip in &self.irqchips {
            vm.set_irqchip(chip)
                .map_err(KvmError::of("KVM_SET_IRQCHIP"))?;
        }
        if let Some(pit) = &self.pit {
            vm.set_pit2(pit).map_err(KvmError::of("KVM_SET_PIT2"))?;
        }
        vm.set_clock(&self.clock)
            .map_err(KvmError::of("KVM_SET_CLOCK"))
    }
}

#[cfg(any(test, feature = "testing"))]
impl ChipState {
    /// The state of a VM that never ran.
    pub(crate) fn blank() -> Self {
        Self {
            irqchips: Default::default(),
            pit: Some(kvm_pit_state2::default()),
            clock: kvm_clock_data::default(),
        }
    }
}
