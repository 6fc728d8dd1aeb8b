//! A guest's driver on real guest memory: split rings, `EVENT_IDX`, kicks and interrupts as in the
//! specification. Shared by unit tests, integration tests and fuzz targets.
//!
//! The device runs only when its doorbell was rung or it asked to run again, and the guest reads
//! its used rings only after an interrupt: a test that loses a kick or an interrupt does not get
//! its packet.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::VecDeque;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::packet::{HEADER_BYTES, HOST_CID, Header, Op, ShutdownFlags, TYPE_STREAM};
use super::{VsockDevice, VsockHost};
use crate::memory::{GuestRam, MIB};
use crate::virtio::{
    Activation, Doorbell, F_EVENT_IDX, F_VERSION_1, Fault, Interrupt, Progress, VirtioDevice,
};

pub const GUEST_CID: u64 = 3;
pub const RX: usize = 0;
pub const TX: usize = 1;
pub const EVENT: usize = 2;

/// Guest memory of one test: the rings, the event buffers, a page for each RX buffer, the TX
/// buffers.
const RAM_BYTES: u64 = 4 * MIB;
const RING_STRIDE: u64 = 0x1_0000;
const RX_BUFFERS: u64 = 0x10_0000;
const EVENT_BUFFERS: u64 = 0x8_0000;
const TX_BUFFERS: u64 = 0x20_0000;
const TX_STRIDE: u64 = 80 * 1024;
/// TX chains in flight at once.
const TX_CHAINS: u64 = 16;
const F_NEXT: u16 = 1;
const F_WRITE: u16 = 2;

/// One split virtqueue, from the driver's side.
#[derive(Clone, Debug)]
pub struct Ring {
    base: u64,
    size: u16,
    avail: u16,
    used: u16,
    event_idx: bool,
}

impl Ring {
    pub fn new(index: u64, size: u16, event_idx: bool) -> Self {
        Self {
            base: index * RING_STRIDE + 0x1000,
            size,
            avail: 0,
            used: 0,
            event_idx,
        }
    }

    fn avail_ring(&self) -> u64 {
        self.base + 0x4000
    }

    fn used_ring(&self) -> u64 {
        self.base + 0x8000
    }

    /// The queue as the transport would hand it to the device, at the positions `next` in the
    /// available and the used ring.
    pub fn queue(&self, next: (u16, u16)) -> Queue {
        let mut queue = Queue::new(self.size).unwrap();
        queue
            .try_set_desc_table_address(GuestAddress(self.base))
            .unwrap();
        queue
            .try_set_avail_ring_address(GuestAddress(self.avail_ring()))
            .unwrap();
        queue
            .try_set_used_ring_address(GuestAddress(self.used_ring()))
            .unwrap();
        queue.set_event_idx(self.event_idx);
        queue.set_next_avail(next.0);
        queue.set_next_used(next.1);
        queue.set_ready(true);
        queue
    }

    pub fn write_desc(&self, ram: &GuestRam, at: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let mut desc = [0; 16];
        desc[..8].copy_from_slice(&addr.to_le_bytes());
        desc[8..12].copy_from_slice(&len.to_le_bytes());
        desc[12..14].copy_from_slice(&flags.to_le_bytes());
        desc[14..].copy_from_slice(&next.to_le_bytes());
        let slot = GuestAddress(self.base + u64::from(at) * 16);
        ram.map().write_slice(&desc, slot).unwrap();
    }

    /// Makes `head` available; returns true if the device wants a kick for it.
    pub fn push(&mut self, ram: &GuestRam, head: u16) -> bool {
        let slot = self.avail_ring() + 4 + u64::from(self.avail % self.size) * 2;
        ram.map().write_obj(head, GuestAddress(slot)).unwrap();
        let old = self.avail;
        self.avail = self.avail.wrapping_add(1);
        ram.map()
            .store(
                self.avail,
                GuestAddress(self.avail_ring() + 2),
                Ordering::Release,
            )
            .unwrap();
        fence(Ordering::SeqCst);
        if self.event_idx {
            let at = self.used_ring() + 4 + u64::from(self.size) * 8;
            let event: u16 = ram.map().load(GuestAddress(at), Ordering::Relaxed).unwrap();
            // vring_need_event() of the specification.
            self.avail.wrapping_sub(event).wrapping_sub(1) < self.avail.wrapping_sub(old)
        } else {
            let flags: u16 = ram
                .map()
                .load(GuestAddress(self.used_ring()), Ordering::Relaxed)
                .unwrap();
            flags & 1 == 0
        }
    }

