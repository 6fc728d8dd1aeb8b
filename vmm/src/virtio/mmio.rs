//! The virtio-mmio transport (virtio 1.2 section 4.2): registers in front of one device.
//!
//! Until `DRIVER_OK` the driver's settings are plain numbers here. At `DRIVER_OK` they are checked
//! once and become [`Queue`]s that move into the device; no later register write can reach them. A
//! driver that breaks the contract gets `DEVICE_NEEDS_RESET` and is not served until it resets.

use virtio_queue::{Queue, QueueT};

use super::{
    Activation, DeviceFaults, DeviceState, Doorbell, Fault, Interrupt, Progress, QueuePosition,
    VirtioDevice,
};
use crate::memory::GuestRam;

/// Register offsets (virtio 1.2 section 4.2.2).
pub mod register {
    #![allow(missing_docs)]
    pub const MAGIC: u64 = 0x000;
    pub const VERSION: u64 = 0x004;
    pub const DEVICE_ID: u64 = 0x008;
    pub const VENDOR_ID: u64 = 0x00c;
    pub const DEVICE_FEATURES: u64 = 0x010;
    pub const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub const DRIVER_FEATURES: u64 = 0x020;
    pub const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub const QUEUE_SEL: u64 = 0x030;
    pub const QUEUE_NUM_MAX: u64 = 0x034;
    pub const QUEUE_NUM: u64 = 0x038;
    pub const QUEUE_READY: u64 = 0x044;
    pub const QUEUE_NOTIFY: u64 = 0x050;
    pub const INTERRUPT_STATUS: u64 = 0x060;
    pub const INTERRUPT_ACK: u64 = 0x064;
    pub const STATUS: u64 = 0x070;
    pub const QUEUE_DESC_LOW: u64 = 0x080;
    pub const QUEUE_DESC_HIGH: u64 = 0x084;
    pub const QUEUE_DRIVER_LOW: u64 = 0x090;
    pub const QUEUE_DRIVER_HIGH: u64 = 0x094;
    pub const QUEUE_DEVICE_LOW: u64 = 0x0a0;
    pub const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
    pub const SHM_LEN_LOW: u64 = 0x0b0;
    pub const SHM_LEN_HIGH: u64 = 0x0b4;
    pub const SHM_BASE_LOW: u64 = 0x0b8;
    pub const SHM_BASE_HIGH: u64 = 0x0bc;
    pub const CONFIG_GENERATION: u64 = 0x0fc;
    pub const CONFIG: u64 = 0x100;
}

/// Device status bits (virtio 1.2 section 2.1).
pub mod status {
    #![allow(missing_docs)]
    pub const ACKNOWLEDGE: u32 = 1;
    pub const DRIVER: u32 = 2;
    pub const DRIVER_OK: u32 = 4;
    pub const FEATURES_OK: u32 = 8;
    pub const NEEDS_RESET: u32 = 64;
    pub const FAILED: u32 = 128;
}

/// "virt", little endian.
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// "HRTH", little endian.
const VENDOR: u32 = 0x4854_5248;

/// The settings of a queue as the driver has written them so far.
#[derive(Clone, Copy, Debug, Default, serde::Serialize, serde::Deserialize)]
struct QueueSetup {
    size: u16,
    ready: bool,
    desc: u64,
    driver: u64,
    device: u64,
}

/// The saved state of a transport and its device. Untrusted: [`MmioTransport::restore`] masks the
/// features and validates the queues as for a driver's own writes.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct TransportState {
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    interrupt_status: u32,
    queues: Vec<QueueSetup>,
    positions: Vec<Option<QueuePosition>>,
    /// The device's own state.
    pub device: DeviceState,
}

/// The registers of one device; see the module documentation.
pub struct MmioTransport {
    device: Box<dyn VirtioDevice>,
    ram: GuestRam,
    interrupt: Interrupt,
    doorbell: Doorbell,
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    queues: Vec<QueueSetup>,
    faults: u64,
    last_fault: Option<Fault>,
    /// Whether the device must not run, as it would write to guest memory: set while the VM's
    /// state is captured, and after a restore until `begin`.
    asleep: bool,
}

