//! The event threads: a small fixed set that serves the devices of all VMs of the process.
//!
//! Each VM has a place on one thread; each of its devices has one doorbell. A turn of a device does
//! a bounded amount of work, and rings the device's own doorbell when more is left. Between two
//! polls of the doorbells each VM gets at most one turn, no matter how many of its devices are
//! signalled, so that a guest waits for at most one turn of each other guest of its thread. Nothing
//! blocks here. A VM is attached and detached without waking the thread.
//!
//! Lock order: a VM's place, then a transport's lock.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::os::fd::AsRawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::SharedTransport;
use crate::seccomp::{self, Role};
use crate::sigbus::Watch;
use crate::state::Exit;
use crate::threads::{self, LARGE_STACK};
use crate::vcpu::exit_event::ExitEvent;
use crate::virtio::{Doorbell, Progress};
use crate::wake;

/// Maximum number of event threads of a [`Reactor`]; fewer on hosts with fewer processors.
const MAX_THREADS: usize = 2;

/// The event threads could not be used.
#[derive(Debug, thiserror::Error)]
#[error(
    "the event threads could not be started or reached; check ulimit -u, pids.max (systemd: TasksMax), ulimit -n and ulimit -v"
)]
pub struct ReactorError(#[source] pub(crate) Box<dyn std::error::Error + Send + Sync>);

type Timers = Arc<Mutex<BinaryHeap<Reverse<Timer>>>>;

/// Rings a doorbell at the time `at`. The reference is weak: a VM that is gone leaves nothing
/// behind but this entry.
struct Timer {
    at: Instant,
    doorbell: Weak<EventFd>,
}

impl PartialEq for Timer {
    fn eq(&self, other: &Self) -> bool {
        self.at == other.at
    }
}
impl Eq for Timer {}
impl PartialOrd for Timer {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Timer {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.at.cmp(&other.at)
    }
}

/// A VM's devices; `None` once they are no longer served.
type Place = Arc<Mutex<Option<Devices>>>;

struct EventThread {
    epoll: Epoll,
    /// By the place's number, which the events of its doorbells carry (see [`token`]).
    places: Mutex<HashMap<u64, Place>>,
    timers: Timers,
}

impl EventThread {
    fn places(&self) -> MutexGuard<'_, HashMap<u64, Place>> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Bits of an event's data that hold the device's index within its VM.
const DEVICE_BITS: u32 = 16;
/// Maximum number of events per poll.
const EVENTS: usize = 64;

/// Returns the event data of a device's doorbell.
fn token(place: u64, device: usize) -> u64 {
    place << DEVICE_BITS | device as u64
}

fn occupant(place: &Place) -> MutexGuard<'_, Option<Devices>> {
    place.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Event threads of this process; started with the first VM, kept for later ones.
pub(crate) struct Reactor {
    threads: Vec<Arc<EventThread>>,
    /// Number of the next place; numbers are never reused.
    next: AtomicU64,
}

impl Reactor {
    /// Returns the process's event threads: the confined ones, or those for VMs without seccomp
    /// filters. Starts them if needed.
    pub(crate) fn get(confined: bool) -> Result<&'static Reactor, ReactorError> {
        static CONFINED: OnceLock<Reactor> = OnceLock::new();
        static FREE: OnceLock<Reactor> = OnceLock::new();
        static STARTING: Mutex<()> = Mutex::new(());
        let reactor = if confined { &CONFINED } else { &FREE };
        if let Some(reactor) = reactor.get() {
            return Ok(reactor);
        }
        let _one_at_a_time = STARTING.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(reactor) = reactor.get() {
            return Ok(reactor);
        }
        // The waker thread must be started before a thread that needs it is confined.
        wake::start().map_err(|e| ReactorError(Box::new(e)))?;
        let count = std::thread::available_parallelism()
            .map_or(1, usize::from)
            .min(MAX_THREADS);
        // If one cannot be started, the threads before it end, as their `begin` senders are
        // dropped.
        let ready = (0..count)
            .map(|index| start(index, confined))
            .collect::<Result<Vec<_>, _>>()?;
        let begin = |(thread, begin): (Arc<EventThread>, Sender<()>)| {
            // The thread waits for this message.
            let _ = begin.send(());
            thread
        };
        let threads = ready.into_iter().map(begin).collect();
        Ok(reactor.get_or_init(|| Reactor {
            threads,
            next: AtomicU64::new(0),
        }))
    }

    /// Serves `transports` from now until the attachment is dropped.
    pub(crate) fn attach(
        &'static self,
        transports: Vec<SharedTransport>,
        exit_event: Arc<ExitEvent>,
        watch: Arc<Watch>,
    ) -> Result<Attachment, ReactorError> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let turn = usize::try_from(id).unwrap_or(0) % self.threads.len().max(1);
        let Some(thread) = self.threads.get(turn) else {
            return Err(ReactorError("no event thread".into()));
        };
        Attachment::new(Arc::clone(thread), id, transports, exit_event, watch)
    }
}

