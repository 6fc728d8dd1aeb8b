//! The hostile suite with a scripted driver: attacks on every virtio device, on real guest memory
//! and through the transport's registers, as a guest would make them. `tests/HOSTILE.md` lists them
//! beside the attacks of real guests.
//!
//! Each attack states which check must catch it (part of the [`Fault`]'s text) and what becomes of
//! the device, and ends with an honest exchange after a reset: no effect of a driver may outlive
//! the reset.

mod fairness;
mod log;
mod memory;
mod requests;
mod rings;
mod sockets;
mod transport;

use std::sync::mpsc;
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress};

use super::balloon::{Balloon, BalloonDevice};
use super::mmio::{MmioTransport, register, status};
use super::pmem::{GRANULE, PmemDevice, PmemImage};
use super::vsock::VsockDevice;
use super::{Doorbell, F_EVENT_IDX, F_VERSION_1, Interrupt, Progress, VirtioDevice};
use crate::bus::SharedTransport;
use crate::memory::{GAP_END, GuestRam, MIB};

const RAM: u64 = 4 * MIB;
/// Address of the driver's buffers.
const BUFFER: u64 = 2 * MIB;
/// Entries of a queue: the maximum of the socket device's event queue.
const SIZE: u16 = 8;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const UP: u32 = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK;
/// The balloon's free page reporting (virtio 1.2 section 5.5.3).
const F_REPORTING: u64 = 1 << 5;
/// The balloon's statistics queue (virtio 1.2 section 5.5.3).
const F_STATS: u64 = 1 << 1;

/// Addresses of the descriptors, driver ring and device ring of queue `index`.
fn parts(index: u32) -> [u64; 3] {
    let base = 0x1000 + u64::from(index) * 0x1_0000;
    [base, base + 0x4000, base + 0x8000]
}

/// A device with its registers, and guest memory, for a hostile driver. No attack may write a line
/// to the log at a level that programs show.
struct Attacker {
    transport: MmioTransport,
    ram: GuestRam,
    kind: Kind,
    /// Number of queues that the device requires.
    queues: u32,
    _log: log::Quiet,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Vsock,
    Balloon,
    Pmem,
}

impl Kind {
    fn device(self, doorbell: &Doorbell) -> Box<dyn VirtioDevice> {
        match self {
            Self::Vsock => Box::new(VsockDevice::new(3, doorbell.clone()).0),
            Self::Balloon => Box::new(BalloonDevice::new(64, doorbell.clone()).0),
            Self::Pmem => {
                let file = tempfile::NamedTempFile::new().unwrap();
                file.as_file().set_len(GRANULE).unwrap();
                let image = PmemImage::open(file.path()).unwrap();
                Box::new(PmemDevice::new(image, GAP_END))
            }
        }
    }
}

impl Attacker {
    fn new(kind: Kind) -> Self {
        let doorbell = Doorbell::new().unwrap();
        Self::with(kind, kind.device(&doorbell), doorbell)
    }

    fn with(kind: Kind, device: Box<dyn VirtioDevice>, doorbell: Doorbell) -> Self {
        Self::in_memory(kind, device, doorbell, RAM)
    }

    fn in_memory(
        kind: Kind,
        device: Box<dyn VirtioDevice>,
        doorbell: Doorbell,
        bytes: u64,
    ) -> Self {
        let ram = GuestRam::new(bytes).unwrap();
        let interrupt = Interrupt::new().unwrap();
        Self {
            transport: MmioTransport::new(device, ram.clone(), doorbell, interrupt),
            ram,
            kind,
            queues: match kind {
                Kind::Vsock => 3,
                Kind::Balloon => 2,
                Kind::Pmem => 1,
            },
            _log: log::Quiet::watch(),
        }
    }

    /// A balloon, and the host's handle of it.
    fn balloon() -> (Self, Balloon) {
        let doorbell = Doorbell::new().unwrap();
        let (device, balloon) = BalloonDevice::new(64, doorbell.clone());
        (
            Self::with(Kind::Balloon, Box::new(device), doorbell),
            balloon,
        )
    }