impl std::fmt::Debug for MmioTransport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MmioTransport")
            .field("device_type", &self.device.device_type())
            .field("status", &self.status)
            .field("faults", &self.faults)
            .finish_non_exhaustive()
    }
}

impl MmioTransport {
    /// Puts `device` behind registers. `doorbell` is the device's doorbell.
    #[must_use]
    pub fn new(
        device: Box<dyn VirtioDevice>,
        ram: GuestRam,
        doorbell: Doorbell,
        interrupt: Interrupt,
    ) -> Self {
        let queues = fresh_queues(device.as_ref());
        Self {
            device,
            ram,
            interrupt,
            doorbell,
            status: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
            queues,
            faults: 0,
            last_fault: None,
            asleep: false,
        }
    }

    /// Returns the state for a snapshot. Neither the vCPUs nor the device may run meanwhile.
    #[must_use]
    pub fn save(&self) -> TransportState {
        TransportState {
            status: self.status,
            device_features_sel: self.device_features_sel,
            driver_features_sel: self.driver_features_sel,
            driver_features: self.driver_features,
            queue_sel: self.queue_sel,
            interrupt_status: self.interrupt.status(),
            queues: self.queues.clone(),
            positions: self.device.positions(),
            device: self.device.save(),
        }
    }

    /// Applies `state`; the device must have been restored from its own part. An active device gets
    /// its queues back, but stays asleep until `begin`.
    ///
    /// # Errors
    /// A [`Fault`] when the state is not valid for this device.
    pub fn restore(&mut self, state: &TransportState) -> Result<(), Fault> {
        self.fall_asleep();
        if state.queues.len() != self.queues.len() {
            return Err(Fault::Request("saved state of another device"));
        }
        self.status = state.status;
        self.device_features_sel = state.device_features_sel;
        self.driver_features_sel = state.driver_features_sel;
        self.driver_features = state.driver_features & self.device.features();
        self.queue_sel = state.queue_sel;
        self.queues.clone_from(&state.queues);
        self.interrupt.restore(state.interrupt_status);
        if !self.is_active() {
            return Ok(());
        }
        let mut queues = self.build_queues()?;
        let mut positions = state.positions.iter();
        for queue in queues.iter_mut().flatten() {
            let Some(Some(position)) = positions.next() else {
                return Err(Fault::Request("saved state without a queue's position"));
            };
            queue.set_next_avail(position.next_avail);
            queue.set_next_used(position.next_used);
        }
        self.device.activate(self.activation(queues))
    }

    /// Resumes from the restored state. Notifies an active device, so that a kick from before the
    /// snapshot is not lost. The interrupt controllers must have been restored: see
    /// [`Interrupt::repeat`].
    pub(crate) fn begin(&mut self) {
        self.interrupt.repeat();
        self.asleep = false;
        if self.is_active() {
            self.doorbell.ring();
        }
    }

    fn activation(&self, queues: Vec<Option<Queue>>) -> Activation {
        Activation {
            ram: self.ram.clone(),
            queues,
            features: self.driver_features,
            interrupt: self.interrupt.clone(),
        }
    }

    /// The device's doorbell.
    #[must_use]
    pub fn doorbell(&self) -> &Doorbell {
        &self.doorbell
    }

    /// The device's interrupt line.
    #[must_use]
    pub fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    /// The device status register.
    #[must_use]
    pub fn status(&self) -> u32 {
        self.status
    }

    /// Number of times that the driver broke the contract.
    #[must_use]
    pub fn faults(&self) -> u64 {
        self.faults
    }

    /// The last fault; a reset does not clear it.
    #[must_use]
    pub fn last_fault(&self) -> Option<&Fault> {
        self.last_fault.as_ref()
    }

    /// Returns the device's fault counters for the embedding program.
    pub(crate) fn report(&self) -> DeviceFaults {
        DeviceFaults {
            device: self.device.device_type(),
            needs_reset: self.status & status::NEEDS_RESET != 0,
            count: self.faults,
            last: self.last_fault.as_ref().map(Fault::to_string),
        }
    }

    fn is_active(&self) -> bool {
        self.status & (status::DRIVER_OK | status::NEEDS_RESET) == status::DRIVER_OK
    }

