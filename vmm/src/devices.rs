//! The devices of a VM, created new or restored from the state of another VM.

use vmm_sys_util::eventfd::EventFd;

use crate::boot_error::BootError;
use crate::hardware::{GUEST_CID, Hardware};
use crate::legacy::console::Console;
use crate::legacy::serial::SerialPort;
#[cfg(feature = "testing")]
use crate::memory::GuestRam;
use crate::saved::VmState;
use crate::virtio::balloon::{Balloon, BalloonDevice};
#[cfg(feature = "testing")]
use crate::virtio::mmio::MmioTransport;
use crate::virtio::pmem::PmemDevice;
use crate::virtio::vsock::{VsockDevice, VsockHost};
use crate::virtio::{DeviceState, VirtioDevice};
#[cfg(feature = "testing")]
use crate::vm_fds::serial_interrupt;
use crate::vm_fds::{DeviceEvents, PlacedImage};

/// The devices of one VM.
pub(crate) struct Devices {
    /// In the order of their MMIO regions.
    pub(crate) virtio: Vec<Box<dyn VirtioDevice>>,
    pub(crate) serial: Option<SerialPort>,
    pub(crate) console: Console,
    pub(crate) vsock: VsockHost,
    pub(crate) balloon: Balloon,
}

impl Devices {
    pub(crate) fn new(
        hardware: Hardware,
        images: &[PlacedImage],
        device_events: &[DeviceEvents],
        irq: Option<EventFd>,
    ) -> Result<Self, BootError> {
        let [vsock, balloon, ..] = device_events else {
            return Err(BootError::State(NO_EVENTS.into()));
        };
        let vsock = VsockDevice::new(GUEST_CID, vsock.doorbell.clone());
        let balloon = BalloonDevice::new(memory_mib(hardware), balloon.doorbell.clone());
        let console = Console::default();
        let serial = irq.map(|irq| SerialPort::new(console.clone(), irq));
        Ok(Self::with(vsock, balloon, images, serial, console))
    }

    pub(crate) fn restore(
        state: &VmState,
        images: &[PlacedImage],
        device_events: &[DeviceEvents],
        irq: Option<EventFd>,
    ) -> Result<Self, BootError> {
        let parts: Vec<_> = state.transports.iter().map(|t| &t.device).collect();
        let [
            DeviceState::Vsock(vsock),
            DeviceState::Balloon(balloon),
            rest @ ..,
        ] = parts.as_slice()
        else {
            return Err(BootError::State("devices in another order".into()));
        };
        // The remaining devices must all be pmem, one for each of `images`.
        if rest.len() != images.len() {
            return Err(BootError::State("devices that the VM does not have".into()));
        }
        let [vsock_events, balloon_events, ..] = device_events else {
            return Err(BootError::State(NO_EVENTS.into()));
        };
        let vsock = VsockDevice::restore(vsock, vsock_events.doorbell.clone());
        let mib = memory_mib(state.hardware);
        let balloon = BalloonDevice::restore(balloon, mib, balloon_events.doorbell.clone());
        let console = Console::default();
        let serial = match (&state.serial, irq) {
            (Some(saved), Some(irq)) => {
                let port = SerialPort::restore(saved, console.clone(), irq);
                Some(port.map_err(BootError::Descriptors)?)
            }
            (Some(_), None) => return Err(BootError::State(NO_EVENTS.into())),
            (None, _) => None,
        };
        Ok(Self::with(vsock, balloon, images, serial, console))
    }

    fn with(
        (vsock_device, vsock): (VsockDevice, VsockHost),
        (balloon_device, balloon): (BalloonDevice, Balloon),
        images: &[PlacedImage],
        serial: Option<SerialPort>,
        console: Console,
    ) -> Self {
        let mut virtio: Vec<Box<dyn VirtioDevice>> =
            vec![Box::new(vsock_device), Box::new(balloon_device)];
        for (image, address) in images {
            virtio.push(Box::new(PmemDevice::new(image.clone(), *address)));
        }
        Self {
            virtio,
            serial,
            console,
            vsock,
            balloon,
        }
    }
}

/// Error for a saved device that is not part of the saved hardware.
const NO_EVENTS: &str = "a device without its eventfds";

/// Restores the devices of a template's state in 2 MiB of memory of their own, as a clone does, and
/// runs each. For the fuzz target of the contents of a template's file.
#[cfg(feature = "testing")]
pub(crate) fn restore_devices(state: &VmState) -> Result<(), BootError> {
    /// Most runs of one device; further runs show nothing new.
    const RUNS: usize = 64;
    let ram = GuestRam::new(2 << 20)?;
    let device_events = [DeviceEvents::new()?, DeviceEvents::new()?];
    let devices = Devices::restore(state, &[], &device_events, Some(serial_interrupt()?))?;
    for ((device, events), saved) in devices
        .virtio
        .into_iter()
        .zip(device_events)
        .zip(&state.transports)
    {
        let mut transport =
            MmioTransport::new(device, ram.clone(), events.doorbell, events.interrupt);
        transport
            .restore(saved)
            .map_err(|e| BootError::State(e.to_string()))?;
        transport.begin();
        let mut runs = std::iter::repeat_with(|| transport.run()).take(RUNS);
        let _ = runs.find(|progress| *progress == crate::virtio::Progress::Idle);
    }
    Ok(())
}

fn memory_mib(hardware: Hardware) -> u32 {
    u32::try_from(hardware.memory_bytes >> 20).unwrap_or(u32::MAX)
}
