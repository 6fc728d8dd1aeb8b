//! A request through a virtqueue and back, at a device that does nothing with it: the balloon,
//! whose deflate queue receives pages that the guest took back.

use hearth_vmm::memory::GuestRam;
use hearth_vmm::virtio::balloon::BalloonDevice;
use hearth_vmm::virtio::vsock::testing::Ring;
use hearth_vmm::virtio::{Activation, Doorbell, F_EVENT_IDX, F_VERSION_1, Interrupt, VirtioDevice};

use super::Walk;

const MEMORY_MIB: u32 = 4;
const DEFLATE: usize = 1;
/// Address of the request's buffer.
const REQUEST: u64 = 0x20_0000;

pub(super) fn request() -> Walk {
    let (mut device, _balloon) = BalloonDevice::new(MEMORY_MIB, Doorbell::new().unwrap());
    let ram = GuestRam::new(u64::from(MEMORY_MIB) << 20).unwrap();
    let sizes = device.queue_sizes().to_vec();
    let mut rings: Vec<Ring> = (0..)
        .zip(&sizes)
        .map(|(index, size)| Ring::new(index, *size, true))
        .collect();
    let interrupt = Interrupt::new().unwrap();
    let activation = Activation {
        ram: ram.clone(),
        queues: rings.iter().map(|ring| Some(ring.queue((0, 0)))).collect(),
        features: F_VERSION_1 | F_EVENT_IDX,
        interrupt: interrupt.clone(),
    };
    device.activate(activation).unwrap();
    let mut ring = rings.swap_remove(DEFLATE);
    ring.write_desc(&ram, 0, REQUEST, 4, 0, 0);
    Box::new(move || {
        ring.push(&ram, 0);
        device.run().unwrap();
        assert_eq!(ring.pop(&ram), Some((0, 0)));
        interrupt.acknowledge(u32::MAX);
    })
}