    /// Lets the device do a bounded amount of work; called by the event threads.
    pub fn run(&mut self) -> Progress {
        if self.asleep || self.status & status::NEEDS_RESET != 0 {
            return Progress::Idle;
        }
        match self.device.run() {
            Ok(progress) => progress,
            Err(fault) => {
                self.needs_reset(fault);
                Progress::Idle
            }
        }
    }

    /// Stops the device's work: from now on it writes nothing to guest memory.
    pub(crate) fn fall_asleep(&mut self) {
        self.asleep = true;
    }

    /// Lets the device work again, and notifies it to serve what it missed.
    pub(crate) fn wake(&mut self) {
        self.asleep = false;
        self.doorbell.ring();
    }

    /// The time at which the device must run without a notification; see
    /// [`VirtioDevice::deadline`].
    #[must_use]
    pub fn deadline(&self) -> Option<std::time::Instant> {
        if self.asleep || self.status & status::NEEDS_RESET != 0 {
            return None;
        }
        self.device.deadline()
    }

    /// Records `fault` and tells the driver that only a reset helps (section 2.1.2).
    fn needs_reset(&mut self, fault: Fault) {
        self.faults += 1;
        tracing::debug!(device = self.device.device_type(), %fault, "device needs reset");
        self.status |= status::NEEDS_RESET;
        self.last_fault = Some(fault);
        if self.status & status::DRIVER_OK != 0 {
            self.interrupt.config_changed();
        }
    }

    /// Handles a driver's read at `offset` (0 to 4095); `data` must be zeroed.
    pub fn read(&mut self, offset: u64, data: &mut [u8]) {
        if offset >= register::CONFIG {
            // The configuration space may be read before FEATURES_OK too (section 3.1.1 step 4).
            self.device.read_config(offset - register::CONFIG, data);
            return;
        }
        // Section 4.2.2.2: registers are 32 bits wide and aligned; anything else reads as zero.
        if data.len() == 4 && offset.is_multiple_of(4) {
            data.copy_from_slice(&self.read_register(offset).to_le_bytes());
        }
    }

    fn read_register(&self, offset: u64) -> u32 {
        let queue = self.selected();
        match offset {
            register::MAGIC => MAGIC,
            register::VERSION => VERSION,
            register::DEVICE_ID => self.device.device_type(),
            register::VENDOR_ID => VENDOR,
            register::DEVICE_FEATURES => half(self.device.features(), self.device_features_sel),
            register::QUEUE_NUM_MAX => queue
                .and_then(|i| self.device.queue_sizes().get(i))
                .map_or(0, |size| u32::from(*size)),
            register::QUEUE_READY => queue
                .and_then(|i| self.queues.get(i))
                .map_or(0, |q| u32::from(q.ready)),
            register::STATUS => self.status,
            // No shared memory regions: length and base read as all ones (section 4.2.2).
            register::SHM_LEN_LOW
            | register::SHM_LEN_HIGH
            | register::SHM_BASE_LOW
            | register::SHM_BASE_HIGH => u32::MAX,
            _ => self.interrupt.read_register(offset).unwrap_or(0),
        }
    }

