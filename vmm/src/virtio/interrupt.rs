//! A virtio-mmio device's interrupt line and its `InterruptStatus` register
//! (virtio 1.2 section 4.2.2).

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::mmio::register;

/// `InterruptStatus` bit 0: the device used a buffer.
pub const USED_BUFFER: u32 = 1;
/// `InterruptStatus` bit 1: the configuration changed.
pub const CONFIG_CHANGE: u32 = 2;

/// Raises a device's interrupt. Cheap to clone; never blocks.
#[derive(Clone, Debug)]
pub struct Interrupt(Arc<Line>);

#[derive(Debug)]
struct Line {
    fd: EventFd,
    status: AtomicU32,
    generation: AtomicU32,
}

impl Interrupt {
    /// Creates an interrupt line that is not registered with KVM yet (see [`Interrupt::fd`]).
    ///
    /// # Errors
    /// The host's error when it has no file descriptors left.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self(Arc::new(Line {
            fd: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            status: AtomicU32::new(0),
            generation: AtomicU32::new(0),
        })))
    }

    /// Tells the driver that the device used a buffer. The caller must first ask the queue whether
    /// the driver wants to know (`needs_notification`).
    pub fn used(&self) {
        self.raise(USED_BUFFER);
    }

    /// Tells the driver that the device's configuration changed.
    pub fn config_changed(&self) {
        self.0.generation.fetch_add(1, Ordering::SeqCst);
        self.raise(CONFIG_CHANGE);
    }

    fn raise(&self, bit: u32) {
        self.0.status.fetch_or(bit, Ordering::SeqCst);
        // The write fails only if the counter is full: the interrupt is pending already.
        let _ = self.0.fd.write(1);
    }

    /// The `InterruptStatus` register.
    #[must_use]
    pub fn status(&self) -> u32 {
        self.0.status.load(Ordering::SeqCst)
    }

    /// Sets the register to the value saved in a snapshot.
    pub(crate) fn restore(&self, status: u32) {
        let status = status & (USED_BUFFER | CONFIG_CHANGE);
        self.0.status.store(status, Ordering::SeqCst);
    }

    /// Raises the line again if the driver has not acknowledged every bit. A host kernel thread
    /// passes interrupts from an irqfd to the interrupt controllers, so one that was raised shortly
    /// before a capture may be missing in their saved state. A driver that waits for that
    /// interrupt, with no other to come, would wait for ever. A driver that did see it takes the
    /// second one for spurious.
    pub(crate) fn repeat(&self) {
        match self.status() {
            0 => {}
            status => self.raise(status),
        }
    }

    /// Clears the bits that the driver wrote to `InterruptACK`.
    pub fn acknowledge(&self, bits: u32) {
        self.0.status.fetch_and(!bits, Ordering::SeqCst);
    }

    /// The `ConfigGeneration` register; changes with every change of the configuration.
    #[must_use]
    pub fn generation(&self) -> u32 {
        self.0.generation.load(Ordering::SeqCst)
    }

    /// Returns the value of the register at `offset` if it belongs to the interrupt line.
    pub(crate) fn read_register(&self, offset: u64) -> Option<u32> {
        match offset {
            register::INTERRUPT_STATUS => Some(self.status()),
            register::CONFIG_GENERATION => Some(self.generation()),
            _ => None,
        }
    }

    /// Handles a write to the register at `offset`; returns false if it does not belong to the
    /// interrupt line.
    pub(crate) fn write_register(&self, offset: u64, value: u32) -> bool {
        let own = offset == register::INTERRUPT_ACK;
        if own {
            self.acknowledge(value);
        }
        own
    }

    /// The eventfd that KVM turns into an interrupt (irqfd); tests read it to see what was raised.
    #[must_use]
    pub fn fd(&self) -> &EventFd {
        &self.0.fd
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_driver_had_not_acknowledged_is_raised_again_after_a_restore() {
        let line = Interrupt::new().unwrap();
        line.restore(0);
        line.repeat();
        assert!(line.fd().read().is_err(), "nothing to raise");
        line.restore(USED_BUFFER | 0xf0);
        assert!(line.fd().read().is_err(), "not before it is told to");
        line.repeat();
        assert_eq!(line.status(), USED_BUFFER);
        assert_eq!(line.fd().read().unwrap(), 1);
    }
}
