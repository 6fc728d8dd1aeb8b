//! The balloon against a scripted driver: obedient, slow, and hostile.

use std::time::Duration;

use super::discards::MAX_PFNS;
use super::*;
use crate::virtio::vsock::testing::Ring;

const RAM: u64 = 64 * MIB;
const BUFFER: u64 = 8 * MIB;
const WRITE: u16 = 2;
const EVENT_IDX: bool = true;

/// A guest's balloon driver with all four queues.
struct Driver {
    device: BalloonDevice,
    balloon: Balloon,
    ram: GuestRam,
    interrupt: Interrupt,
    rings: Vec<Ring>,
    /// Whether the device wanted a kick for the last chain made available.
    kicked: bool,
}

const INFLATE: usize = 0;
const STATS: usize = 2;
const REPORTING: usize = 3;

impl Driver {
    fn new() -> Self {
        Self::with(F_VERSION_1 | F_EVENT_IDX | F_STATS_VQ | F_DEFLATE_ON_OOM | F_REPORTING)
    }

    fn with(features: u64) -> Self {
        let ram = GuestRam::new(RAM).unwrap();
        let interrupt = Interrupt::new().unwrap();
        let (mut device, balloon) = BalloonDevice::new(64, Doorbell::new().unwrap());
        let rings: Vec<Ring> = (0..4)
            .map(|i| Ring::new(i, QUEUE_SIZE, EVENT_IDX))
            .collect();
        device
            .activate(Activation {
                ram: ram.clone(),
                queues: rings.iter().map(|ring| Some(ring.queue((0, 0)))).collect(),
                features,
                interrupt: interrupt.clone(),
            })
            .unwrap();
        Self {
            device,
            balloon,
            ram,
            interrupt,
            rings,
            kicked: false,
        }
    }

    /// Makes one descriptor with `bytes` available on a queue.
    fn give(&mut self, queue: usize, bytes: &[u8]) {
        self.ram
            .map()
            .write_slice(bytes, vm_memory::GuestAddress(BUFFER))
            .unwrap();
        self.give_at(queue, BUFFER, bytes.len() as u32, 0);
    }

    fn give_at(&mut self, queue: usize, addr: u64, len: u32, flags: u16) {
        self.rings[queue].write_desc(&self.ram, 0, addr, len, flags, 0);
        self.kicked = self.rings[queue].push(&self.ram, 0);
    }

    fn inflate(&mut self, pfns: &[u32]) {
        let bytes: Vec<u8> = pfns.iter().flat_map(|pfn| pfn.to_le_bytes()).collect();
        self.give(INFLATE, &bytes);
    }

    fn byte(&self, addr: u64) -> u8 {
        self.ram
            .map()
            .read_obj(vm_memory::GuestAddress(addr))
            .unwrap()
    }

    fn dirty(&self, page: u64) {
        self.ram
            .map()
            .write_obj(0xAAu8, vm_memory::GuestAddress(page * PAGE_SIZE))
            .unwrap();
    }

    fn num_pages(&self) -> u32 {
        let mut bytes = [0; 4];
        self.device.read_config(0, &mut bytes);
        u32::from_le_bytes(bytes)
    }
}

#[test]
fn inflated_pages_leave_the_host_whatever_their_order() {
    let mut driver = Driver::new();
    for page in 4096..4104 {
        driver.dirty(page);
    }
    driver.inflate(&[4099, 4098, 4097, 4102, 4103, 4100]);
    assert!(driver.kicked);
    assert_eq!(driver.device.run().unwrap(), Progress::Idle);
    let left: Vec<u64> = (4096..4104)
        .filter(|p| driver.byte(p * PAGE_SIZE) != 0)
        .collect();
    assert_eq!(left, [4096, 4101]);
    assert!(driver.rings[INFLATE].pop(&driver.ram).is_some());
    assert_eq!(driver.interrupt.status() & 1, 1);
}