    /// Handles a driver's write at `offset` (0 to 4095).
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        if offset >= register::CONFIG {
            if self.status & status::NEEDS_RESET == 0 {
                self.device.write_config(offset - register::CONFIG, data);
            }
            return;
        }
        match <[u8; 4]>::try_from(data) {
            Ok(bytes) if offset.is_multiple_of(4) => {
                self.write_register(offset, u32::from_le_bytes(bytes));
            }
            _ => self.needs_reset(Fault::Request(
                "register access that is not 32 bits wide and aligned",
            )),
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            register::DEVICE_FEATURES_SEL => self.device_features_sel = value,
            register::DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            register::DRIVER_FEATURES => self.set_driver_features(value),
            register::QUEUE_SEL => self.queue_sel = value,
            register::QUEUE_NOTIFY => self.doorbell.ring(),
            register::STATUS => self.set_status(value),
            register::QUEUE_NUM
            | register::QUEUE_READY
            | register::QUEUE_DESC_LOW
            | register::QUEUE_DESC_HIGH
            | register::QUEUE_DRIVER_LOW
            | register::QUEUE_DRIVER_HIGH
            | register::QUEUE_DEVICE_LOW
            | register::QUEUE_DEVICE_HIGH => self.set_queue(offset, value),
            // `InterruptACK`, or a read-only or unknown register: section 4.2.2 requires that
            // writes to those are ignored.
            _ => {
                self.interrupt.write_register(offset, value);
            }
        }
    }

    fn selected(&self) -> Option<usize> {
        usize::try_from(self.queue_sel)
            .ok()
            .filter(|i| *i < self.queues.len())
    }

    /// Stores feature bits; allowed only after DRIVER and before FEATURES_OK.
    fn set_driver_features(&mut self, value: u32) {
        let negotiating =
            self.status & (status::DRIVER | status::FEATURES_OK | status::FAILED) == status::DRIVER;
        if !negotiating {
            return self.needs_reset(Fault::Request("features written outside negotiation"));
        }
        let shift = match self.driver_features_sel {
            0 => 0,
            1 => 32,
            // Bits beyond 63 do not exist (section 4.2.2): they are not stored, so they do not
            // affect FEATURES_OK.
            _ => return,
        };
        let mask = 0xffff_ffffu64 << shift;
        self.driver_features = (self.driver_features & !mask) | (u64::from(value) << shift);
    }

    fn set_queue(&mut self, offset: u64, value: u32) {
        // After DRIVER_OK the device owns the queues: nothing here may change (section 4.2.2.2).
        let configuring =
            self.status & (status::FEATURES_OK | status::DRIVER_OK) == status::FEATURES_OK;
        if !configuring {
            return self.needs_reset(Fault::Request("queue configured outside its phase"));
        }
        let Some(queue) = self.selected().and_then(|i| self.queues.get_mut(i)) else {
            return;
        };
        if queue.ready && offset != register::QUEUE_READY {
            return self.needs_reset(Fault::Request("a ready queue was changed"));
        }
        match offset {
            register::QUEUE_NUM => match u16::try_from(value) {
                Ok(size) => queue.size = size,
                Err(_) => self.needs_reset(Fault::Request("queue larger than 65535")),
            },
            register::QUEUE_READY => queue.ready = value & 1 == 1,
            register::QUEUE_DESC_LOW => set_low(&mut queue.desc, value),
            register::QUEUE_DESC_HIGH => set_high(&mut queue.desc, value),
            register::QUEUE_DRIVER_LOW => set_low(&mut queue.driver, value),
            register::QUEUE_DRIVER_HIGH => set_high(&mut queue.driver, value),
            register::QUEUE_DEVICE_LOW => set_low(&mut queue.device, value),
            register::QUEUE_DEVICE_HIGH => set_high(&mut queue.device, value),
            _ => {}
        }
    }

    /// Handles a write to the status register (section 3.1.1): bits are only added, in order, and
    /// zero resets.
    fn set_status(&mut self, value: u32) {
        use status::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FAILED, FEATURES_OK, NEEDS_RESET};
        if value == 0 {
            return self.reset();
        }
        let kept = self.status & !NEEDS_RESET;
        let added = value & !self.status & !NEEDS_RESET;
        if value & kept != kept {
            return self.needs_reset(Fault::Request("a status bit was cleared"));
        }
        if added & FAILED != 0 {
            self.status |= FAILED;
            return;
        }
        let after = match added {
            0 => return,
            ACKNOWLEDGE => 0,
            DRIVER => ACKNOWLEDGE,
            FEATURES_OK => ACKNOWLEDGE | DRIVER,
            DRIVER_OK => ACKNOWLEDGE | DRIVER | FEATURES_OK,
            // Firmware and simple drivers set the first two at once.
            both if both == ACKNOWLEDGE | DRIVER => 0,
            _ => return self.needs_reset(Fault::Request("status bits out of order")),
        };
        if kept != after {
            return self.needs_reset(Fault::Request("status bits out of order"));
        }
        match added {
            FEATURES_OK => {
                // Section 2.2.2: the device refuses the features by leaving the bit clear.
                let unknown = self.driver_features & !self.device.features();
                if unknown == 0 && self.driver_features & super::F_VERSION_1 != 0 {
                    self.status |= FEATURES_OK;
                }
            }
            DRIVER_OK => self.activate(),
            bits => self.status |= bits,
        }
    }

    fn activate(&mut self) {
        self.status |= status::DRIVER_OK;
        let activated = self
            .build_queues()
            .and_then(|queues| self.device.activate(self.activation(queues)));
        match activated {
            // Buffers may have been made available before DRIVER_OK.
            Ok(()) => self.doorbell.ring(),
            Err(fault) => self.needs_reset(fault),
        }
    }

    fn build_queues(&self) -> Result<Vec<Option<Queue>>, Fault> {
        let event_idx = self.driver_features & super::F_EVENT_IDX != 0;
        self.queues
            .iter()
            .zip(self.device.queue_sizes())
            .map(|(setup, max)| setup.build(*max, event_idx, &self.ram))
            .collect()
    }

    fn reset(&mut self) {
        if self.status & status::DRIVER_OK != 0 {
            self.device.reset();
        }
        self.status = 0;
        self.device_features_sel = 0;
        self.driver_features_sel = 0;
        self.driver_features = 0;
        self.queue_sel = 0;
        self.queues = fresh_queues(self.device.as_ref());
        self.interrupt.acknowledge(u32::MAX);
    }

    /// Whether the device serves its queues.
    #[must_use]
    pub fn active(&self) -> bool {
        self.is_active()
    }
}

