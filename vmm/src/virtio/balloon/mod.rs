//! The memory balloon (virtio 1.2 section 5.5): the guest hands pages back to the host.
//!
//! Queues: inflate, deflate, statistics, free page reporting. Pages that the guest gives up are
//! released in bounded turns ([`GuestRam::discard`]). Free page hinting is not offered: it can free
//! pages in use.

mod discards;

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestMemoryMmap};

use self::discards::{Discards, PageRanges, TURN_BYTES};
use super::serve::{Budget, Chain, descriptors, serve, take};
use super::{
    Activation, DeviceState, Doorbell, F_EVENT_IDX, F_VERSION_1, Fault, Interrupt, Progress,
    QueuePosition, VirtioDevice,
};
use crate::memory::{GuestRam, MIB, PAGE_SIZE};
use crate::wake::Notice;

/// Device id (virtio 1.2 section 5.5.1).
const DEVICE_TYPE: u32 = 5;
/// Feature bits (virtio 1.2 section 5.5.3).
const F_STATS_VQ: u64 = 1 << 1;
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
const F_REPORTING: u64 = 1 << 5;
const QUEUE_SIZE: u16 = 128;
/// Balloon pages per MiB.
const PAGES_PER_MIB: u32 = (MIB / PAGE_SIZE) as u32;
/// Most bytes of one statistics report that are read; Linux sends 10 to 18 entries of 10 bytes.
const MAX_STATS_BYTES: usize = 640;
/// Guest memory, in MiB, that a balloon must leave.
pub const FLOOR_MIB: u32 = 16;

/// Errors of a balloon operation: refused, or not finished in time.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BalloonError {
    /// The target leaves the guest less than [`FLOOR_MIB`].
    #[error(
        "a balloon of {asked} MiB leaves less than {FLOOR_MIB} MiB of the guest's {memory} MiB"
    )]
    TooLarge {
        /// MiB asked for.
        asked: u32,
        /// MiB of guest memory.
        memory: u32,
    },
    /// The guest did not reach the target in time; the balloon keeps the size it reached.
    #[error("the balloon reached {actual} of {asked} MiB in time; it keeps that")]
    Deadline {
        /// MiB asked for.
        asked: u32,
        /// MiB reached.
        actual: u32,
    },
    /// The guest has no balloon driver, or did not answer.
    #[error("the guest's balloon driver did not answer in time")]
    NoAnswer,
}

/// Memory statistics that the guest reports, in bytes unless stated otherwise; `None` for a value
/// that it does not report (virtio 1.2 section 5.5.6.4).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BalloonStats {
    /// Memory swapped in.
    pub swap_in: Option<u64>,
    /// Memory swapped out.
    pub swap_out: Option<u64>,
    /// Major page faults (a count).
    pub major_faults: Option<u64>,
    /// Minor page faults (a count).
    pub minor_faults: Option<u64>,
    /// Unused memory.
    pub free: Option<u64>,
    /// All memory of the guest.
    pub total: Option<u64>,
    /// Memory available to programs without swapping.
    pub available: Option<u64>,
    /// Page cache.
    pub disk_caches: Option<u64>,
}

#[derive(Debug, Default)]
struct Shared {
    /// Balloon size that the host asks for, in pages.
    target: AtomicU32,
    /// Balloon size that the guest reports, in pages.
    actual: AtomicU32,
    /// The host asked for statistics.
    stats_wanted: AtomicBool,
    stats: Mutex<Option<BalloonStats>>,
    /// Posted when `actual` or `stats` changes.
    changed: Notice,
    /// Bytes released by free page reporting.
    reported: AtomicU64,
}

/// The host's handle of a guest's balloon. Cheap to clone; does not keep the VM alive.
#[derive(Clone, Debug)]
pub struct Balloon {
    shared: Arc<Shared>,
    doorbell: Doorbell,
    memory_mib: u32,
}

