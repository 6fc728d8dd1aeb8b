//! The device bus of one VM: all its devices, for its vCPUs and the event threads.
//!
//! Lock order: a transport's lock is the outermost. The serial port and the console have their own
//! locks and call nothing while they hold them.

use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};

use crate::layout;
use crate::legacy::debug_exit;
use crate::legacy::serial::{self, SerialPort};
use crate::memory::GuestRam;
use crate::state::Exit;
use crate::virtio::mmio::MmioTransport;
use crate::virtio::{Interrupt, Progress};

/// A virtio device, shared by the vCPUs, its event thread and the embedding program's calls.
#[derive(Clone, Debug)]
pub(crate) struct SharedTransport(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// The interrupt's registers are served without the lock: a driver accesses them in its
    /// interrupt handler, which must not wait while the device runs.
    interrupt: Interrupt,
    transport: Mutex<MmioTransport>,
}

impl SharedTransport {
    pub(crate) fn new(transport: MmioTransport) -> Self {
        Self(Arc::new(Shared {
            interrupt: transport.interrupt().clone(),
            transport: Mutex::new(transport),
        }))
    }

    /// Locks the transport. A panic under the lock does not poison it: the panic ended the VM.
    pub(crate) fn lock(&self) -> MutexGuard<'_, MmioTransport> {
        self.0.transport.lock()
    }

    /// Runs the device once, for its event thread. Returns the progress and when the device next
    /// wants to run without a notification. The unlock is fair: however often a guest makes its
    /// device run, a vCPU at a register or a host call waits for one run only.
    pub(crate) fn turn(&self) -> (Progress, Option<std::time::Instant>) {
        let mut transport = self.lock();
        let outcome = (transport.run(), transport.deadline());
        MutexGuard::unlock_fair(transport);
        outcome
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        match (
            <&mut [u8; 4]>::try_from(&mut *data),
            self.0.interrupt.read_register(offset),
        ) {
            (Ok(data), Some(value)) => *data = value.to_le_bytes(),
            _ => self.lock().read(offset, data),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let own = <[u8; 4]>::try_from(data).is_ok_and(|data| {
            self.0
                .interrupt
                .write_register(offset, u32::from_le_bytes(data))
        });
        if !own {
            self.lock().write(offset, data);
        }
    }
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct DeviceBus {
    pub(crate) serial: Option<SerialPort>,
    pub(crate) virtio: Vec<SharedTransport>,
    /// Guest memory, on emulated hosts only: there the guest's kernel cannot execute `XSAVE`.
    pub(crate) registers: Option<GuestRam>,
}

impl DeviceBus {
    /// Handles a guest's port write. Returns how the guest ended if the write reports its end.
    pub(crate) fn pio_write(&self, port: u16, data: &[u8]) -> Option<Exit> {
        let value = *data.first()?;
        match port {
            debug_exit::PORT => return debug_exit::reported(value),
            debug_exit::I8042_COMMAND => return debug_exit::i8042(value),
            _ => {}
        }
        if let (Some(offset), Some(serial)) = (serial_offset(port), &self.serial) {
            // A string instruction delivers several bytes to one port.
            for value in data {
                serial.write(offset, *value);
            }
        }
        None
    }

    /// Handles a guest's port read. A port without a device reads as all ones, as on a real bus.
    pub(crate) fn pio_read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        match (port, serial_offset(port), &self.serial) {
            // Keyboard controller: nothing to read, ready for commands.
            (debug_exit::I8042_COMMAND | debug_exit::I8042_DATA, ..) => data.fill(0),
            (_, Some(offset), Some(serial)) => {
                for value in data {
                    *value = serial.read(offset);
                }
            }
            _ => {}
        }
    }

    /// Handles a guest's read from an address that is not RAM.
    pub(crate) fn mmio_read(&self, address: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some((transport, offset)) = self.transport(address) {
            transport.read(offset, data);
        }
    }

    /// Handles a guest's write to an address that is not RAM.
    pub(crate) fn mmio_write(&self, address: u64, data: &[u8]) {
        if let Some((transport, offset)) = self.transport(address) {
            transport.write(offset, data);
        }
    }

    fn transport(&self, address: u64) -> Option<(&SharedTransport, u64)> {
        let offset = address.checked_sub(layout::MMIO_BASE)?;
        let index = usize::try_from(offset / layout::MMIO_SIZE).ok()?;
        Some((self.virtio.get(index)?, offset % layout::MMIO_SIZE))
    }
}

fn serial_offset(port: u16) -> Option<u16> {
    port.checked_sub(serial::BASE)
        .filter(|offset| *offset < serial::PORTS)
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    use super::*;
    use crate::legacy::console::Console;

    fn bus(console: &Console) -> DeviceBus {
        let irq = EventFd::new(EFD_NONBLOCK).unwrap();
        let serial = SerialPort::new(console.clone(), irq);
        DeviceBus {
            serial: Some(serial),
            virtio: Vec::new(),
            registers: None,
        }
    }

    #[test]
    fn every_port_at_every_width_is_answered() {
        let bus = bus(&Console::default());
        for port in 0..=u16::MAX {
            for width in [0, 1, 2, 4, 64] {
                let mut data = vec![0x55; width];
                bus.pio_read(port, &mut data);
                let _ = bus.pio_write(port, &data);
            }
        }
    }

    #[test]
    fn serial_output_reaches_the_console() {
        let console = Console::default();
        let bus = bus(&console);
        bus.pio_write(0x3f8, b"hi");
        bus.pio_write(0x3f8, b"!");
        assert_eq!(console.text(), "hi!");
        let mut status = [0];
        bus.pio_read(0x3fd, &mut status);
        assert_eq!(status[0] & 0x20, 0x20, "transmitter empty");
    }

    #[test]
    fn a_reset_and_a_report_end_the_guest() {
        let bus = bus(&Console::default());
        assert_eq!(bus.pio_write(0x64, &[0xfe]), Some(Exit::Reboot));
        assert_eq!(bus.pio_write(0x5f0, &[1]), Some(Exit::PowerOff));
        assert_eq!(bus.pio_write(0x5f0, &[]), None);
        assert_eq!(bus.pio_write(0x5f0, &[0]), None);
    }

    #[test]
    fn memory_without_a_device_reads_as_zero() {
        let bus = bus(&Console::default());
        for address in [0, layout::MMIO_BASE, u64::MAX] {
            let mut data = [1; 8];
            bus.mmio_read(address, &mut data);
            assert_eq!(data, [0; 8]);
            bus.mmio_write(address, &data);
        }
    }
}