impl QueueSetup {
    fn build(&self, max: u16, event_idx: bool, ram: &GuestRam) -> Result<Option<Queue>, Fault> {
        if !self.ready {
            return Ok(None);
        }
        let mut queue = Queue::new(max)?;
        queue.try_set_size(self.size)?;
        queue.try_set_desc_table_address(vm_memory::GuestAddress(self.desc))?;
        queue.try_set_avail_ring_address(vm_memory::GuestAddress(self.driver))?;
        queue.try_set_used_ring_address(vm_memory::GuestAddress(self.device))?;
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        // Section 2.7: sizes of the three parts; each must lie completely in one region.
        let size = u64::from(self.size);
        let parts = [
            (self.desc, 16 * size),
            (self.driver, 6 + 2 * size),
            (self.device, 6 + 8 * size),
        ];
        if parts.iter().any(|(addr, len)| !ram.contains(*addr, *len)) {
            return Err(Fault::Request("a queue lies outside guest memory"));
        }
        if !queue.is_valid(ram.map()) {
            return Err(Fault::Request("a queue is not valid"));
        }
        Ok(Some(queue))
    }
}

fn fresh_queues(device: &dyn VirtioDevice) -> Vec<QueueSetup> {
    device
        .queue_sizes()
        .iter()
        .map(|max| QueueSetup {
            size: *max,
            ..QueueSetup::default()
        })
        .collect()
}