#[test]
fn page_numbers_outside_memory_are_ignored() {
    let mut driver = Driver::new();
    driver.dirty(4096);
    driver.inflate(&[
        u32::MAX,
        (RAM / PAGE_SIZE) as u32,
        4096,
        u32::MAX - 1,
        0x000c_0000,
    ]);
    driver.device.run().unwrap();
    assert_eq!(driver.byte(4096 * PAGE_SIZE), 0);
}

#[test]
fn a_chain_with_more_page_numbers_than_any_driver_sends_is_a_fault() {
    let mut driver = Driver::new();
    driver.give_at(INFLATE, BUFFER, (MAX_PFNS as u32 + 1) * 4, 0);
    assert!(matches!(driver.device.run(), Err(Fault::Request(_))));
    let mut driver = Driver::new();
    driver.give_at(INFLATE, BUFFER, u32::MAX, 0);
    assert!(driver.device.run().is_err(), "a 4 GiB descriptor");
    let mut driver = Driver::new();
    driver.give_at(INFLATE, RAM - 4, 8, 0);
    assert!(
        driver.device.run().is_err(),
        "a descriptor across the end of memory"
    );
}

#[test]
fn a_target_beyond_the_guests_memory_is_refused() {
    let driver = Driver::new();
    assert_eq!(driver.balloon.set_target(48), Ok(()));
    for mib in [49, 64, 65, u32::MAX] {
        assert_eq!(
            driver.balloon.set_target(mib),
            Err(BalloonError::TooLarge {
                asked: mib,
                memory: 64
            })
        );
    }
    assert_eq!(driver.balloon.target(), 48);
}

#[tokio::test]
async fn a_guest_that_obeys_at_once_is_seen_at_once() {
    let mut driver = Driver::new();
    let balloon = driver.balloon.clone();
    let resize = tokio::spawn(async move { balloon.resize(4, Duration::from_secs(30)).await });
    tokio::task::yield_now().await;
    driver.device.run().unwrap();
    assert_eq!(driver.num_pages(), 4 * PAGES_PER_MIB);
    assert_eq!(driver.interrupt.status() & 2, 2, "the driver is told");
    driver
        .device
        .write_config(4, &(4 * PAGES_PER_MIB).to_le_bytes());
    let done = tokio::time::timeout(Duration::from_secs(5), resize).await;
    assert_eq!(done.unwrap().unwrap(), Ok(()));
}

#[tokio::test(start_paused = true)]
async fn a_missed_deadline_keeps_what_was_reached_and_says_so() {
    let mut driver = Driver::new();
    driver
        .device
        .write_config(4, &(2 * PAGES_PER_MIB).to_le_bytes());
    let missed = driver.balloon.resize(8, Duration::from_secs(5)).await;
    assert_eq!(
        missed,
        Err(BalloonError::Deadline {
            asked: 8,
            actual: 2
        })
    );
    driver.device.run().unwrap();
    assert_eq!(
        (driver.balloon.target(), driver.num_pages()),
        (2, 2 * PAGES_PER_MIB)
    );
}

#[tokio::test(start_paused = true)]
async fn statistics_of_a_silent_guest_time_out() {
    let driver = Driver::new();
    let answer = driver.balloon.stats(Duration::from_secs(5)).await;
    assert_eq!(answer, Err(BalloonError::NoAnswer));
}

fn stat(tag: u16, value: u64) -> Vec<u8> {
    [tag.to_le_bytes().as_slice(), &value.to_le_bytes()].concat()
}