impl Attachment {
    /// Attaches `transports` to `thread`, as place `id`.
    fn new(
        thread: Arc<EventThread>,
        id: u64,
        transports: Vec<SharedTransport>,
        exit_event: Arc<ExitEvent>,
        watch: Arc<Watch>,
    ) -> Result<Self, ReactorError> {
        let devices: Vec<Device> = transports
            .into_iter()
            .map(|transport| {
                let doorbell = transport.lock().doorbell().clone();
                Device {
                    transport,
                    doorbell,
                    scheduled: None,
                }
            })
            .collect();
        let doorbells: Vec<Doorbell> = devices
            .iter()
            .map(|device| device.doorbell.clone())
            .collect();
        let place = Place::new(Mutex::new(Some(Devices {
            devices,
            last: 0,
            timers: Arc::clone(&thread.timers),
            exit_event,
            watch,
        })));
        thread.places().insert(id, Arc::clone(&place));
        // Dropped on failure, which removes only the doorbells that were registered.
        let mut attachment = Attachment {
            thread,
            id,
            place,
            doorbells: Vec::with_capacity(doorbells.len()),
        };
        for (index, doorbell) in doorbells.into_iter().enumerate() {
            let event = EpollEvent::new(EventSet::IN, token(id, index));
            attachment
                .thread
                .epoll
                .ctl(ControlOperation::Add, doorbell.fd().as_raw_fd(), event)
                .map_err(|e| ReactorError(Box::new(e)))?;
            attachment.doorbells.push(doorbell);
        }
        Ok(attachment)
    }
}

/// Starts a thread and returns it with the sender of the message on which it begins to serve. If
/// the sender is dropped without a message, the thread ends.
fn start(index: usize, confined: bool) -> Result<(Arc<EventThread>, Sender<()>), ReactorError> {
    let thread = Arc::new(EventThread {
        epoll: Epoll::new().map_err(|e| ReactorError(Box::new(e)))?,
        places: Mutex::default(),
        timers: Timers::default(),
    });
    let own = Arc::clone(&thread);
    let (ready, is_ready) = mpsc::channel();
    let (begin, may_begin) = mpsc::channel();
    threads::spawn(&format!("hearth-events{index}"), LARGE_STACK, move || {
        let filter = if confined {
            seccomp::confine(Role::Events)
        } else {
            Ok(())
        };
        let refused = filter.is_err();
        let _ = ready.send(filter);
        if !refused && may_begin.recv().is_ok() {
            serve(&own);
        }
    })
    .map_err(|e| ReactorError(Box::new(e)))?;
    let filter = is_ready.recv().map_err(|e| ReactorError(Box::new(e)))?;
    filter.map_err(|e| ReactorError(Box::new(e)))?;
    Ok((thread, begin))
}

/// Serves the VMs of `thread`; never returns.
fn serve(thread: &EventThread) {
    let mut events = [EpollEvent::default(); EVENTS];
    loop {
        let count = match thread.epoll.wait(ring_due(&thread.timers), &mut events) {
            Ok(count) => count,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => {
                // Only a broken epoll fd gets here; do not spin on it.
                tracing::error!(%error, "event thread");
                std::thread::sleep(Duration::from_millis(10));
                continue;
            }
        };
        take_turns(thread, events.get(..count).unwrap_or_default());
    }
}

/// Gives one turn to each VM with a signalled doorbell. Its other doorbells stay signalled, and are
/// seen at the next poll.
fn take_turns(thread: &EventThread, rung: &[EpollEvent]) {
    let mut tokens = [0; EVENTS];
    let tokens = tokens.get_mut(..rung.len()).unwrap_or_default();
    for (token, event) in tokens.iter_mut().zip(rung) {
        *token = event.data();
    }
    tokens.sort_unstable();
    for of_vm in tokens.chunk_by(|a, b| a >> DEVICE_BITS == b >> DEVICE_BITS) {
        let Some(id) = of_vm.first().map(|token| token >> DEVICE_BITS) else {
            continue;
        };
        // `None` if the VM was detached after the poll.
        let place = thread.places().get(&id).cloned();
        let Some(place) = place else { continue };
        if let Some(devices) = &mut *occupant(&place) {
            let rung = of_vm.iter().map(|token| usize::from(*token as u16));
            devices.take_turn(rung);
        }
    }
}