    /// Takes the next used chain (head, bytes written), and asks for an interrupt for the one
    /// after.
    pub fn pop(&mut self, ram: &GuestRam) -> Option<(u16, u32)> {
        if self.event_idx {
            let at = self.avail_ring() + 4 + u64::from(self.size) * 2;
            ram.map()
                .store(self.used, GuestAddress(at), Ordering::Relaxed)
                .unwrap();
            fence(Ordering::SeqCst);
        }
        let used: u16 = ram
            .map()
            .load(GuestAddress(self.used_ring() + 2), Ordering::Acquire)
            .unwrap();
        if used == self.used {
            return None;
        }
        let slot = self.used_ring() + 4 + u64::from(self.used % self.size) * 8;
        let head: u32 = ram.map().read_obj(GuestAddress(slot)).unwrap();
        let len: u32 = ram.map().read_obj(GuestAddress(slot + 4)).unwrap();
        self.used = self.used.wrapping_add(1);
        Some((u16::try_from(head).unwrap(), len))
    }
}

/// Configuration of a [`Guest`].
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    pub event_idx: bool,
    /// Sizes of the descriptors of each RX buffer; at most 4096 bytes together.
    pub rx_pieces: &'static [u32],
    /// How many RX buffers the guest provides from the start.
    pub rx_buffers: u16,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            event_idx: true,
            rx_pieces: &[4096],
            rx_buffers: 16,
        }
    }
}

/// A guest's driver with its device.
pub struct Guest {
    pub device: VsockDevice,
    pub host: VsockHost,
    pub doorbell: Doorbell,
    pub interrupt: Interrupt,
    pub ram: GuestRam,
    pub rings: [Ring; 3],
    /// Packets received, in order.
    pub inbox: VecDeque<(Header, Vec<u8>)>,
    /// Events received.
    pub events: Vec<u32>,
    /// Whether an RX buffer goes back to the device once its packet was taken.
    pub refill: bool,
    /// RX buffers that did not go back.
    pub rx_idle: Vec<u16>,
    /// Whether an event's buffer goes back to the device at once, as it does in a driver that has
    /// handled the event.
    pub handles_events: bool,
    /// Event buffers that did not go back.
    pub events_idle: Vec<u16>,
    /// How often the device ran.
    pub runs: usize,
    /// How often the guest kicked.
    pub kicks: usize,
    /// Whether packets may come from addresses other than the host's, as refusals of packets to
    /// such addresses do.
    pub foreign_ok: bool,
    setup: Setup,
    tx_free: Vec<u64>,
    tx_busy: VecDeque<(u16, u64)>,
}

impl Guest {
    /// A guest whose driver is up.
    pub fn new(setup: Setup) -> Self {
        let mut guest = Self::inactive(setup);
        guest.activate();
        guest
    }

    /// A guest whose driver is not up yet.
    pub fn inactive(setup: Setup) -> Self {
        let doorbell = Doorbell::new().unwrap();
        let (device, host) = VsockDevice::new(GUEST_CID, doorbell.clone());
        Self::with(
            setup,
            device,
            host,
            doorbell,
            GuestRam::new(RAM_BYTES).unwrap(),
        )
    }