#[tokio::test]
async fn statistics_skip_unknown_tags_and_odd_tails() {
    let mut driver = Driver::new();
    driver.give(STATS, &stat(4, 1));
    driver.device.run().unwrap();
    let balloon = driver.balloon.clone();
    let asked = tokio::spawn(async move { balloon.stats(Duration::from_secs(30)).await });
    tokio::task::yield_now().await;
    driver.device.run().unwrap();
    assert!(
        driver.rings[STATS].pop(&driver.ram).is_some(),
        "the buffer goes back to be filled"
    );
    let report = [
        stat(4, 7),
        stat(999, 1),
        stat(6, 9),
        stat(u16::MAX, 3),
        vec![1, 2, 3],
    ]
    .concat();
    driver.give(STATS, &report);
    assert!(driver.kicked, "the device asked for a kick");
    driver.device.run().unwrap();
    let stats = asked.await.unwrap().unwrap();
    assert_eq!(
        (stats.free, stats.available, stats.total),
        (Some(7), Some(9), None)
    );
}

#[test]
fn a_statistics_descriptor_of_any_length_is_read_only_to_a_bound() {
    let mut driver = Driver::new();
    driver.give_at(STATS, BUFFER, (RAM - BUFFER) as u32, 0);
    driver.device.run().unwrap();
    let mut driver = Driver::new();
    driver.give(STATS, &stat(4, 1));
    driver.device.run().unwrap();
    driver.give(STATS, &stat(4, 1));
    assert!(
        driver.device.run().is_err(),
        "only one statistics buffer may be out"
    );
}

#[test]
fn reported_free_pages_leave_the_host_and_ranges_outside_memory_do_not_matter() {
    let mut driver = Driver::new();
    driver.dirty(5000);
    driver.give_at(REPORTING, 5000 * PAGE_SIZE, MIB as u32, WRITE);
    driver.device.run().unwrap();
    assert_eq!(
        (driver.byte(5000 * PAGE_SIZE), driver.balloon.reported()),
        (0, 1)
    );
    driver.rings[REPORTING].pop(&driver.ram);
    driver.give_at(REPORTING, RAM - PAGE_SIZE, 2 * PAGE_SIZE as u32, WRITE);
    // Either the walk of the chain or the range check refuses it: nothing is released.
    let _ = driver.device.run();
    assert_eq!(driver.balloon.reported(), 1);
}

#[test]
fn queues_of_features_that_were_not_taken_have_no_number() {
    let mut driver = Driver::with(F_VERSION_1 | F_EVENT_IDX | F_REPORTING);
    driver.dirty(5000);
    // Without statistics, reporting has queue index 2.
    driver.give_at(STATS, 5000 * PAGE_SIZE, PAGE_SIZE as u32, WRITE);
    driver.device.run().unwrap();
    assert_eq!(driver.byte(5000 * PAGE_SIZE), 0);
}

#[test]
fn a_guest_that_lies_about_its_balloon_deceives_only_itself() {
    let mut driver = Driver::new();
    for (offset, width) in [
        (0u64, 4usize),
        (4, 1),
        (4, 8),
        (5, 4),
        (u64::MAX, 4),
        (1 << 40, 2),
    ] {
        driver.device.write_config(offset, &vec![0xff; width]);
        let mut back = vec![0; width];
        driver.device.read_config(offset, &mut back);
    }
    assert_eq!((driver.num_pages(), driver.balloon.actual()), (0, 0));
    driver.device.write_config(4, &[0xff; 4]);
    assert_eq!(driver.balloon.actual(), u32::MAX / PAGES_PER_MIB);
    driver.device.reset();
    assert_eq!(driver.balloon.actual(), 0);
}

#[test]
fn a_flood_of_chains_is_served_in_turns() {
    let mut driver = Driver::new();
    for _ in 0..QUEUE_SIZE {
        driver.inflate(&[]);
    }
    assert_eq!(driver.device.run().unwrap(), Progress::More);
    assert_eq!(driver.device.run().unwrap(), Progress::More);
    assert_eq!(driver.device.run().unwrap(), Progress::Idle);
}

