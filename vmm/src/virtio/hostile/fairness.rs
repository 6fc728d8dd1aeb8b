//! Attacks on the time of others that share an event thread, or a lock, with the guest.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};

use super::*;
use crate::bus::{DeviceBus, SharedTransport};
use crate::layout::MMIO_BASE;
use crate::reactor::Played;
use crate::virtio::{Activation, DeviceState, Fault, QueuePosition};

/// A device that calls its test at each turn and each configuration read, and always wants another
/// turn.
struct Restless {
    run: Box<dyn Fn() + Send>,
    read: Box<dyn Fn() + Send>,
}

impl VirtioDevice for Restless {
    fn device_type(&self) -> u32 {
        42
    }
    fn features(&self) -> u64 {
        F_VERSION_1
    }
    fn queue_sizes(&self) -> &[u16] {
        &[]
    }
    fn read_config(&self, _: u64, _: &mut [u8]) {
        (self.read)();
    }
    fn activate(&mut self, _: Activation) -> Result<(), Fault> {
        Ok(())
    }
    fn run(&mut self) -> Result<Progress, Fault> {
        (self.run)();
        Ok(Progress::More)
    }
    fn reset(&mut self) {}
    fn positions(&self) -> Vec<Option<QueuePosition>> {
        Vec::new()
    }
    fn save(&self) -> DeviceState {
        BalloonDevice::new(64, Doorbell::new().unwrap()).0.save()
    }
}

fn restless(run: impl Fn() + Send + 'static, read: impl Fn() + Send + 'static) -> SharedTransport {
    let (run, read) = (Box::new(run), Box::new(read));
    SharedTransport::new(MmioTransport::new(
        Box::new(Restless { run, read }),
        GuestRam::new(MIB).unwrap(),
        Doorbell::new().unwrap(),
        Interrupt::new().unwrap(),
    ))
}

fn bus(transport: &SharedTransport) -> DeviceBus {
    DeviceBus {
        serial: None,
        virtio: vec![transport.clone()],
        registers: None,
    }
}

/// A driver reads and acknowledges in its interrupt handler: with interrupts off, on a vCPU for
/// which other vCPUs of the guest may wait.
#[test]
fn the_registers_of_an_interrupt_do_not_wait_for_a_turn() {
    ends("interrupt registers", || {
        let transport = restless(|| (), || ());
        let bus = bus(&transport);
        let in_a_turn = transport.lock();
        in_a_turn.interrupt().used();
        in_a_turn.interrupt().config_changed();
        let get = |offset| {
            let mut data = [0xff; 4];
            bus.mmio_read(MMIO_BASE + offset, &mut data);
            u32::from_le_bytes(data)
        };
        assert_eq!(get(register::INTERRUPT_STATUS), 3);
        assert_eq!(get(register::CONFIG_GENERATION), 1);
        bus.mmio_write(MMIO_BASE + register::INTERRUPT_ACK, &1u32.to_le_bytes());
        assert_eq!(get(register::INTERRUPT_STATUS), 2);
    });
}

/// Whether the thread sleeps: its state in /proc is `S`.
fn waits(thread: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/self/task/{thread}/stat")).unwrap();
    stat.rsplit_once(") ").unwrap().1.starts_with('S')
}

