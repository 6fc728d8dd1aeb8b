//! Captures the state of a VM that keeps running, while its vCPUs and devices are paused.

use std::sync::Arc;

use kvm_ioctls::VmFd;

use super::SnapshotError;
use crate::bus::{DeviceBus, SharedTransport};
use crate::cpu::msrs;
use crate::hardware::Hardware;
use crate::host::Host;
use crate::legacy::serial::SerialPort;
use crate::memory::GuestRam;
use crate::saved::VmState;
use crate::saved::cpu::VcpuState;
use crate::saved::irqchip::ChipState;
use crate::vcpu::control::{RunState, VcpuControl};
use crate::vm_fds;
use crate::vm_inner::{DropGuards, VmInner};

/// The parts of a VM that a capture needs. It shares them with the VM, so that a teardown of the VM
/// need not wait for it. Fields are dropped in this order: the KVM VM is closed before memory is
/// unmapped.
#[derive(Debug)]
pub(crate) struct Capture {
    pub(crate) hardware: Hardware,
    pub(crate) control: Arc<VcpuControl>,
    pub(crate) vm: Arc<VmFd>,
    pub(crate) bus: Arc<DeviceBus>,
    pub(crate) ram: GuestRam,
    pub(crate) _drop_guards: DropGuards,
}

impl VmInner {
    /// Returns the parts that a capture needs; `None` once the VM was torn down.
    pub(crate) fn capture(&self) -> Option<Capture> {
        Some(Capture {
            hardware: self.hardware,
            control: Arc::clone(&self.control),
            vm: Arc::clone(self.vm.as_ref()?),
            bus: Arc::clone(&self.bus),
            ram: self.ram.clone()?,
            _drop_guards: self.drop_guards.clone(),
        })
    }
}

impl Capture {
    /// Saves the state of a VM whose vCPUs are parked, and returns it with the result of
    /// `with_memory`, which runs while no device can write to memory. Devices are saved before
    /// KVM's state, so that an interrupt raised by a device is in the controllers when they are
    /// saved.
    pub(crate) fn save<T>(
        &self,
        with_memory: impl FnOnce(&GuestRam) -> std::io::Result<T>,
    ) -> Result<(VmState, T), SnapshotError> {
        // Paused rather than locked: their event thread also serves other VMs.
        let _asleep = Asleep::all(&self.bus.virtio);
        let devices = self.bus.virtio.iter();
        let saved = devices.map(|transport| transport.lock().save()).collect();
        let serial = self.bus.serial.as_ref().map(SerialPort::save);
        let host = Host::get()?;
        let fresh = vm_fds::fresh_vcpus(host, self.hardware)?;
        let mut vcpus = Vec::with_capacity(usize::from(self.hardware.vcpus));
        for (index, fresh) in fresh.iter().enumerate() {
            let fresh = msrs::read(fresh, host.msr_indices().iter().copied())?;
            let vcpu = self
                .control
                .with_vcpu(index, |vcpu| {
                    VcpuState::save(vcpu, host.msr_indices(), &fresh)
                })
                .ok_or(SnapshotError::Running)??;
            vcpus.push(vcpu);
        }
        let chips = ChipState::save(&self.vm, self.hardware.pit)?;
        let memory = with_memory(&self.ram).map_err(SnapshotError::Memory)?;
        let state = VmState {
            hardware: self.hardware,
            vcpus,
            chips,
            transports: saved,
            serial,
        };
        Ok((state, memory))
    }

    /// Returns whether the guest has ended. The capture is then not needed any more.
    pub(crate) fn is_over(&self) -> bool {
        self.control.run_state() == RunState::Stop
    }
}

/// While this value lives, the devices write nothing to guest memory.
struct Asleep<'a>(&'a [SharedTransport]);

impl<'a> Asleep<'a> {
    fn all(transports: &'a [SharedTransport]) -> Self {
        for transport in transports {
            transport.lock().fall_asleep();
        }
        Self(transports)
    }
}

impl Drop for Asleep<'_> {
    fn drop(&mut self) {
        for transport in self.0 {
            transport.lock().wake();
        }
    }
}