#[tokio::test]
async fn a_restored_balloon_goes_on_where_it_was() {
    let mut driver = Driver::new();
    driver.balloon.set_target(8).unwrap();
    driver.device.run().unwrap();
    driver
        .device
        .write_config(4, &(8 * PAGES_PER_MIB).to_le_bytes());
    driver.give(STATS, &stat(4, 1));
    driver.device.run().unwrap();
    let DeviceState::Balloon(state) = driver.device.save() else {
        panic!("another device")
    };
    let positions = driver.device.positions();
    assert_eq!(positions.len(), 4);
    let (mut device, balloon) = BalloonDevice::restore(&state, 64, Doorbell::new().unwrap());
    let queue = |(ring, position): (&Ring, &Option<QueuePosition>)| {
        position.map(|p| ring.queue((p.next_avail, p.next_used)))
    };
    device
        .activate(Activation {
            ram: driver.ram.clone(),
            queues: driver.rings.iter().zip(&positions).map(queue).collect(),
            features: F_VERSION_1 | F_EVENT_IDX | F_STATS_VQ | F_DEFLATE_ON_OOM | F_REPORTING,
            interrupt: driver.interrupt.clone(),
        })
        .unwrap();
    assert_eq!((balloon.target(), balloon.actual()), (8, 8));
    let asked = tokio::spawn(async move { balloon.stats(Duration::from_secs(30)).await });
    tokio::task::yield_now().await;
    device.run().unwrap();
    assert!(
        driver.rings[STATS].pop(&driver.ram).is_some(),
        "the held buffer survived"
    );
    asked.abort();
}

/// A snapshot between two turns of one chain: the VM finishes the chain, its clone does it again
/// from the start, and each returns it once.
#[test]
fn a_chain_that_is_half_done_at_a_snapshot_is_done_once_in_each_of_the_two() {
    const PAGES: u64 = 40 * MIB / PAGE_SIZE;
    const FIRST: u64 = 16 * MIB / PAGE_SIZE;
    let mut driver = Driver::new();
    for page in (FIRST..FIRST + PAGES).step_by(256) {
        driver.dirty(page);
    }
    driver.give_at(
        REPORTING,
        FIRST * PAGE_SIZE,
        (PAGES * PAGE_SIZE) as u32,
        WRITE,
    );
    let left = |driver: &Driver| {
        let pages = (FIRST..FIRST + PAGES).step_by(256);
        pages
            .filter(|page| driver.byte(page * PAGE_SIZE) != 0)
            .count()
    };
    assert_eq!(driver.device.run().unwrap(), Progress::More);
    assert_eq!(left(&driver), 24);
    assert_eq!(driver.rings[REPORTING].pop(&driver.ram), None);
    let DeviceState::Balloon(state) = driver.device.save() else {
        panic!("another device")
    };
    let positions = driver.device.positions();
    // The VM itself continues beside its clone.
    let mut clone = Driver::new();
    let mut memory = vec![0; RAM as usize];
    let start = vm_memory::GuestAddress(0);
    driver.ram.map().read_slice(&mut memory, start).unwrap();
    clone.ram.map().write_slice(&memory, start).unwrap();
    clone.rings = driver.rings.clone();
    let (device, balloon) = BalloonDevice::restore(&state, 64, Doorbell::new().unwrap());
    (clone.device, clone.balloon) = (device, balloon);
    let queues = clone.rings.iter().zip(&positions);
    let queues = queues.map(|(ring, at)| at.map(|p| ring.queue((p.next_avail, p.next_used))));
    let activation = Activation {
        ram: clone.ram.clone(),
        queues: queues.collect(),
        features: F_VERSION_1 | F_EVENT_IDX | F_STATS_VQ | F_DEFLATE_ON_OOM | F_REPORTING,
        interrupt: clone.interrupt.clone(),
    };
    clone.device.activate(activation).unwrap();
    for driver in [&mut driver, &mut clone] {
        while driver.device.run().unwrap() == Progress::More {}
        assert_eq!(left(driver), 0);
        assert_eq!(driver.rings[REPORTING].pop(&driver.ram), Some((0, 0)));
        assert_eq!(driver.rings[REPORTING].pop(&driver.ram), None);
        assert_eq!(driver.balloon.reported(), 40);
    }
}
