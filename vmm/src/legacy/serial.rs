//! COM1: a 16550A whose output goes to the [`Console`].

use std::sync::{Mutex, MutexGuard};

use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial, SerialState};
use vmm_sys_util::eventfd::EventFd;

use super::console::Console;

/// First of the eight ports of COM1.
pub(crate) const BASE: u16 = 0x3f8;
/// Ports of a 16550A.
pub(crate) const PORTS: u16 = 8;

struct Line(EventFd);

impl Trigger for Line {
    type E = std::io::Error;

    fn trigger(&self) -> std::io::Result<()> {
        // A full counter means that the interrupt is pending already.
        let _ = self.0.write(1);
        Ok(())
    }
}

/// The serial port.
pub(crate) struct SerialPort(Mutex<Serial<Line, NoEvents, Console>>);

impl std::fmt::Debug for SerialPort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SerialPort")
    }
}

impl SerialPort {
    /// Creates a port that raises its interrupt through the eventfd `irq`.
    pub(crate) fn new(console: Console, irq: EventFd) -> Self {
        Self(Mutex::new(Serial::new(Line(irq), console)))
    }

    /// Returns the registers, for a snapshot.
    pub(crate) fn save(&self) -> SerialState {
        self.lock().state()
    }

    /// Restores a port from `state`. It goes on once [`begin`](Self::begin) is called.
    pub(crate) fn restore(
        state: &SerialState,
        console: Console,
        irq: EventFd,
    ) -> std::io::Result<Self> {
        let port = Serial::from_state(state, Line(irq), NoEvents, console)
            .map_err(|_| std::io::Error::from(std::io::ErrorKind::InvalidData))?;
        Ok(Self(Mutex::new(port)))
    }

    /// Raises the interrupt: one raised shortly before the capture may not have reached the
    /// interrupt controllers.
    pub(crate) fn begin(&self) {
        // `Line::trigger` never fails.
        let _ = self.lock().interrupt_evt().trigger();
    }

    fn lock(&self) -> MutexGuard<'_, Serial<Line, NoEvents, Console>> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub(crate) fn read(&self, offset: u16) -> u8 {
        self.lock().read(offset as u8)
    }

    pub(crate) fn write(&self, offset: u16, value: u8) {
        // Never fails: the console takes every byte, and `Line::trigger` always succeeds.
        let _ = self.lock().write(offset as u8, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK};

    /// Registers of a 16550A: transmit data, interrupt enable, interrupt identification.
    const DATA: u16 = 0;
    const WANTED: u16 = 1;
    const DUE: u16 = 2;
    /// Transmitter empty, in both interrupt registers.
    const EMPTY: u8 = 2;

    fn line() -> (EventFd, EventFd) {
        let irq = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).unwrap();
        (irq.try_clone().unwrap(), irq)
    }

    /// FC#5764: the driver waited for an interrupt that had not reached the controllers before the
    /// snapshot.
    #[test]
    fn an_interrupt_that_was_under_way_is_raised_again_in_a_clone() {
        let (irq, seen) = line();
        let port = SerialPort::new(Console::default(), irq);
        port.write(WANTED, EMPTY);
        port.write(DATA, b'a');
        assert!(seen.read().is_ok());
        let state = port.save();

        let (irq, seen) = line();
        let console = Console::default();
        let clone = SerialPort::restore(&state, console.clone(), irq).unwrap();
        // Discards the interrupts raised so far, as restoring the controllers' state does.
        let _ = seen.read();
        clone.begin();
        assert_eq!(seen.read().unwrap(), 1);
        // The driver reads the interrupt's cause, and goes on.
        assert_eq!(clone.read(DUE) & 0xf, EMPTY);
        clone.write(DATA, b'b');
        assert!(seen.read().is_ok());
        assert_eq!(console.text(), "b");
    }
}
