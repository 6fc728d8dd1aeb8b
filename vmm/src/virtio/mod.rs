//! Virtio devices over MMIO (virtio 1.2 section 4.2) and what they share.
//!
//! A device is plain state behind its transport's lock. Guest kicks and host wake-ups both ring the
//! device's one [`Doorbell`]; an event thread answers by calling [`VirtioDevice::run`], which does
//! a bounded amount of work over all the device's queues. Queues move into the device when the
//! driver says `DRIVER_OK` and are dropped at reset, so that nothing can reconfigure them in
//! between.

pub mod balloon;
#[cfg(test)]
mod hostile;
pub mod interrupt;
pub mod mmio;
pub mod pmem;
mod serve;
pub mod vsock;

use std::sync::Arc;
use std::time::Instant;

use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

pub use self::interrupt::Interrupt;
use crate::memory::GuestRam;

/// VIRTIO_F_VERSION_1 (virtio 1.2 section 6): the device is not a legacy device.
pub const F_VERSION_1: u64 = 1 << 32;
/// VIRTIO_F_RING_EVENT_IDX (virtio 1.2 section 6).
pub const F_EVENT_IDX: u64 = 1 << 29;

/// The driver broke the virtio contract. The transport answers with `DEVICE_NEEDS_RESET`
/// (virtio 1.2 section 2.1.2); the host program sees it in the device's counters only.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// A queue's rings or a descriptor chain are not what section 2.7 allows.
    #[error("malformed virtqueue: {0}")]
    Queue(#[from] virtio_queue::Error),
    /// A descriptor names memory that the guest does not have.
    #[error("descriptor outside guest memory")]
    Memory(#[from] vm_memory::GuestMemoryError),
    /// The available index said that there is a chain, and then that there is none. No driver takes
    /// one back; a ring that lies over another ring does.
    #[error("a chain that was available is gone; do rings overlap?")]
    Gone,
    /// The payload of a request is not what the device's section allows.
    #[error("malformed request: {0}")]
    Request(&'static str),
}

/// How a guest's driver treated one device: what a host program sees of [`Fault`]s.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceFaults {
    /// Device id (virtio 1.2 section 5): 19 vsock, 5 balloon, 27 image.
    pub device: u32,
    /// The device serves nothing before the driver resets it.
    pub needs_reset: bool,
    /// How often the driver broke the contract.
    pub count: u64,
    /// How it did so last, in words for a log.
    pub last: Option<String>,
}

/// What is left to do after a bounded run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Nothing until the bell rings again.
    Idle,
    /// The budget ran out first: run again after other devices had their turn.
    More,
}

/// What a device is given when its driver says `DRIVER_OK`.
#[derive(Debug)]
pub struct Activation {
    /// Guest memory that descriptors refer to.
    pub ram: GuestRam,
    /// One queue for each entry of [`VirtioDevice::queue_sizes`], validated; `None` where the
    /// driver left a queue unused.
    pub queues: Vec<Option<Queue>>,
    /// Feature bits that both sides accepted.
    pub features: u64,
    /// How to tell the driver that buffers were used or the configuration changed.
    pub interrupt: Interrupt,
}

/// How far a device has come in a queue: ring indices, free running.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct QueuePosition {
    /// Next entry of the available ring.
    pub next_avail: u16,
    /// Next entry of the used ring.
    pub next_used: u16,
}

impl QueuePosition {
    /// The position in `queue`.
    #[must_use]
    pub fn of(queue: &Queue) -> Self {
        Self {
            next_avail: queue.next_avail(),
            next_used: queue.next_used(),
        }
    }
}

/// The state of any device, as a snapshot keeps it.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub enum DeviceState {
    /// A socket device.
    Vsock(vsock::VsockState),
    /// A memory balloon.
    Balloon(balloon::BalloonState),
    /// A read-only image.
    Pmem(pmem::PmemState),
}

/// A virtio device as its transport sees it. All calls come under the transport's lock.
pub trait VirtioDevice: Send {
    /// Device id (virtio 1.2 section 5).
    fn device_type(&self) -> u32;

    /// Offered feature bits, [`F_VERSION_1`] and [`F_EVENT_IDX`] included.
    fn features(&self) -> u64;

    /// Largest size of each queue, in index order; powers of two, at most 32768.
    fn queue_sizes(&self) -> &[u16];

    /// Reads device configuration space. `offset` and `data.len()` come from the guest and may lie
    /// outside the space: bytes that do not exist read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes device configuration space; bytes that do not exist or are read-only are ignored.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// Takes the queues; the device is live from here until [`VirtioDevice::reset`].
    ///
    /// # Errors
    /// A [`Fault`] when the driver left out a queue that the device cannot do without.
    fn activate(&mut self, activation: Activation) -> Result<(), Fault>;

    /// Serves all queues and host-side work, at most a constant amount. Called on an event thread
    /// after the bell rang or [`VirtioDevice::deadline`] passed; also while not active (then only
    /// host-side work is looked at).
    ///
    /// # Errors
    /// A [`Fault`] when the driver broke the contract; the transport then marks the device
    /// `DEVICE_NEEDS_RESET` and does not call `run` again before a reset.
    fn run(&mut self) -> Result<Progress, Fault>;

    /// When `run` wants to be called although no bell rings (a timeout of the device's own).
    fn deadline(&self) -> Option<Instant> {
        None
    }

    /// Drops the queues and all state that the driver made. The device can be activated again.
    fn reset(&mut self);

    /// How far each queue has come, in index order; `None` for an unused one. Empty while not
    /// active.
    fn positions(&self) -> Vec<Option<QueuePosition>>;

    /// What a snapshot keeps of the device itself.
    fn save(&self) -> DeviceState;
}

/// The one wake-up of a device: an eventfd that the guest's `QueueNotify` (through an ioeventfd)
/// and the host's handles ring, and that an event thread answers.
#[derive(Clone, Debug)]
pub struct Doorbell(Arc<EventFd>);

impl Doorbell {
    /// A bell that nobody listens to yet; rings are remembered.
    ///
    /// # Errors
    /// The host's error when it has no file descriptors left.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self(Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?)))
    }

    /// Wakes the device. Never blocks; rings that nobody answered yet fold into one.
    pub fn ring(&self) {
        // The only error of a non-blocking eventfd is a full counter: it is ringing already.
        let _ = self.0.write(1);
    }

    /// Takes the rings so far; true if there were any.
    #[must_use]
    pub fn answer(&self) -> bool {
        self.0.read().is_ok()
    }

    pub(crate) fn downgrade(&self) -> std::sync::Weak<EventFd> {
        Arc::downgrade(&self.0)
    }

    /// The eventfd, for KVM and the event threads.
    #[must_use]
    pub fn fd(&self) -> &EventFd {
        &self.0
    }
}
