//! A hostile guest driver: it writes device registers, rings and memory as the fuzzer chooses.

use arbitrary::Arbitrary;
use hearth_vmm::memory::{GuestRam, MIB};
use hearth_vmm::testing::image_device;
use hearth_vmm::virtio::balloon::BalloonDevice;
use hearth_vmm::virtio::mmio::{MmioTransport, register, status};
use hearth_vmm::virtio::vsock::VsockDevice;
use hearth_vmm::virtio::vsock::testing::Ring;
use hearth_vmm::virtio::{Doorbell, F_EVENT_IDX, F_VERSION_1, Interrupt, VirtioDevice};
use vm_memory::{Bytes, GuestAddress};

const RAM: u64 = 2 * MIB;
/// Most operations of one input, and runs of the device in [`Driver::lay`]: more show nothing new.
const MOST: usize = 256;

/// Which device is behind the registers.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Kind {
    Vsock,
    Balloon,
    Image,
}

/// Offsets of a queue's driver ring and device ring in bytes from its descriptor table: over each
/// other, over the descriptors, or apart.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub struct Layout {
    driver: u16,
    device: u16,
}

impl Layout {
    /// The offsets that `Ring` of the test harness uses.
    const APART: Self = Self {
        driver: 0x4000,
        device: 0x8000,
    };
}

/// One operation of a driver.
#[derive(Arbitrary, Debug)]
pub enum Op {
    /// Resets and initialises the device as the specification requires, from any state.
    SetUp {
        features: u64,
    },
    /// Writes a register with the usual 4 bytes or another width.
    Write {
        offset: u16,
        width: u8,
        value: u64,
    },
    Read {
        offset: u16,
        width: u8,
    },
    /// Writes a descriptor; address and length are often plausible or near a limit.
    Descriptor {
        queue: u8,
        at: u8,
        addr: Place,
        len: Length,
        flags: u16,
        next: u8,
    },
    /// Makes a chain available.
    Push {
        queue: u8,
        head: u16,
    },
    /// Writes anywhere in memory: into buffers or rings.
    Memory {
        addr: Place,
        bytes: [u8; 16],
    },
    /// Moves the available index.
    Index {
        queue: u8,
        index: u16,
    },
    Kick,
    Run,
}

/// An address: in a buffer, in the rings, at the edge of memory, or anywhere.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Place {
    Buffer(u16),
    Rings(u16),
    Edge(u8),
    Anywhere(u64),
}

impl Place {
    fn address(self) -> u64 {
        match self {
            Self::Buffer(at) => MIB + u64::from(at),
            Self::Rings(at) => 0x1000 + u64::from(at) * 2,
            Self::Edge(before) => RAM - u64::from(before),
            Self::Anywhere(addr) => addr,
        }
    }
}

#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Length {
    Short(u8),
    Page(u16),
    Any(u32),
}

impl Length {
    fn bytes(self) -> u32 {
        match self {
            Self::Short(n) => n.into(),
            Self::Page(n) => n.into(),
            Self::Any(n) => n,
        }
    }
}

/// A device, its memory, and the driver's state of the rings.
pub struct Driver {
    transport: MmioTransport,
    ram: GuestRam,
    rings: Vec<Ring>,
    sizes: Vec<u16>,
    kind: Kind,
}

impl Driver {
    pub fn new(kind: Kind) -> Self {
        let ram = GuestRam::new(RAM).expect("memory");
        let doorbell = Doorbell::new().expect("a descriptor");
        let device: Box<dyn VirtioDevice> = match kind {
            Kind::Vsock => Box::new(VsockDevice::new(3, doorbell.clone()).0),
            Kind::Balloon => Box::new(BalloonDevice::new(64, doorbell.clone()).0),
            Kind::Image => {
                let file = tempfile::NamedTempFile::new().expect("a file");
                file.as_file().set_len(2 * MIB).expect("room");
                image_device(file.path(), 1 << 32).expect("an image")
            }
        };
        let sizes = device.queue_sizes().to_vec();
        let interrupt = Interrupt::new().expect("a descriptor");
        let transport = MmioTransport::new(device, ram.clone(), doorbell, interrupt);
        let mut driver = Self {
            transport,
            ram,
            rings: Vec::new(),
            sizes,
            kind,
        };
        driver.forget_rings(true);
        driver
    }

    fn forget_rings(&mut self, event_idx: bool) {
        let rings = (0u64..).zip(&self.sizes);
        self.rings = rings
            .map(|(at, size)| Ring::new(at, *size, event_idx))
            .collect();
    }