    fn with(
        setup: Setup,
        device: VsockDevice,
        host: VsockHost,
        doorbell: Doorbell,
        ram: GuestRam,
    ) -> Self {
        let sizes = device.queue_sizes().to_vec();
        let ring = |at: usize| Ring::new(at as u64, sizes[at], setup.event_idx);
        Self {
            rings: [ring(RX), ring(TX), ring(EVENT)],
            device,
            host,
            doorbell,
            interrupt: Interrupt::new().unwrap(),
            ram,
            inbox: VecDeque::new(),
            events: Vec::new(),
            refill: true,
            rx_idle: Vec::new(),
            handles_events: true,
            events_idle: Vec::new(),
            runs: 0,
            kicks: 0,
            foreign_ok: false,
            setup,
            tx_free: (0..TX_CHAINS).map(|n| TX_BUFFERS + n * TX_STRIDE).collect(),
            tx_busy: VecDeque::new(),
        }
    }

    pub fn activation(&self, next: [(u16, u16); 3]) -> Activation {
        let event_idx = if self.setup.event_idx { F_EVENT_IDX } else { 0 };
        Activation {
            ram: self.ram.clone(),
            queues: self
                .rings
                .iter()
                .zip(next)
                .map(|(ring, next)| Some(ring.queue(next)))
                .collect(),
            features: F_VERSION_1 | event_idx,
            interrupt: self.interrupt.clone(),
        }
    }

    /// The driver sets itself up: `DRIVER_OK`, then buffers.
    pub fn activate(&mut self) {
        let activation = self.activation([(0, 0); 3]);
        self.device.activate(activation).unwrap();
        for at in 0..self.setup.rx_buffers {
            self.post_rx(at);
        }
        for at in 0..8 {
            let addr = EVENT_BUFFERS + u64::from(at) * 64;
            self.rings[EVENT].write_desc(&self.ram, at, addr, 4, F_WRITE, 0);
            self.push(EVENT, at);
        }
    }

    /// The driver resets the device and forgets its rings and buffers.
    pub fn reset(&mut self) {
        self.device.reset();
        let fresh = Self::inactive(self.setup);
        self.rings = fresh.rings;
        self.tx_free = fresh.tx_free;
        self.tx_busy.clear();
        self.ram = fresh.ram;
        self.interrupt = fresh.interrupt;
    }

    /// Connections in the device's table.
    pub fn connections(&mut self) -> usize {
        self.pump();
        self.device.connections()
    }

    /// Runs the device as if `elapsed` had passed, for its timeouts.
    pub fn wait(&mut self, elapsed: Duration) {
        self.pump();
        self.device.run_at(Instant::now() + elapsed).unwrap();
        self.kick();
        self.pump();
    }

    /// The same guest in a device restored from a snapshot taken now. Packets in flight in the
    /// rings stay in flight.
    pub fn restored(mut self) -> Self {
        self.restore();
        self
    }

    /// See [`Guest::restored`].
    pub fn restore(&mut self) {
        let state = self.device.save();
        let next = self.rings.clone().map(|ring| {
            // The device has used every chain that it took, so both of its positions are its used
            // index.
            let used: u16 = self
                .ram
                .map()
                .load(GuestAddress(ring.used_ring() + 2), Ordering::Relaxed)
                .unwrap();
            (used, used)
        });
        let doorbell = Doorbell::new().unwrap();
        let (device, host) = VsockDevice::restore(&state, doorbell.clone());
        self.device = device;
        self.host = host;
        self.doorbell = doorbell;
        let activation = self.activation(next);
        self.device.activate(activation).unwrap();
    }

    /// Makes the chain at `head` available, and kicks if the device wants that.
    pub fn push(&mut self, queue: usize, head: u16) {
        if self.rings[queue].push(&self.ram, head) {
            self.kicks += 1;
            self.doorbell.ring();
        }
    }

    /// Provides RX buffer number `at` (0 to 63).
    pub fn post_rx(&mut self, at: u16) {
        let pieces = self.setup.rx_pieces;
        let head = at * u16::try_from(pieces.len()).unwrap();
        let mut addr = RX_BUFFERS + u64::from(at) * 4096;
        for (n, len) in pieces.iter().enumerate() {
            let n = u16::try_from(n).unwrap();
            let last = usize::from(n) + 1 == pieces.len();
            let flags = if last { F_WRITE } else { F_WRITE | F_NEXT };
            self.rings[RX].write_desc(&self.ram, head + n, addr, *len, flags, head + n + 1);
            addr += u64::from(*len);
        }
        self.push(RX, head);
    }