fn half(features: u64, sel: u32) -> u32 {
    match sel {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

fn set_low(address: &mut u64, value: u32) {
    *address = (*address & !0xffff_ffff) | u64::from(value);
}

fn set_high(address: &mut u64, value: u32) {
    *address = (*address & 0xffff_ffff) | (u64::from(value) << 32);
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use proptest::prelude::*;

    use super::*;
    use crate::memory::MIB;
    use crate::virtio::{F_EVENT_IDX, F_VERSION_1};

    #[derive(Default)]
    struct Seen {
        activations: AtomicU32,
        resets: AtomicU32,
        runs: AtomicU32,
    }

    struct Probe(Arc<Seen>);

    impl VirtioDevice for Probe {
        fn device_type(&self) -> u32 {
            42
        }
        fn features(&self) -> u64 {
            F_VERSION_1 | F_EVENT_IDX | 1
        }
        fn queue_sizes(&self) -> &[u16] {
            &[16, 64]
        }
        fn read_config(&self, offset: u64, data: &mut [u8]) {
            for (i, byte) in (0u64..).zip(data) {
                *byte = if offset.saturating_add(i) < 8 {
                    0xc0
                } else {
                    0
                };
            }
        }
        fn activate(&mut self, activation: Activation) -> Result<(), Fault> {
            assert_eq!(activation.queues.len(), 2);
            self.0.activations.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }
        fn run(&mut self) -> Result<Progress, Fault> {
            self.0.runs.fetch_add(1, Ordering::Relaxed);
            Err(Fault::Request("always"))
        }
        fn reset(&mut self) {
            self.0.resets.fetch_add(1, Ordering::Relaxed);
        }
        fn positions(&self) -> Vec<Option<QueuePosition>> {
            Vec::new()
        }
        fn save(&self) -> DeviceState {
            crate::virtio::balloon::BalloonDevice::new(128, Doorbell::new().unwrap())
                .0
                .save()
        }
    }

    fn transport() -> (MmioTransport, Arc<Seen>) {
        let seen = Arc::new(Seen::default());
        let transport = MmioTransport::new(
            Box::new(Probe(Arc::clone(&seen))),
            GuestRam::new(MIB).unwrap(),
            Doorbell::new().unwrap(),
            Interrupt::new().unwrap(),
        );
        (transport, seen)
    }

    fn set(t: &mut MmioTransport, offset: u64, value: u32) {
        t.write(offset, &value.to_le_bytes());
    }

    fn get(t: &mut MmioTransport, offset: u64) -> u32 {
        let mut data = [0; 4];
        t.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn negotiate(t: &mut MmioTransport, features: u64) {
        set(t, register::STATUS, 1);
        set(t, register::STATUS, 3);
        for sel in [0u32, 1] {
            set(t, register::DRIVER_FEATURES_SEL, sel);
            set(
                t,
                register::DRIVER_FEATURES,
                (features >> (32 * sel)) as u32,
            );
        }
        set(t, register::STATUS, 11);
    }

    fn queue(t: &mut MmioTransport, index: u32, size: u32, at: u32) {
        set(t, register::QUEUE_SEL, index);
        set(t, register::QUEUE_NUM, size);
        set(t, register::QUEUE_DESC_LOW, at);
        set(t, register::QUEUE_DRIVER_LOW, at + 0x1000);
        set(t, register::QUEUE_DEVICE_LOW, at + 0x2000);
        set(t, register::QUEUE_READY, 1);
    }

    fn started() -> (MmioTransport, Arc<Seen>) {
        let (mut t, seen) = transport();
        negotiate(&mut t, F_VERSION_1);
        queue(&mut t, 0, 16, 0x10000);
        set(&mut t, register::STATUS, 15);
        (t, seen)
    }

    #[test]
    fn a_correct_driver_gets_to_driver_ok() {
        let (mut t, seen) = started();
        assert_eq!(get(&mut t, register::STATUS), 15);
        assert_eq!(seen.activations.load(Ordering::Relaxed), 1);
        assert!(t.active() && t.doorbell().answer());
        assert_eq!(get(&mut t, register::MAGIC), 0x7472_6976);
        assert_eq!(get(&mut t, register::DEVICE_ID), 42);
        set(&mut t, register::QUEUE_SEL, 1);
        assert_eq!(get(&mut t, register::QUEUE_NUM_MAX), 64);
        set(&mut t, register::QUEUE_SEL, 2);
        assert_eq!(get(&mut t, register::QUEUE_NUM_MAX), 0);
        assert_eq!(get(&mut t, register::SHM_LEN_LOW), u32::MAX);
    }

    #[test]
    fn features_that_were_not_offered_leave_features_ok_clear() {
        for features in [F_VERSION_1 | 2, 1, 0, F_VERSION_1 << 1] {
            let (mut t, _) = transport();
            negotiate(&mut t, features);
            assert_eq!(get(&mut t, register::STATUS), 3, "{features:#x}");
        }
    }

    #[test]
    fn queue_configuration_after_driver_ok_is_a_fault() {
        for offset in [
            register::QUEUE_NUM,
            register::QUEUE_READY,
            register::QUEUE_DESC_LOW,
        ] {
            let (mut t, _) = started();
            set(&mut t, register::QUEUE_SEL, 0);
            set(&mut t, offset, 0);
            assert_eq!(get(&mut t, register::STATUS), 15 | 64);
            assert_eq!(t.interrupt().status() & 2, 2, "the driver is told");
        }
    }

    #[test]
    fn status_bits_out_of_order_are_a_fault() {
        for value in [4, 8, 2, 5, 15, 12] {
            let (mut t, _) = transport();
            set(&mut t, register::STATUS, value);
            assert_ne!(get(&mut t, register::STATUS) & 64, 0, "{value}");
        }
        let (mut t, _) = started();
        set(&mut t, register::STATUS, 1);
        assert_ne!(get(&mut t, register::STATUS) & 64, 0, "clearing bits");
    }

    #[test]
    fn a_reset_drops_everything_and_the_device_starts_again() {
        let (mut t, seen) = started();
        set(&mut t, register::STATUS, 0);
        assert_eq!(get(&mut t, register::STATUS), 0);
        assert_eq!(seen.resets.load(Ordering::Relaxed), 1);
        set(&mut t, register::QUEUE_SEL, 0);
        assert_eq!(get(&mut t, register::QUEUE_READY), 0);
        negotiate(&mut t, F_VERSION_1);
        queue(&mut t, 0, 16, 0x10000);
        set(&mut t, register::STATUS, 15);
        assert_eq!(seen.activations.load(Ordering::Relaxed), 2);
    }

    #[test]
    fn queues_outside_memory_or_of_bad_size_are_a_fault() {
        for (size, at) in [
            (16, MIB as u32 - 0x2000),
            (3, 0x10000),
            (32, 0x10000),
            (0, 0x10000),
            (16, 0x10001),
        ] {
            let (mut t, seen) = transport();
            negotiate(&mut t, F_VERSION_1);
            queue(&mut t, 0, size, at);
            set(&mut t, register::STATUS, 15);
            assert_ne!(get(&mut t, register::STATUS) & 64, 0, "{size} {at:#x}");
            assert_eq!(seen.activations.load(Ordering::Relaxed), 0);
        }
    }

    #[test]
    fn a_fault_of_the_device_stops_its_service_until_reset() {
        let (mut t, seen) = started();
        assert_eq!(t.run(), Progress::Idle);
        assert_eq!(t.run(), Progress::Idle);
        assert_eq!(seen.runs.load(Ordering::Relaxed), 1);
        assert_eq!((t.faults(), t.status() & 64), (1, 64));
    }

    #[test]
    fn a_device_that_sleeps_does_nothing_and_makes_up_for_it() {
        let (mut t, seen) = started();
        let _ = t.doorbell().answer();
        t.fall_asleep();
        let runs = seen.runs.load(Ordering::Relaxed);
        assert_eq!(t.run(), Progress::Idle);
        assert_eq!(seen.runs.load(Ordering::Relaxed), runs);
        assert_eq!(t.deadline(), None);
        t.wake();
        assert!(t.doorbell().answer(), "it rings for itself");
        t.run();
        assert_eq!(seen.runs.load(Ordering::Relaxed), runs + 1);
    }

    #[test]
    fn odd_widths_read_zero_and_odd_writes_are_faults() {
        let (mut t, _) = started();
        for width in [1, 2, 3, 8] {
            let mut data = vec![0; width];
            t.read(register::MAGIC, &mut data);
            assert!(data.iter().all(|b| *b == 0));
        }
        let mut config = [0; 3];
        t.read(register::CONFIG + 7, &mut config);
        assert_eq!(config, [0xc0, 0, 0]);
        t.write(register::STATUS + 1, &[0, 0, 0, 0]);
        assert_ne!(t.status() & 64, 0);
    }

    proptest! {
        #[test]
        fn any_sequence_of_accesses_is_survived(
            ops in prop::collection::vec((any::<bool>(), 0u64..0x120, 0usize..9, any::<u32>(), 0u32..40), 0..200)
        ) {
            let (mut t, seen) = transport();
            for (write, offset, width, wide, narrow) in ops {
                let value = if wide & 1 == 0 { wide } else { narrow };
                let offset = if wide & 2 == 0 { offset & !3 } else { offset };
                let mut data = vec![0; width];
                for (slot, byte) in data.iter_mut().zip(value.to_le_bytes()) { *slot = byte; }
                if write { t.write(offset, &data) } else { t.read(offset, &mut data) }
                let active = t.active();
                prop_assert!(!active || seen.activations.load(Ordering::Relaxed) > 0);
                t.run();
            }
        }
    }
}