    /// One attacker of each kind, with its name.
    fn each() -> [(&'static str, Self); 3] {
        [
            ("vsock", Self::new(Kind::Vsock)),
            ("balloon", Self::new(Kind::Balloon)),
            ("pmem", Self::new(Kind::Pmem)),
        ]
    }

    /// Replaces the device with a new one of the same kind, in zeroed memory of `bytes`.
    fn replace_memory(&mut self, bytes: u64) {
        let doorbell = Doorbell::new().unwrap();
        let device = self.kind.device(&doorbell);
        self.ram = GuestRam::new(bytes).unwrap();
        let interrupt = Interrupt::new().unwrap();
        self.transport = MmioTransport::new(device, self.ram.clone(), doorbell, interrupt);
    }

    /// Returns the device as its VM shares it, and the guest's memory.
    fn shared(self) -> (SharedTransport, GuestRam) {
        let ram = self.ram.clone();
        (SharedTransport::new(self.transport), ram)
    }

    fn set(&mut self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    fn get(&mut self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.transport.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// Initialises the device up to the point at which queues are configured.
    fn negotiate(&mut self, features: u64) {
        self.set(register::STATUS, 0);
        self.set(register::STATUS, status::ACKNOWLEDGE);
        self.set(register::STATUS, status::ACKNOWLEDGE | status::DRIVER);
        for half in [0u32, 1] {
            self.set(register::DRIVER_FEATURES_SEL, half);
            let bits = (features >> (32 * half)) & 0xffff_ffff;
            self.set(register::DRIVER_FEATURES, u32::try_from(bits).unwrap());
        }
        self.set(register::STATUS, UP & !status::DRIVER_OK);
    }

    fn queue(&mut self, index: u32, size: u32, [desc, driver, device]: [u64; 3]) {
        self.set(register::QUEUE_SEL, index);
        self.set(register::QUEUE_NUM, size);
        for (low, high, address) in [
            (register::QUEUE_DESC_LOW, register::QUEUE_DESC_HIGH, desc),
            (
                register::QUEUE_DRIVER_LOW,
                register::QUEUE_DRIVER_HIGH,
                driver,
            ),
            (
                register::QUEUE_DEVICE_LOW,
                register::QUEUE_DEVICE_HIGH,
                device,
            ),
        ] {
            self.set(low, u32::try_from(address & 0xffff_ffff).unwrap());
            self.set(high, u32::try_from(address >> 32).unwrap());
        }
        self.set(register::QUEUE_READY, 1);
    }

    fn start(&mut self) {
        self.set(register::STATUS, UP);
    }

    /// Starts the device correctly, except that queue `index` has its parts at `odd`.
    fn up_with(&mut self, features: u64, queues: u32, index: u32, odd: [u64; 3]) {
        self.negotiate(features);
        for other in 0..queues {
            self.forget(other);
        }
        for other in 0..queues {
            let parts = if other == index { odd } else { parts(other) };
            self.queue(other, SIZE.into(), parts);
        }
        self.start();
    }

    /// Starts the device correctly, with its first `queues` queues.
    fn up(&mut self, features: u64, queues: u32) {
        self.up_with(features, queues, u32::MAX, [0; 3]);
        assert_eq!(self.transport.status(), UP);
    }

    /// Zeroes the rings of a queue.
    fn forget(&self, index: u32) {
        self.write(parts(index)[0], &[0; 0xc000]);
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        self.ram.map().write_slice(bytes, GuestAddress(at)).unwrap();
    }

    fn word(&self, at: u64) -> u16 {
        self.ram.map().read_obj(GuestAddress(at)).unwrap()
    }

    fn descriptor(&self, queue: u32, at: u16, place: (u64, u32), flags: u16, next: u16) {
        let slot = parts(queue)[0] + 16 * u64::from(at);
        self.write(slot, &descriptor(place, flags, next));
    }

    /// Makes `head` the only available chain, and kicks.
    fn offer(&mut self, queue: u32, head: u16) {
        self.offer_in(queue, parts(queue)[1], head);
    }

    /// As [`Attacker::offer`], for a driver ring at `driver`.
    fn offer_in(&mut self, queue: u32, driver: u64, head: u16) {
        self.write(driver + 4, &head.to_le_bytes());
        self.write(driver + 2, &1u16.to_le_bytes());
        self.set(register::QUEUE_NOTIFY, queue);
    }

    /// Number of chains that the device has returned.
    fn used(&self, queue: u32) -> u16 {
        self.word(parts(queue)[2] + 2)
    }

    /// Runs the device until it is idle, as its event thread would. Returns how often it ran.
    fn run(&mut self) -> usize {
        for runs in 1..1000 {
            if self.transport.run() == Progress::Idle {
                return runs;
            }
        }
        panic!("the device always wants to go on");
    }

    /// Asserts that the fault's text contains `why` and that the driver is told that only a reset
    /// helps; after a reset the device must serve again.
    #[track_caller]
    fn assert_refused(mut self, attack: &str, why: &str) {
        let fault = self.transport.last_fault().map(ToString::to_string);
        let fault = fault.unwrap_or_else(|| panic!("{attack}: no fault"));
        assert!(fault.to_lowercase().contains(why), "{attack}: {fault}");
        let told = self.transport.status();
        assert_ne!(told & status::NEEDS_RESET, 0, "{attack}: {told:#x}");
        assert!(!self.transport.active(), "{attack}");
        assert_eq!(self.transport.run(), Progress::Idle, "{attack}");
        if told & status::DRIVER_OK != 0 {
            assert_eq!(self.transport.interrupt().status() & 2, 2, "{attack}");
        }
        self.assert_serves(attack);
    }

    /// Asserts that the device is active and has counted no fault, and that it serves after a
    /// reset.
    #[track_caller]
    fn assert_unaffected(mut self, attack: &str) {
        assert_eq!(self.transport.faults(), 0, "{attack}");
        assert!(self.transport.active(), "{attack}");
        self.assert_serves(attack);
    }

    /// Asserts that, after a reset, an honest chain in a request queue is returned; for a socket
    /// device, a packet without an answer.
    #[track_caller]
    fn assert_serves(&mut self, attack: &str) {
        let faults = self.transport.faults();
        self.up(F_VERSION_1, self.queues);
        let queue = match self.kind {
            // A reset of a connection that does not exist is not answered.
            Kind::Vsock => {
                let mut header = [0; 44];
                header[0] = 3;
                header[8] = 2;
                (header[28], header[30]) = (1, 3);
                self.write(BUFFER, &header);
                self.descriptor(1, 0, (BUFFER, 44), 0, 0);
                1
            }
            Kind::Pmem => {
                self.write(BUFFER, &[0; 8]);
                self.descriptor(0, 0, (BUFFER, 4), NEXT, 1);
                self.descriptor(0, 1, (BUFFER + 4, 4), WRITE, 0);
                0
            }
            Kind::Balloon => {
                self.write(BUFFER, &0x300u32.to_le_bytes());
                self.descriptor(0, 0, (BUFFER, 4), 0, 0);
                0
            }
        };
        self.offer(queue, 0);
        self.run();
        assert_eq!(self.used(queue), 1, "{attack}: no service after a reset");
        assert_eq!(self.transport.faults(), faults, "{attack}");
    }
}

/// Returns the bytes of a descriptor.
fn descriptor((address, len): (u64, u32), flags: u16, next: u16) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&address.to_le_bytes());
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    bytes
}

/// Runs `run` on a thread of its own, and panics if it takes longer than 60 s; the hung thread is
/// then left behind.
fn ends<T: Send + 'static>(attack: &str, run: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, is_done) = mpsc::channel();
    std::thread::spawn(move || done.send(run()));
    let ended = is_done.recv_timeout(Duration::from_secs(60));
    ended.unwrap_or_else(|_| panic!("{attack}: the device spins, or panicked"))
}