/// A thread that waits for a lock that an event thread takes again and again could otherwise wait
/// for ever. A VM whose vCPU does so could be neither paused nor torn down in time.
#[test]
fn whoever_waits_for_a_device_has_it_after_the_turn_that_it_takes() {
    ends("a device without rest", || {
        for _ in 0..20 {
            let begun = Arc::new(AtomicBool::new(false));
            // The thread id of the vCPU, once it runs; turns so far; how many there were at its
            // read.
            let vcpu = Arc::new(AtomicI32::new(0));
            let turns = Arc::new(AtomicUsize::new(0));
            let seen = Arc::new(AtomicUsize::new(0));
            let transport = restless(
                {
                    let (begun, vcpu) = (Arc::clone(&begun), Arc::clone(&vcpu));
                    let turns = Arc::clone(&turns);
                    move || {
                        begun.store(true, Ordering::SeqCst);
                        // The first turn is not over until the vCPU waits.
                        while turns.load(Ordering::SeqCst) == 0
                            && !matches!(vcpu.load(Ordering::SeqCst), id if id != 0 && waits(id))
                        {
                            std::thread::yield_now();
                        }
                        turns.fetch_add(1, Ordering::SeqCst);
                    }
                },
                {
                    let (turns, seen) = (Arc::clone(&turns), Arc::clone(&seen));
                    move || seen.store(turns.load(Ordering::SeqCst), Ordering::SeqCst)
                },
            );
            let bus = bus(&transport);
            let reader = std::thread::spawn(move || {
                while !begun.load(Ordering::SeqCst) {
                    std::thread::yield_now();
                }
                let own = rustix::thread::gettid().as_raw_nonzero().get();
                vcpu.store(own, Ordering::SeqCst);
                bus.mmio_read(MMIO_BASE + register::CONFIG, &mut [0; 4]);
            });
            for _ in 0..1000 {
                transport.turn();
            }
            reader.join().unwrap();
            let seen = seen.load(Ordering::SeqCst);
            assert_eq!(seen, 1, "turns");
        }
    });
}

/// Records the name of the device at each turn.
struct Counted {
    device: Box<dyn VirtioDevice>,
    name: &'static str,
    turns: Arc<Mutex<Vec<&'static str>>>,
}

impl VirtioDevice for Counted {
    fn device_type(&self) -> u32 {
        self.device.device_type()
    }
    fn features(&self) -> u64 {
        self.device.features()
    }
    fn queue_sizes(&self) -> &[u16] {
        self.device.queue_sizes()
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.device.read_config(offset, data);
    }
    fn activate(&mut self, activation: Activation) -> Result<(), Fault> {
        self.device.activate(activation)
    }
    fn run(&mut self) -> Result<Progress, Fault> {
        self.turns.lock().unwrap().push(self.name);
        self.device.run()
    }
    fn reset(&mut self) {
        self.device.reset();
    }
    fn positions(&self) -> Vec<Option<QueuePosition>> {
        self.device.positions()
    }
    fn save(&self) -> DeviceState {
        self.device.save()
    }
}

/// A driver that makes all its chains available again and again.
struct Flood {
    transport: SharedTransport,
    ram: GuestRam,
    queues: Vec<u32>,
    offered: u16,
}

impl Flood {
    /// Makes the chains available that the device has returned, and kicks even if not asked to.
    fn go_on(&self) {
        for queue in &self.queues {
            let [_, driver, device] = parts(*queue);
            let used: u16 = self.ram.map().read_obj(GuestAddress(device + 2)).unwrap();
            let available = used.wrapping_add(self.offered);
            let at = GuestAddress(driver + 2);
            self.ram.map().write_obj(available, at).unwrap();
        }
        self.transport.lock().doorbell().ring();
    }
}