    /// Kicks even if the device did not ask for it, as a guest may.
    pub fn kick(&self) {
        self.doorbell.ring();
    }

    /// Runs the device as its event thread would, until nothing is left to do.
    ///
    /// # Errors
    /// The device's fault.
    pub fn try_pump(&mut self) -> Result<(), Fault> {
        let outcome = self.run();
        // In unit tests, waits until the tasks that waited for this work are woken. Elsewhere, only
        // the device is measured.
        #[cfg(test)]
        crate::wake::flush();
        outcome
    }

    fn run(&mut self) -> Result<(), Fault> {
        loop {
            let rung = self.doorbell.answer();
            if rung {
                // A device that always asks to run again, which none may do, would never end this
                // loop.
                for turn in 0.. {
                    self.runs += 1;
                    if self.device.run()? == Progress::Idle {
                        break;
                    }
                    assert!(turn < 10_000, "the device spins");
                    self.take_interrupt();
                }
            }
            if !self.take_interrupt() && !rung {
                return Ok(());
            }
        }
    }

    /// [`Guest::pump`], where packets may come from other addresses than the host's.
    pub fn pump_raw(&mut self) {
        self.foreign_ok = true;
        self.pump();
        self.foreign_ok = false;
    }

    pub fn pump(&mut self) {
        self.try_pump().unwrap();
    }

    /// Reads the used rings if there was an interrupt; returns whether there was.
    fn take_interrupt(&mut self) -> bool {
        if self.interrupt.fd().read().is_err() {
            return false;
        }
        self.interrupt.acknowledge(u32::MAX);
        while let Some((head, len)) = self.rings[RX].pop(&self.ram) {
            let pieces = u16::try_from(self.setup.rx_pieces.len()).unwrap();
            let at = head / pieces;
            let mut bytes = vec![0; usize::try_from(len).unwrap()];
            let addr = GuestAddress(RX_BUFFERS + u64::from(at) * 4096);
            self.ram.map().read_slice(&mut bytes, addr).unwrap();
            let payload = bytes.split_off(HEADER_BYTES);
            let header = Header::decode(&bytes.try_into().unwrap());
            assert_eq!(header.len as usize, payload.len());
            assert_eq!(header.dst_cid, GUEST_CID);
            assert!(self.foreign_ok || header.src_cid == HOST_CID);
            self.inbox.push_back((header, payload));
            if self.refill {
                self.post_rx(at);
            } else {
                self.rx_idle.push(at);
            }
        }
        while let Some((head, len)) = self.rings[TX].pop(&self.ram) {
            // Chains that a test pushed by itself are not among these.
            if let Some((posted, addr)) = self.tx_busy.pop_front() {
                assert_eq!((posted, len), (head, 0));
                self.tx_free.push(addr);
            }
        }
        while let Some((head, len)) = self.rings[EVENT].pop(&self.ram) {
            assert_eq!(len, 4);
            let addr = EVENT_BUFFERS + u64::from(head) * 64;
            self.events
                .push(self.ram.map().read_obj(GuestAddress(addr)).unwrap());
            if self.handles_events {
                self.push(EVENT, head);
            } else {
                self.events_idle.push(head);
            }
        }
        true
    }

    /// Whether a packet can be sent now.
    pub fn can_send(&self) -> bool {
        !self.tx_free.is_empty()
    }

    /// Number of packets that were sent and the device has not taken yet.
    pub fn tx_waiting(&self) -> usize {
        self.tx_busy.len()
    }