impl Balloon {
    /// Asks the guest for a balloon of `mib` MiB; does not wait.
    ///
    /// # Errors
    /// [`BalloonError::TooLarge`] when less than [`FLOOR_MIB`] would be left.
    pub fn set_target(&self, mib: u32) -> Result<(), BalloonError> {
        if mib > self.memory_mib.saturating_sub(FLOOR_MIB) {
            return Err(BalloonError::TooLarge {
                asked: mib,
                memory: self.memory_mib,
            });
        }
        self.shared
            .target
            .store(mib * PAGES_PER_MIB, Ordering::SeqCst);
        self.doorbell.ring();
        Ok(())
    }

    /// The target in MiB.
    #[must_use]
    pub fn target(&self) -> u32 {
        self.shared.target.load(Ordering::SeqCst) / PAGES_PER_MIB
    }

    /// The balloon's size in MiB, as the guest reports it. A false value harms only the guest.
    #[must_use]
    pub fn actual(&self) -> u32 {
        self.shared.actual.load(Ordering::SeqCst) / PAGES_PER_MIB
    }

    /// Sets the target and waits until the guest has reached it. When `within` passes first, the
    /// target becomes the size that was reached, so that the guest stops there. Cancel-safe: the
    /// target stays.
    ///
    /// # Errors
    /// [`BalloonError::TooLarge`], or [`BalloonError::Deadline`] with the size that was reached.
    pub async fn resize(&self, mib: u32, within: Duration) -> Result<(), BalloonError> {
        self.set_target(mib)?;
        let pages = mib * PAGES_PER_MIB;
        let is_there = || (self.shared.actual.load(Ordering::SeqCst) == pages).then_some(());
        let reached = self.shared.changed.until(is_there);
        if tokio::time::timeout(within, reached).await.is_ok() {
            return Ok(());
        }
        let actual = self.shared.actual.load(Ordering::SeqCst);
        self.shared.target.store(actual, Ordering::SeqCst);
        self.doorbell.ring();
        Err(BalloonError::Deadline {
            asked: mib,
            actual: actual / PAGES_PER_MIB,
        })
    }

    /// Asks the guest for fresh statistics. Cancel-safe.
    ///
    /// # Errors
    /// [`BalloonError::NoAnswer`] when the guest does not answer within `within`.
    pub async fn stats(&self, within: Duration) -> Result<BalloonStats, BalloonError> {
        *self.shared.stats() = None;
        self.shared.stats_wanted.store(true, Ordering::SeqCst);
        self.doorbell.ring();
        let answered = self.shared.changed.until(|| *self.shared.stats());
        tokio::time::timeout(within, answered)
            .await
            .map_err(|_| BalloonError::NoAnswer)
    }

    /// MiB that free page reporting has returned to the host so far.
    #[must_use]
    pub fn reported(&self) -> u32 {
        let mib = self.shared.reported.load(Ordering::Relaxed) / MIB;
        u32::try_from(mib).unwrap_or(u32::MAX)
    }
}

impl Shared {
    fn stats(&self) -> MutexGuard<'_, Option<BalloonStats>> {
        self.stats.lock().unwrap_or_else(|e| e.into_inner())
    }
}

struct Active {
    ram: GuestRam,
    interrupt: Interrupt,
    inflate: Discards,
    deflate: Queue,
    stats: Option<Queue>,
    reporting: Option<Discards>,
    /// Head of the statistics buffer that the device holds until it wants new statistics.
    stats_held: Option<u16>,
}

/// The balloon device.
pub struct BalloonDevice {
    shared: Arc<Shared>,
    /// `num_pages` in the guest's configuration space.
    shown_target: u32,
    /// Head of a restored statistics buffer, until activation takes it.
    stats_held: Option<u16>,
    active: Option<Active>,
}

impl std::fmt::Debug for BalloonDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BalloonDevice")
            .field("shown_target", &self.shown_target)
            .finish_non_exhaustive()
    }
}

/// The saved state of a balloon; sizes in pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct BalloonState {
    target: u32,
    actual: u32,
    shown_target: u32,
    stats_held: Option<u16>,
}

