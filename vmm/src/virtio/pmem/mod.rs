//! Persistent memory (virtio 1.2 section 5.19): a read-only image file in the guest's address
//! space.
//!
//! The guest reads the file's pages in place, through a read-only KVM memory slot. A write by the
//! guest exits as an access to a device that does not exist, and is ignored, like a write to ROM.
//! Nothing is ever dirty, so a flush request is answered at once.
//!
//! A process on the host that can write to the file can change what running guests read. If the
//! file is truncated while a guest runs, the guest ends when it touches the missing part; nothing
//! else is affected.

mod image;

use virtio_queue::Queue;
use vm_memory::Bytes;

pub use self::image::{GRANULE, PmemError};
pub(crate) use self::image::{PmemFile, PmemImage, place};
use super::serve::{Budget, Chain, TURN_CHAINS, descriptors, serve};
use super::{
    Activation, DeviceState, F_EVENT_IDX, F_VERSION_1, Fault, Interrupt, Progress, QueuePosition,
    VirtioDevice,
};
use crate::memory::GuestRam;

/// Most images of one VM: each takes an interrupt line of the guest.
pub const MAX_IMAGES: usize = 8;
/// Device id (virtio 1.2 section 5.19.1).
const DEVICE_TYPE: u32 = 27;
const QUEUE_SIZE: u16 = 64;
/// Bytes of a request: its type and its result.
const REQUEST_BYTES: u64 = 8;
/// VIRTIO_PMEM_REQ_TYPE_FLUSH (section 5.19.6).
const FLUSH: u32 = 0;
/// Results of a request (section 5.19.7): success and failure.
const DONE: u32 = 0;
const REFUSED: u32 = u32::MAX;

struct Active {
    ram: GuestRam,
    interrupt: Interrupt,
    requests: Queue,
}

/// The pmem device.
pub(crate) struct PmemDevice {
    image: PmemImage,
    address: u64,
    active: Option<Active>,
}

/// The saved state of a pmem device: its guest address and, inside this process, its mapping.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct PmemState {
    /// Guest address.
    pub(crate) address: u64,
    /// Size in bytes.
    pub(crate) bytes: u64,
    /// `None` in a state from outside this process: a path in it would let its author read files.
    #[serde(skip)]
    pub(crate) image: Option<PmemImage>,
}

impl PmemDevice {
    /// Creates a device that shows `image` at guest address `address`.
    pub(crate) fn new(image: PmemImage, address: u64) -> Self {
        Self {
            image,
            address,
            active: None,
        }
    }
}

impl VirtioDevice for PmemDevice {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        F_VERSION_1 | F_EVENT_IDX
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // struct virtio_pmem_config: start, size (section 5.19.4).
        let mut config = [0u8; 16];
        let (start, size) = config.split_at_mut(8);
        start.copy_from_slice(&self.address.to_le_bytes());
        size.copy_from_slice(&self.image.bytes().to_le_bytes());
        for (i, byte) in (0u64..).zip(data) {
            let at = usize::try_from(offset.saturating_add(i)).unwrap_or(usize::MAX);
            *byte = config.get(at).copied().unwrap_or(0);
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), Fault> {
        let mut queues = activation.queues.into_iter();
        let requests = queues.next().flatten();
        self.active = Some(Active {
            ram: activation.ram,
            interrupt: activation.interrupt,
            requests: requests.ok_or(Fault::Request("pmem without a request queue"))?,
        });
        Ok(())
    }

    fn run(&mut self) -> Result<Progress, Fault> {
        let Some(active) = &mut self.active else {
            return Ok(Progress::Idle);
        };
        let Active {
            ram,
            interrupt,
            requests,
        } = active;
        let mut budget = Budget::of_turn(u64::from(TURN_CHAINS) * REQUEST_BYTES);
        serve(requests, ram, interrupt, &mut budget, |chain, budget| {
            budget.spend_bytes(REQUEST_BYTES);
            answer(ram, chain).map(Some)
        })?;
        Ok(budget.progress())
    }

    fn reset(&mut self) {
        self.active = None;
    }

    fn positions(&self) -> Vec<Option<QueuePosition>> {
        let queues = self.active.iter().map(|active| &active.requests);
        queues.map(|queue| Some(QueuePosition::of(queue))).collect()
    }

    fn save(&self) -> DeviceState {
        DeviceState::Pmem(PmemState {
            address: self.address,
            bytes: self.image.bytes(),
            image: Some(self.image.clone()),
        })
    }
}

/// Answers a request: a type to read and a result to write, of 4 bytes each (sections 5.19.6 and
/// 5.19.7).
fn answer(ram: &GuestRam, chain: Chain<'_>) -> Result<u32, Fault> {
    let short = Fault::Request("a pmem request without its 4 bytes each way");
    let mut kind = None;
    let mut result = None;
    for descriptor in descriptors(chain) {
        if descriptor.len() < 4 {
            continue;
        }
        if descriptor.is_write_only() {
            result.get_or_insert(descriptor.addr());
        } else if kind.is_none() {
            kind = Some(u32::from_le(ram.map().read_obj(descriptor.addr())?));
        }
    }
    let (Some(kind), Some(result)) = (kind, result) else {
        return Err(short);
    };
    let verdict = if kind == FLUSH { DONE } else { REFUSED };
    ram.map().write_obj(verdict.to_le(), result)?;
    Ok(4)
}

#[cfg(test)]
mod tests;