    /// Posts raw bytes as one TX chain whose descriptors have at most `piece` bytes each.
    pub fn post_tx(&mut self, bytes: &[u8], piece: usize) {
        let addr = self.tx_free.pop().expect("a free TX buffer");
        let slot = u16::try_from((addr - TX_BUFFERS) / TX_STRIDE).unwrap();
        self.ram
            .map()
            .write_slice(bytes, GuestAddress(addr))
            .unwrap();
        // Each chain has its own share of the descriptors.
        let per_chain = self.rings[TX].size / u16::try_from(TX_CHAINS).unwrap();
        let head = slot * per_chain;
        let piece = piece.max(bytes.len().div_ceil(usize::from(per_chain)));
        let mut chunks = bytes.chunks(piece).peekable();
        let (mut at, mut chunk_addr) = (head, addr);
        while let Some(chunk) = chunks.next() {
            let flags = if chunks.peek().is_some() { F_NEXT } else { 0 };
            let len = u32::try_from(chunk.len()).unwrap();
            self.rings[TX].write_desc(&self.ram, at, chunk_addr, len, flags, at + 1);
            at += 1;
            chunk_addr += u64::from(len);
        }
        self.tx_busy.push_back((head, addr));
        self.push(TX, head);
    }

    /// Sends one packet unchanged.
    pub fn send(&mut self, header: Header, payload: &[u8]) {
        let mut bytes = header.encode().to_vec();
        bytes.extend(payload);
        self.post_tx(&bytes, usize::MAX);
    }

    /// Returns the next packet from the host.
    pub fn recv(&mut self) -> Option<(Header, Vec<u8>)> {
        self.pump();
        self.inbox.pop_front()
    }

    /// Returns the next packet, which must have this operation.
    #[track_caller]
    pub fn expect(&mut self, op: Op) -> (Header, Vec<u8>) {
        let (header, payload) = self.recv().expect("a packet");
        assert_eq!(Op::from_wire(header.op), Some(op), "{header:?}");
        (header, payload)
    }

    /// Asserts that there is no packet.
    #[track_caller]
    pub fn expect_nothing(&mut self) {
        let packet = self.recv();
        assert!(packet.is_none(), "{packet:?}");
    }

    /// A socket of the guest that buffers `window` bytes.
    pub fn socket(&self, guest_port: u32, host_port: u32, window: u32) -> Socket {
        Socket {
            guest_port,
            host_port,
            window,
            sent: 0,
            consumed: 0,
            host_window: 0,
            host_consumed: 0,
        }
    }
}

/// The guest's end of a connection: its ports and credit, no policy.
#[derive(Clone, Copy, Debug)]
pub struct Socket {
    pub guest_port: u32,
    pub host_port: u32,
    pub window: u32,
    pub sent: u32,
    pub consumed: u32,
    pub host_window: u32,
    pub host_consumed: u32,
}

impl Socket {
    /// A socket that answers the host's request.
    pub fn answering(request: &Header, window: u32) -> Self {
        let mut socket = Self {
            guest_port: request.dst_port,
            host_port: request.src_port,
            window,
            sent: 0,
            consumed: 0,
            host_window: 0,
            host_consumed: 0,
        };
        socket.hear(request);
        socket
    }

    pub fn header(&self, op: Op) -> Header {
        Header {
            src_cid: GUEST_CID,
            dst_cid: HOST_CID,
            src_port: self.guest_port,
            dst_port: self.host_port,
            kind: TYPE_STREAM,
            op: op.to_wire(),
            buf_alloc: self.window,
            fwd_cnt: self.consumed,
            ..Header::default()
        }
    }

    pub fn shutdown(&self, shut: ShutdownFlags) -> Header {
        Header {
            flags: shut.flags(),
            ..self.header(Op::Shutdown)
        }
    }

    pub fn data(&mut self, len: usize) -> Header {
        let len = u32::try_from(len).unwrap();
        self.sent = self.sent.wrapping_add(len);
        Header {
            len,
            ..self.header(Op::Data)
        }
    }

    /// Takes the host's credit from one of its packets.
    pub fn hear(&mut self, header: &Header) {
        self.host_window = header.buf_alloc;
        self.host_consumed = header.fwd_cnt;
    }

    /// Bytes that the host's credit still allows.
    pub fn room(&self) -> usize {
        let flying = self.sent.wrapping_sub(self.host_consumed);
        usize::try_from(self.host_window.saturating_sub(flying)).unwrap()
    }

    pub fn is_for(&self, header: &Header) -> bool {
        (header.src_port, header.dst_port) == (self.host_port, self.guest_port)
    }
}
