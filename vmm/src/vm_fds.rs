//! The fds of a VM, independent of its guest's state: KVM's VM with memory slots, interrupt
//! controllers and vCPUs, and the eventfds that connect it with its devices.

use kvm_ioctls::{IoEventAddress, NoDatamatch, VcpuFd, VmFd};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::boot_error::BootError;
use crate::cpu::cpuid;
use crate::hardware::Hardware;
use crate::host::{CpuProfile, Host};
use crate::kvm::{self, KvmError};
use crate::layout;
use crate::memory::GuestRam;
use crate::virtio::mmio::register;
use crate::virtio::pmem::PmemImage;
use crate::virtio::{Doorbell, Interrupt};

/// Virtio devices of every VM, in the order of their MMIO regions: vsock, balloon. Pmem follows.
pub(crate) const BASE_DEVICES: usize = 2;

/// A pmem image and its guest address.
pub(crate) type PlacedImage = (PmemImage, u64);

/// See the module's documentation. Fields are dropped in this order: the VM is closed before its
/// memory is unmapped.
#[derive(Debug)]
pub(crate) struct VmFds {
    pub(crate) vcpus: Vec<VcpuFd>,
    pub(crate) vm: VmFd,
    /// One for each virtio device.
    pub(crate) device_events: Vec<DeviceEvents>,
    pub(crate) serial: Option<EventFd>,
    pub(crate) images: Vec<PlacedImage>,
    pub(crate) ram: GuestRam,
}

/// The eventfds of a virtio device: the guest's notifications, and the device's interrupts.
#[derive(Clone, Debug)]
pub(crate) struct DeviceEvents {
    pub(crate) doorbell: Doorbell,
    pub(crate) interrupt: Interrupt,
}

impl DeviceEvents {
    /// Creates the eventfds without registering them with a VM.
    pub(crate) fn new() -> Result<Self, BootError> {
        Ok(Self {
            doorbell: Doorbell::new().map_err(BootError::Descriptors)?,
            interrupt: Interrupt::new().map_err(BootError::Descriptors)?,
        })
    }

    /// Creates the eventfds of the device at MMIO region `index` and registers them with `vm`.
    fn to(vm: &VmFd, index: u32) -> Result<Self, BootError> {
        let events = Self::new()?;
        let base = layout::MMIO_BASE + u64::from(index) * layout::MMIO_SIZE;
        vm.register_irqfd(events.interrupt.fd(), layout::FIRST_IRQ + index)
            .map_err(KvmError::of("KVM_IRQFD"))?;
        // One doorbell for all queues of a device: any value written to QueueNotify rings it.
        let notify = IoEventAddress::Mmio(base + register::QUEUE_NOTIFY);
        vm.register_ioevent(events.doorbell.fd(), &notify, NoDatamatch)
            .map_err(KvmError::of("KVM_IOEVENTFD"))?;
        Ok(events)
    }
}

/// Creates the eventfd of the serial port's interrupt.
pub(crate) fn serial_interrupt() -> Result<EventFd, BootError> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(BootError::Descriptors)
}

impl VmFds {
    /// Creates memory slots before the interrupt controllers (see [`kvm::set_memory`]).
    pub(crate) fn new(
        host: &'static Host,
        hardware: Hardware,
        ram: GuestRam,
        images: Vec<PlacedImage>,
    ) -> Result<Self, BootError> {
        let vm = kvm::spare::vm(host.kvm(), host.profile() == CpuProfile::Native)?;
        host.caps().confine(&vm, hardware.pmu)?;
        kvm::set_memory(&vm, &ram)?;
        kvm::set_images(&vm, &ram, &images)?;
        kvm::create_irqchip(&vm, hardware.pit)?;
        let vcpus = create_vcpus(host, hardware, &vm)?;
        let device_events = (0u32..)
            .take(BASE_DEVICES + images.len())
            .map(|index| DeviceEvents::to(&vm, index))
            .collect::<Result<_, _>>()?;
        let serial = match hardware.console {
            true => {
                let irq = serial_interrupt()?;
                vm.register_irqfd(&irq, layout::SERIAL_IRQ)
                    .map_err(KvmError::of("KVM_IRQFD"))?;
                Some(irq)
            }
            false => None,
        };
        Ok(Self {
            vcpus,
            vm,
            device_events,
            serial,
            images,
            ram,
        })
    }
}

/// Creates vCPUs of a VM without memory, to read their state as KVM creates it.
pub(crate) fn fresh_vcpus(host: &Host, hardware: Hardware) -> Result<Vec<VcpuFd>, KvmError> {
    let vm = kvm::create_vm(host.kvm())?;
    host.caps().confine(&vm, hardware.pmu)?;
    kvm::create_irqchip(&vm, false)?;
    create_vcpus(host, hardware, &vm)
}

fn create_vcpus(host: &Host, hardware: Hardware, vm: &VmFd) -> Result<Vec<VcpuFd>, KvmError> {
    let indices = 0..hardware.vcpus;
    indices
        .map(|index| create_vcpu(host, hardware, vm, index))
        .collect()
}

fn create_vcpu(host: &Host, hardware: Hardware, vm: &VmFd, index: u8) -> Result<VcpuFd, KvmError> {
    let Hardware {
        profile,
        pmu,
        vcpus,
        ..
    } = hardware;
    let cpuid = cpuid::for_vcpu(host.cpuid(), profile, pmu, index, vcpus);
    let cpuid = cpuid.map_err(|_| KvmError {
        call: "KVM_SET_CPUID2",
        source: std::io::ErrorKind::InvalidInput.into(),
    })?;
    kvm::create_vcpu(vm, index, &cpuid)
}
