//! Virtio devices over MMIO (virtio 1.2 section 4.2) and what they share.
//!
//! A device is plain state behind its transport's lock. Guest kicks and host wake-ups both notify
//! the device's one [`Doorbell`]; an event thread then calls [`VirtioDevice::run`], which does a
//! bounded amount of work over all the device's queues. Queues move into the device at `DRIVER_OK`
//! and are dropped at reset, so that nothing can reconfigure them in between.

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

/// A violation of the virtio contract by the driver. The transport sets `DEVICE_NEEDS_RESET`
/// (virtio 1.2 section 2.1.2); the embedding program sees it only in the device's counters.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// A queue's rings or a descriptor chain violate section 2.7.
    #[error("malformed virtqueue: {0}")]
    Queue(#[from] virtio_queue::Error),
    /// A descriptor refers to memory that the guest does not have.
    #[error("descriptor outside guest memory")]
    Memory(#[from] vm_memory::GuestMemoryError),
    /// The available index announced a chain, but then there was none. No correct driver takes a
    /// chain back; this happens when one ring overlaps another.
    #[error("a chain that was available is gone; do rings overlap?")]
    Gone,
    /// The payload of a request violates the device's section.
    #[error("malformed request: {0}")]
    Request(&'static str),
}

/// Counters of the [`Fault`]s of one device, for the embedding program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceFaults {
    /// Device id (virtio 1.2 section 5): 19 vsock, 5 balloon, 27 pmem.
    pub device: u32,
    /// The device serves nothing until the driver resets it.
    pub needs_reset: bool,
    /// Number of faults.
    pub count: u64,
    /// The last fault, as text for a log.
    pub last: Option<String>,
}

/// The work left after a bounded run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Nothing until the next notification.
    Idle,
    /// The budget ran out: run again after other devices had their turn.
    More,
}

/// The resources that a device gets when its driver sets `DRIVER_OK`.
#[derive(Debug)]
pub struct Activation {
    /// Guest memory that descriptors refer to.
    pub ram: GuestRam,
    /// One queue for each entry of [`VirtioDevice::queue_sizes`], validated; `None` where the
    /// driver left a queue unused.
    pub queues: Vec<Option<Queue>>,
    /// Feature bits that both sides accepted.
    pub features: u64,
    /// The interrupt that tells the driver of used buffers or a changed configuration.
    pub interrupt: Interrupt,
}

/// A device's position in a queue: free-running ring indices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct QueuePosition {
    /// Next entry of the available ring.
    pub next_avail: u16,
    /// Next entry of the used ring.
    pub next_used: u16,
}

impl QueuePosition {
    /// Returns the position in `queue`.
    #[must_use]
    pub fn of(queue: &Queue) -> Self {
        Self {
            next_avail: queue.next_avail(),
            next_used: queue.next_used(),
        }
    }
}

/// The saved state of any device.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub enum DeviceState {
    /// A socket device.
    Vsock(vsock::VsockState),
    /// A memory balloon.
    Balloon(balloon::BalloonState),
    /// A read-only pmem image.
    Pmem(pmem::PmemState),
}

/// A virtio device as its transport sees it. All calls are made under the transport's lock.
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

    /// Takes the queues; the device is active from here until [`VirtioDevice::reset`].
    ///
    /// # Errors
    /// A [`Fault`] when the driver left out a queue that the device requires.
    fn activate(&mut self, activation: Activation) -> Result<(), Fault>;

    /// Serves all queues and host-side work, at most a constant amount. Called on an event thread
    /// after a notification or when [`VirtioDevice::deadline`] has passed; also while not active
    /// (then it does host-side work only).
    ///
    /// # Errors
    /// A [`Fault`] when the driver broke the contract; the transport then marks the device
    /// `DEVICE_NEEDS_RESET` and does not call `run` again before a reset.
    fn run(&mut self) -> Result<Progress, Fault>;

    /// The time at which `run` must be called even without a notification (a timeout of the
    /// device).
    fn deadline(&self) -> Option<Instant> {
        None
    }

    /// Drops the queues and all state that the driver set up. The device can be activated again.
    fn reset(&mut self);

    /// The position in each queue, in index order; `None` for an unused one. Empty while not
    /// active.
    fn positions(&self) -> Vec<Option<QueuePosition>>;

    /// Returns the device's own state for a snapshot.
    fn save(&self) -> DeviceState;
}

/// The wake-up of a device: an eventfd that the guest's `QueueNotify` (through an ioeventfd) and
/// the host's handles write, and that an event thread reads.
#[derive(Clone, Debug)]
pub struct Doorbell(Arc<EventFd>);

impl Doorbell {
    /// Creates a doorbell that no event thread listens to yet; notifications are kept until one
    /// does.
    ///
    /// # Errors
    /// The host's error when it has no file descriptors left.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self(Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?)))
    }

    /// Notifies the device. Never blocks; notifications that were not consumed yet merge into one.
    pub fn ring(&self) {
        // The only error of a non-blocking eventfd is a full counter: a notification is pending.
        let _ = self.0.write(1);
    }

    /// Consumes the notifications so far; returns true if there were any.
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