impl BalloonDevice {
    /// Creates a balloon that continues from `state` once it is activated with the queues that were
    /// saved with it. A false state cannot harm the host: the sizes are only shown to the guest.
    #[must_use]
    pub fn restore(state: &BalloonState, memory_mib: u32, doorbell: Doorbell) -> (Self, Balloon) {
        let (mut device, balloon) = Self::new(memory_mib, doorbell);
        device.shared.target.store(state.target, Ordering::SeqCst);
        device.shared.actual.store(state.actual, Ordering::SeqCst);
        device.shown_target = state.shown_target;
        device.stats_held = state.stats_held;
        (device, balloon)
    }

    /// Creates a balloon with target 0 for a guest of `memory_mib` MiB.
    #[must_use]
    pub fn new(memory_mib: u32, doorbell: Doorbell) -> (Self, Balloon) {
        let shared = Arc::new(Shared::default());
        let device = Self {
            shared: Arc::clone(&shared),
            shown_target: 0,
            stats_held: None,
            active: None,
        };
        (
            device,
            Balloon {
                shared,
                doorbell,
                memory_mib,
            },
        )
    }

    fn show_target(&mut self) {
        let target = self.shared.target.load(Ordering::SeqCst);
        if self.shown_target != target
            && let Some(active) = &self.active
        {
            self.shown_target = target;
            active.interrupt.config_changed();
        }
    }
}

impl VirtioDevice for BalloonDevice {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        F_VERSION_1 | F_EVENT_IDX | F_STATS_VQ | F_DEFLATE_ON_OOM | F_REPORTING
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; 4]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // struct virtio_balloon_config: num_pages, actual (section 5.5.4); the rest belongs to
        // features that are not offered.
        let mut config = [0u8; 8];
        let (num_pages, actual) = config.split_at_mut(4);
        num_pages.copy_from_slice(&self.shown_target.to_le_bytes());
        actual.copy_from_slice(&self.shared.actual.load(Ordering::SeqCst).to_le_bytes());
        for (i, byte) in (0u64..).zip(data) {
            let at = usize::try_from(offset.saturating_add(i)).unwrap_or(usize::MAX);
            *byte = config.get(at).copied().unwrap_or(0);
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        // The driver may write `actual` only.
        if offset == 4
            && let Ok(bytes) = <[u8; 4]>::try_from(data)
        {
            self.shared
                .actual
                .store(u32::from_le_bytes(bytes), Ordering::SeqCst);
            self.shared.changed.post();
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), Fault> {
        let Activation {
            ram,
            queues,
            features,
            interrupt,
        } = activation;
        // Queues of features that were not negotiated have no queue index (section 5.5.2 and Linux,
        // drivers/virtio/virtio_balloon.c: init_vqs).
        let mut queues = queues.into_iter();
        let mut next = |wanted: bool| {
            if wanted {
                queues.next().flatten()
            } else {
                None
            }
        };
        let inflate = next(true).ok_or(Fault::Request("balloon without an inflate queue"))?;
        let deflate = next(true).ok_or(Fault::Request("balloon without a deflate queue"))?;
        let stats = next(features & F_STATS_VQ != 0);
        let reporting = next(features & F_REPORTING != 0);
        // A restored head may lie outside the queue.
        let held = self.stats_held.take().filter(|head| {
            let size = stats.as_ref().map(Queue::size);
            size.is_some_and(|size| *head < size)
        });
        self.active = Some(Active {
            ram,
            interrupt,
            inflate: Discards::new(inflate),
            deflate,
            stats,
            reporting: reporting.map(Discards::new),
            stats_held: held,
        });
        Ok(())
    }

    fn run(&mut self) -> Result<Progress, Fault> {
        self.show_target();
        let Some(active) = &mut self.active else {
            return Ok(Progress::Idle);
        };
        let mut budget = Budget::of_turn(TURN_BYTES);
        active.serve_stats(&self.shared, &mut budget)?;
        let Active {
            ram,
            inflate,
            deflate,
            reporting,
            interrupt,
            ..
        } = active;
        inflate.serve(ram, interrupt, &mut budget, PageRanges::of_pages)?;
        // Deflated pages come back when the guest touches them.
        serve(deflate, ram, interrupt, &mut budget, |_, _| Ok(Some(0)))?;
        if let Some(reporting) = reporting {
            let bytes = reporting.serve(ram, interrupt, &mut budget, PageRanges::of_ranges)?;
            self.shared.reported.fetch_add(bytes, Ordering::Relaxed);
        }
        Ok(budget.progress())
    }

    fn reset(&mut self) {
        self.active = None;
        self.shown_target = 0;
        self.shared.actual.store(0, Ordering::SeqCst);
        self.shared.changed.post();
    }

    fn positions(&self) -> Vec<Option<QueuePosition>> {
        let Some(active) = &self.active else {
            return Vec::new();
        };
        let stats = active.stats.as_ref().map(QueuePosition::of);
        let reporting = active.reporting.as_ref().map(Discards::position);
        let always = [
            active.inflate.position(),
            QueuePosition::of(&active.deflate),
        ];
        let positions = always.into_iter().chain(stats).chain(reporting);
        positions.map(Some).collect()
    }

    fn save(&self) -> DeviceState {
        DeviceState::Balloon(BalloonState {
            target: self.shared.target.load(Ordering::SeqCst),
            actual: self.shared.actual.load(Ordering::SeqCst),
            shown_target: self.shown_target,
            stats_held: self.active.as_ref().and_then(|active| active.stats_held),
        })
    }
}

