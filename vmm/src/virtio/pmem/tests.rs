//! Persistent memory against a scripted driver.

use vm_memory::GuestAddress;

use super::*;
use crate::memory::{GAP_END, MIB};
use crate::virtio::vsock::testing::Ring;

const RAM: u64 = 4 * MIB;
const REQUEST: u64 = 2 * MIB;
const RESULT: u64 = 3 * MIB;
const NEXT: u16 = 1;
const WRITE: u16 = 2;

struct Driver {
    device: PmemDevice,
    ram: GuestRam,
    ring: Ring,
    interrupt: Interrupt,
}

impl Driver {
    fn new() -> Self {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(2 * GRANULE).unwrap();
        let image = PmemImage::open(file.path()).unwrap();
        let mut driver = Self {
            device: PmemDevice::new(image, GAP_END),
            ram: GuestRam::new(RAM).unwrap(),
            ring: Ring::new(0, QUEUE_SIZE, true),
            interrupt: Interrupt::new().unwrap(),
        };
        driver.activate((0, 0));
        driver
    }

    fn activate(&mut self, position: (u16, u16)) {
        self.device
            .activate(Activation {
                ram: self.ram.clone(),
                queues: vec![Some(self.ring.queue(position))],
                features: F_VERSION_1 | F_EVENT_IDX,
                interrupt: self.interrupt.clone(),
            })
            .unwrap();
    }

    /// Makes a request of two descriptors available, as Linux sends it.
    fn ask(&mut self, kind: u32) {
        let map = self.ram.map();
        map.write_obj(kind, GuestAddress(REQUEST)).unwrap();
        map.write_obj(0x5555_5555u32, GuestAddress(RESULT)).unwrap();
        self.ring.write_desc(&self.ram, 0, REQUEST, 4, NEXT, 1);
        self.ring.write_desc(&self.ram, 1, RESULT, 4, WRITE, 0);
        self.ring.push(&self.ram, 0);
    }

    fn result(&self) -> u32 {
        self.ram.map().read_obj(GuestAddress(RESULT)).unwrap()
    }
}

#[test]
fn the_configuration_says_where_the_image_lies_at_any_width_and_offset() {
    let driver = Driver::new();
    let mut whole = [0; 16];
    driver.device.read_config(0, &mut whole);
    assert_eq!(whole[..8], GAP_END.to_le_bytes());
    assert_eq!(whole[8..], (2 * GRANULE).to_le_bytes());
    for offset in [0, 1, 3, 15, 16, u64::MAX] {
        for width in [0, 1, 3, 8] {
            let mut data = vec![0x77; width];
            driver.device.read_config(offset, &mut data);
            let at = |i: usize| usize::try_from(offset).unwrap().saturating_add(i);
            let wanted = (0..width).map(|i| whole.get(at(i)).copied().unwrap_or(0));
            assert!(data.iter().copied().eq(wanted), "{width} at {offset}");
        }
    }
}

#[test]
fn a_flush_is_answered_at_once_and_interrupts() {
    let mut driver = Driver::new();
    driver.ask(FLUSH);
    assert_eq!(driver.device.run().unwrap(), Progress::Idle);
    assert_eq!(driver.ring.pop(&driver.ram), Some((0, 4)));
    assert_eq!((driver.result(), driver.interrupt.status() & 1), (DONE, 1));
}

#[test]
fn a_request_of_another_kind_is_refused_by_its_result() {
    for kind in [1, u32::MAX] {
        let mut driver = Driver::new();
        driver.ask(kind);
        driver.device.run().unwrap();
        assert_eq!(driver.ring.pop(&driver.ram), Some((0, 4)));
        assert_eq!(driver.result(), REFUSED);
    }
}

#[test]
fn requests_without_room_for_type_and_result_are_faults() {
    type Descriptor = (u64, u32, u16);
    let bad: [&[Descriptor]; 6] = [
        &[(REQUEST, 4, 0)],
        &[(RESULT, 4, WRITE)],
        &[(REQUEST, 3, NEXT), (RESULT, 4, WRITE)],
        &[(REQUEST, 4, NEXT), (RESULT, 3, WRITE)],
        &[(RAM - 2, 4, NEXT), (RESULT, 4, WRITE)],
        &[(REQUEST, 4, NEXT), (RAM - 2, u32::MAX, WRITE)],
    ];
    for chain in bad {
        let mut driver = Driver::new();
        for (at, (addr, len, flags)) in (0u16..).zip(chain) {
            driver
                .ring
                .write_desc(&driver.ram, at, *addr, *len, *flags, at + 1);
        }
        driver.ring.push(&driver.ram, 0);
        assert!(driver.device.run().is_err(), "{chain:x?}");
    }
}

#[test]
fn a_chain_that_loops_ends() {
    let mut driver = Driver::new();
    driver.ring.write_desc(&driver.ram, 0, REQUEST, 4, NEXT, 0);
    driver.ring.push(&driver.ram, 0);
    assert!(driver.device.run().is_err());
}

#[test]
fn a_flood_of_requests_is_served_in_turns() {
    let mut driver = Driver::new();
    for _ in 0..QUEUE_SIZE {
        driver.ask(FLUSH);
    }
    assert_eq!(driver.device.run().unwrap(), Progress::More);
    assert_eq!(driver.device.run().unwrap(), Progress::Idle);
    let answered = std::iter::from_fn(|| driver.ring.pop(&driver.ram)).count();
    assert_eq!(answered, usize::from(QUEUE_SIZE));
}

#[test]
fn a_device_without_its_queue_is_a_fault_and_a_reset_one_is_idle() {
    let mut driver = Driver::new();
    driver.device.reset();
    driver.ask(FLUSH);
    assert_eq!(driver.device.run().unwrap(), Progress::Idle);
    assert!(driver.device.positions().is_empty());
    let without = Activation {
        ram: driver.ram.clone(),
        queues: vec![None],
        features: F_VERSION_1,
        interrupt: driver.interrupt.clone(),
    };
    assert!(matches!(
        driver.device.activate(without),
        Err(Fault::Request(_))
    ));
}

#[test]
fn a_saved_device_keeps_its_place_its_mapping_and_its_queue() {
    let mut driver = Driver::new();
    driver.ask(FLUSH);
    driver.device.run().unwrap();
    driver.ring.pop(&driver.ram);
    let DeviceState::Pmem(state) = driver.device.save() else {
        panic!("another device")
    };
    let position = driver.device.positions()[0].unwrap();
    assert_eq!((state.address, state.bytes), (GAP_END, 2 * GRANULE));
    driver.device = PmemDevice::new(state.image.unwrap(), state.address);
    driver.activate((position.next_avail, position.next_used));
    driver.ask(FLUSH);
    driver.device.run().unwrap();
    assert_eq!(driver.result(), DONE);
    assert_eq!(driver.ring.pop(&driver.ram), Some((0, 4)));
}