/// Rings the doorbells whose timers are due. Returns the milliseconds until the next timer, or -1
/// if there is none.
fn ring_due(timers: &Timers) -> i32 {
    let now = Instant::now();
    let mut timers = timers.lock().unwrap_or_else(|e| e.into_inner());
    while let Some(Reverse(timer)) = timers.peek() {
        let left = timer.at.saturating_duration_since(now);
        if !left.is_zero() && timer.doorbell.strong_count() > 0 {
            return i32::try_from(left.as_millis()).map_or(i32::MAX, |ms| ms.saturating_add(1));
        }
        if let Some(Reverse(timer)) = timers.pop()
            && let Some(doorbell) = timer.doorbell.upgrade()
        {
            let _ = doorbell.write(1);
        }
    }
    -1
}

/// A VM's place on an event thread. Dropping it waits until the thread will never touch the VM
/// again (at most for the turn in progress).
pub(crate) struct Attachment {
    thread: Arc<EventThread>,
    id: u64,
    place: Place,
    /// The doorbells that are registered with the thread's epoll.
    doorbells: Vec<Doorbell>,
}

impl std::fmt::Debug for Attachment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Attachment")
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        for doorbell in &self.doorbells {
            let none = EpollEvent::default();
            let fd = doorbell.fd().as_raw_fd();
            if let Err(error) = self.thread.epoll.ctl(ControlOperation::Delete, fd, none) {
                tracing::error!(%error, "a device could not be taken off its event thread");
            }
        }
        self.thread.places().remove(&self.id);
        // Otherwise an event that the thread has already read would find the devices.
        let devices = occupant(&self.place).take();
        drop(devices);
    }
}

struct Device {
    transport: SharedTransport,
    doorbell: Doorbell,
    /// The earliest timer that is set for the device.
    scheduled: Option<Instant>,
}

/// The devices of one VM.
struct Devices {
    devices: Vec<Device>,
    /// Index of the device that had the last turn.
    last: usize,
    timers: Timers,
    exit_event: Arc<ExitEvent>,
    watch: Arc<Watch>,
}

impl Devices {
    /// Gives a turn to one of the devices whose doorbells are signalled (`rung`, in ascending
    /// order): the next one after the device that had the last turn.
    fn take_turn(&mut self, rung: impl Iterator<Item = usize> + Clone) {
        let next = rung.clone().find(|index| *index > self.last);
        let Some(index) = next.or_else(|| rung.clone().next()) else {
            return;
        };
        self.last = index;
        let Some(device) = self.devices.get_mut(index) else {
            return;
        };
        let _ = device.doorbell.answer();
        let serves = self.watch.guard();
        let ran = catch_unwind(AssertUnwindSafe(|| device.transport.turn()));
        drop(serves);
        if self.watch.is_lost() {
            return self.exit_event.report(Exit::BusError);
        }
        match ran {
            Ok((progress, deadline)) => {
                if progress == Progress::More {
                    device.doorbell.ring();
                }
                device.schedule(deadline, &self.timers);
            }
            Err(_) => self
                .exit_event
                .report(Exit::Failed(format!("device {index} panicked"))),
        }
    }
}

impl Device {
    fn schedule(&mut self, deadline: Option<Instant>, timers: &Timers) {
        if self.scheduled.is_some_and(|at| at <= Instant::now()) {
            self.scheduled = None;
        }
        let Some(at) = deadline else { return };
        if self.scheduled.is_none_or(|known| at < known) {
            self.scheduled = Some(at);
            let timer = Timer {
                at,
                doorbell: self.doorbell.downgrade(),
            };
            timers
                .lock()
                .unwrap_or_else(|e| e.into_inner())
                .push(Reverse(timer));
        }
    }
}

/// An event thread that a test drives.
#[cfg(test)]
pub(crate) struct Played(Arc<EventThread>);

#[cfg(test)]
impl Played {
    pub(crate) fn new() -> Self {
        Self(Arc::new(EventThread {
            epoll: Epoll::new().unwrap(),
            places: Mutex::default(),
            timers: Timers::default(),
        }))
    }

    /// Attaches a VM as place `id`.
    pub(crate) fn attach(&self, id: u64, transports: Vec<SharedTransport>) -> Attachment {
        use crate::memory::{GuestRam, MIB};
        use crate::vcpu::control::{RunState, VcpuControl};
        let control = Arc::new(VcpuControl::new(0, RunState::Pause));
        let exit_event = Arc::new(ExitEvent::new(control, Default::default()));
        let watch = Watch::new(GuestRam::new(MIB).unwrap());
        Attachment::new(Arc::clone(&self.0), id, transports, exit_event, watch).unwrap()
    }

    /// Polls the doorbells once, and gives the turns.
    pub(crate) fn look(&self) {
        let mut events = [EpollEvent::default(); EVENTS];
        let count = self.0.epoll.wait(0, &mut events).unwrap();
        take_turns(&self.0, &events[..count]);
    }
}