impl Active {
    /// Serves the statistics queue, which works backwards: the driver offers a filled buffer; the
    /// device keeps it and returns it when it wants new statistics (section 5.5.6.3).
    fn serve_stats(&mut self, shared: &Shared, budget: &mut Budget) -> Result<(), Fault> {
        let Some(queue) = &mut self.stats else {
            return Ok(());
        };
        let mem = self.ram.map();
        let mut promised = false;
        loop {
            while !budget.is_spent() {
                let Some(chain) = take(queue, mem)? else {
                    if promised {
                        return Err(Fault::Gone);
                    }
                    break;
                };
                promised = false;
                budget.spend_chain();
                if self.stats_held.is_some() {
                    return Err(Fault::Request("a second statistics buffer"));
                }
                self.stats_held = Some(chain.head_index());
                let stats = parse_stats(mem, chain)?;
                // The first buffer comes unasked, with statistics from driver start.
                *shared.stats() = Some(stats);
                shared.changed.post();
            }
            // Without this the driver would not kick for its next report (EVENT_IDX).
            if budget.is_spent() || !queue.enable_notification(mem)? {
                break;
            }
            promised = true;
        }
        if let Some(head) = self.stats_held
            && shared.stats_wanted.swap(false, Ordering::SeqCst)
        {
            self.stats_held = None;
            *shared.stats() = None;
            queue.add_used(mem, head, 0)?;
            if queue.needs_notification(mem)? {
                self.interrupt.used();
            }
        }
        Ok(())
    }
}

/// Parses `struct virtio_balloon_stat { le16 tag; le64 val; }`, packed. Unknown tags are skipped.
fn parse_stats(mem: &GuestMemoryMmap, chain: Chain<'_>) -> Result<BalloonStats, Fault> {
    let mut bytes = Vec::new();
    for descriptor in descriptors(chain).filter(|d| !d.is_write_only()) {
        let room = MAX_STATS_BYTES.saturating_sub(bytes.len());
        let mut part = vec![0u8; (descriptor.len() as usize).min(room)];
        mem.read_slice(&mut part, descriptor.addr())?;
        bytes.append(&mut part);
    }
    let mut stats = BalloonStats::default();
    for entry in bytes.as_chunks::<10>().0 {
        let [t0, t1, value @ ..] = *entry;
        let value = Some(u64::from_le_bytes(value));
        match u16::from_le_bytes([t0, t1]) {
            0 => stats.swap_in = value,
            1 => stats.swap_out = value,
            2 => stats.major_faults = value,
            3 => stats.minor_faults = value,
            4 => stats.free = value,
            5 => stats.total = value,
            6 => stats.available = value,
            7 => stats.disk_caches = value,
            _ => {}
        }
    }
    Ok(stats)
}

#[cfg(test)]
mod tests;