/// Starts a device and prepares requests as large as the protocol allows in all its request queues.
fn flood(kind: Kind, turns: &Arc<Mutex<Vec<&'static str>>>) -> Flood {
    let doorbell = Doorbell::new().unwrap();
    let device = Counted {
        device: kind.device(&doorbell),
        name: "hostile",
        turns: Arc::clone(turns),
    };
    let mut attacker = Attacker::in_memory(kind, Box::new(device), doorbell, 3 << 30);
    let (features, queues, flooded): (u64, u32, &[u32]) = match kind {
        Kind::Vsock => (0, 3, &[1]),
        Kind::Balloon => (F_REPORTING, 3, &[0, 1, 2]),
        Kind::Pmem => (0, 1, &[0]),
    };
    attacker.up(F_VERSION_1 | features, queues);
    match kind {
        // From an unknown CID, so that no answer ends the flood: a header and 64 KiB.
        Kind::Vsock => {
            let mut header = [0; 44];
            (header[0], header[26], header[28], header[30]) = (77, 1, 1, 5);
            attacker.write(BUFFER, &header);
            attacker.descriptor(1, 0, (BUFFER, 44 + (64 << 10)), 0, 0);
        }
        Kind::Balloon => {
            let pages: Vec<u8> = (0..1024u32)
                .flat_map(|n| (0x1_0000 + 2 * n).to_le_bytes())
                .collect();
            attacker.write(BUFFER, &pages);
            attacker.descriptor(0, 0, (BUFFER, 4096), 0, 0);
            attacker.descriptor(1, 0, (BUFFER, 4096), 0, 0);
            attacker.descriptor(2, 0, (64 * MIB, 0xa000_0000), WRITE, 0);
        }
        Kind::Pmem => {
            attacker.descriptor(0, 0, (BUFFER, 4), NEXT, 1);
            attacker.descriptor(0, 1, (BUFFER + 4, 4), WRITE, 0);
        }
    }
    let (transport, ram) = attacker.shared();
    Flood {
        transport,
        ram,
        queues: flooded.to_vec(),
        offered: SIZE,
    }
}

/// Two guests on one event thread, one of which floods all its devices: between the other's kick
/// and its answer there are a turn that was in progress, one turn of the hostile guest, and its
/// own.
#[test]
fn a_guest_that_floods_all_its_devices_has_one_turn_between_two_of_its_neighbours() {
    ends("a flood of all devices", || {
        // The order of the two on the thread must not matter.
        for places in [[1, 2], [2, 1]] {
            let turns = Arc::default();
            let images = std::iter::repeat_n(Kind::Pmem, crate::virtio::pmem::MAX_IMAGES);
            let kinds = [Kind::Vsock, Kind::Balloon].into_iter().chain(images);
            let floods: Vec<Flood> = kinds.map(|kind| flood(kind, &turns)).collect();
            let doorbell = Doorbell::new().unwrap();
            let device = Counted {
                device: Kind::Pmem.device(&doorbell),
                name: "honest",
                turns: Arc::clone(&turns),
            };
            let mut honest = Attacker::with(Kind::Pmem, Box::new(device), doorbell);
            honest.up(F_VERSION_1, 1);
            honest.descriptor(0, 0, (BUFFER, 4), NEXT, 1);
            honest.descriptor(0, 1, (BUFFER + 4, 4), WRITE, 0);
            let (transport, ram) = honest.shared();
            let thread = Played::new();
            let hostile = floods.iter().map(|flood| flood.transport.clone());
            let _hostile = thread.attach(places[0], hostile.collect());
            let _honest = thread.attach(places[1], vec![transport.clone()]);
            for request in 1..=100u16 {
                for flood in &floods {
                    flood.go_on();
                }
                let index = GuestAddress(parts(0)[1] + 2);
                ram.map().write_obj(request, index).unwrap();
                transport.lock().doorbell().ring();
                turns.lock().unwrap().clear();
                let used = || -> u16 {
                    let index = GuestAddress(parts(0)[2] + 2);
                    ram.map().read_obj(index).unwrap()
                };
                while used() != request {
                    thread.look();
                }
                let turns = turns.lock().unwrap();
                let before = turns.iter().take_while(|name| **name == "hostile").count();
                assert!(before <= 1, "request {request}: {turns:?}");
            }
            // Each of the flooded devices had a turn, and none reported a fault.
            turns.lock().unwrap().clear();
            for _ in 0..floods.len() {
                floods.iter().for_each(Flood::go_on);
                thread.look();
            }
            for flood in &floods {
                let transport = flood.transport.lock();
                assert_eq!(transport.faults(), 0, "{:?}", transport.last_fault());
            }
            let turns = turns.lock().unwrap();
            let hostile = turns.iter().filter(|name| **name == "hostile").count();
            assert_eq!(hostile, floods.len());
        }
    });
}