    fn set(&mut self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    fn set_up(&mut self, wanted: u64) {
        self.begin(wanted);
        for index in 0..self.sizes.len() {
            self.place(index, Layout::APART);
        }
        self.set(register::STATUS, 15);
    }

    /// Initialises the device with the queue and the unusual layout of `odd`, makes `chains` chains
    /// available there, and runs the device.
    pub fn lay(&mut self, wanted: u64, odd: (u8, Layout), chains: u16) {
        self.begin(wanted);
        let queue = usize::from(odd.0) % self.sizes.len();
        for index in 0..self.sizes.len() {
            self.place(index, if index == queue { odd.1 } else { Layout::APART });
        }
        self.set(register::STATUS, 15);
        let base = queue as u64 * 0x1_0000 + 0x1000;
        self.rings[queue].write_desc(&self.ram, 0, MIB, 64, 0, 0);
        let index = GuestAddress(base + u64::from(odd.1.driver) + 2);
        let _ = self.ram.map().write_obj(chains, index);
        for _ in 0..MOST {
            self.transport.run();
        }
    }

    fn begin(&mut self, wanted: u64) {
        self.set(register::STATUS, 0);
        self.set(register::STATUS, 1);
        self.set(register::STATUS, 3);
        let mut offered = 0u64;
        for half in [0u32, 1] {
            let mut data = [0; 4];
            self.set(register::DEVICE_FEATURES_SEL, half);
            self.transport.read(register::DEVICE_FEATURES, &mut data);
            offered |= u64::from(u32::from_le_bytes(data)) << (32 * half);
        }
        let features = offered & wanted | F_VERSION_1;
        for half in [0u32, 1] {
            self.set(register::DRIVER_FEATURES_SEL, half);
            self.set(register::DRIVER_FEATURES, (features >> (32 * half)) as u32);
        }
        self.set(register::STATUS, 11);
        self.forget_rings(features & F_EVENT_IDX != 0);
        let zeroes = vec![0; 0x5_0000];
        self.ram
            .map()
            .write_slice(&zeroes, GuestAddress(0x1000))
            .expect("inside memory");
    }

    /// Sets a queue up.
    fn place(&mut self, index: usize, layout: Layout) {
        // Where `Ring` has its descriptors.
        let base = index as u32 * 0x1_0000 + 0x1000;
        self.set(register::QUEUE_SEL, index as u32);
        self.set(register::QUEUE_NUM, self.sizes[index].into());
        self.set(register::QUEUE_DESC_LOW, base);
        self.set(register::QUEUE_DRIVER_LOW, base + u32::from(layout.driver));
        self.set(register::QUEUE_DEVICE_LOW, base + u32::from(layout.device));
        self.set(register::QUEUE_READY, 1);
    }

    /// # Panics
    /// If the device violates an invariant.
    pub fn act(&mut self, ops: &[Op]) {
        for op in ops.iter().take(MOST) {
            self.step(op);
        }
        // A reset must recover the device from any state.
        self.set_up(u64::MAX);
        assert_eq!(self.transport.status(), 15, "{:?}", self.kind);
        self.transport.run();
        assert!(self.transport.active());
    }

    fn step(&mut self, op: &Op) {
        let queue = |index: u8| usize::from(index) % self.sizes.len();
        match *op {
            Op::SetUp { features } => self.set_up(features),
            Op::Write {
                offset,
                width,
                value,
            } => {
                let data = value.to_le_bytes();
                let width = if width < 200 {
                    4
                } else {
                    usize::from(width) % 9
                };
                self.transport
                    .write(u64::from(offset) % 0x1000, &data[..width]);
            }
            Op::Read { offset, width } => {
                let mut data = [0; 8];
                let width = usize::from(width) % 9;
                self.transport
                    .read(u64::from(offset) % 0x1000, &mut data[..width]);
            }
            Op::Descriptor {
                queue: q,
                at,
                addr,
                len,
                flags,
                next,
            } => {
                let ring = &self.rings[queue(q)];
                let (addr, len) = (addr.address(), len.bytes());
                ring.write_desc(&self.ram, at.into(), addr, len, flags, next.into());
            }
            Op::Push { queue: q, head } => {
                let q = queue(q);
                if self.rings[q].push(&self.ram, head) {
                    self.transport.doorbell().ring();
                }
            }
            Op::Memory { addr, bytes } => {
                // A write outside memory has no effect, as for a real guest.
                let _ = self
                    .ram
                    .map()
                    .write_slice(&bytes, GuestAddress(addr.address()));
            }
            Op::Index { queue: q, index } => {
                let at = queue(q) as u64 * 0x1_0000 + 0x5002;
                self.ram
                    .map()
                    .write_obj(index, GuestAddress(at))
                    .expect("inside memory");
            }
            Op::Kick => self.transport.doorbell().ring(),
            Op::Run => {
                let faults = self.transport.faults();
                self.transport.run();
                let faulted = self.transport.faults() > faults;
                let needs_reset = self.transport.status() & status::NEEDS_RESET != 0;
                assert!(!faulted || needs_reset);
            }
        }
    }
}
