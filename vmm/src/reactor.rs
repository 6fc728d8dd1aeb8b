//! The event threads: a small fixed set that serves the devices of all VMs of the process.
//!
//! Each VM is one subscriber on one thread; each of its devices is one bell. A run does a bounded
//! amount of work and rings its own bell when there is more, so that every other VM of the thread
//! has its turn in between. Nothing blocks here.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::{Duration, Instant};

use event_manager::{
    EventManager, EventOps, Events, MutEventSubscriber, RemoteEndpoint, SubscriberId,
};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use crate::board::{SharedTransport, lock};
use crate::ending::Ending;
use crate::seccomp::{self, Role};
use crate::state::Exit;
use crate::virtio::{Bell, Progress};

/// Most event threads of a process; fewer on hosts with fewer processors.
const MAX_THREADS: usize = 2;

/// The event threads could not be used.
#[derive(Debug, thiserror::Error)]
#[error("the event threads could not be started or reached; check ulimit -u and ulimit -n")]
pub struct ReactorError(#[source] pub(crate) Box<dyn std::error::Error + Send + Sync>);

type Timers = Arc<Mutex<BinaryHeap<Reverse<Timer>>>>;

/// Rings a bell at a time. Weak: a VM that is gone leaves nothing behind but this.
struct Timer {
    at: Instant,
    bell: Weak<EventFd>,
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

struct EventThread {
    remote: RemoteEndpoint<Devices>,
    timers: Timers,
}

/// The event threads of this process; started with the first VM, kept for the next.
pub(crate) struct Reactor {
    threads: Vec<EventThread>,
    next: AtomicUsize,
}

impl Reactor {
    /// The process's event threads: those that are confined, or those for VMs that shall not be.
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
        let count = std::thread::available_parallelism()
            .map_or(1, usize::from)
            .min(MAX_THREADS);
        let threads = (0..count)
            .map(|index| start(index, confined))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(reactor.get_or_init(|| Reactor {
            threads,
            next: AtomicUsize::new(0),
        }))
    }

    /// Serves `transports` from now until the attachment is dropped.
    pub(crate) fn attach(
        &'static self,
        transports: Vec<SharedTransport>,
        ending: Arc<Ending>,
    ) -> Result<Attachment, ReactorError> {
        let turn = self.next.fetch_add(1, Ordering::Relaxed) % self.threads.len().max(1);
        let Some(thread) = self.threads.get(turn) else {
            return Err(ReactorError("no event thread".into()));
        };
        let devices = Devices {
            devices: transports
                .into_iter()
                .map(|transport| {
                    let bell = lock(&transport).bell().clone();
                    Device {
                        transport,
                        bell,
                        scheduled: None,
                    }
                })
                .collect(),
            timers: Arc::clone(&thread.timers),
            ending,
        };
        let id = Arc::new(OnceLock::new());
        let told = Arc::clone(&id);
        // Not waited for: bells are remembered until the thread listens.
        thread
            .remote
            .fire(move |ops| {
                let _ = told.set(ops.add_subscriber(devices));
            })
            .map_err(|e| ReactorError(Box::new(e)))?;
        Ok(Attachment { thread, id })
    }
}

fn start(index: usize, confined: bool) -> Result<EventThread, ReactorError> {
    let mut manager = EventManager::<Devices>::new().map_err(|e| ReactorError(Box::new(e)))?;
    let remote = manager.remote_endpoint();
    let timers = Timers::default();
    let own = Arc::clone(&timers);
    let (ready, is_ready) = std::sync::mpsc::channel();
    std::thread::Builder::new()
        .name(format!("hearth-events{index}"))
        .spawn(move || {
            let filter = if confined {
                seccomp::confine(Role::Events)
            } else {
                Ok(())
            };
            let refused = filter.is_err();
            let _ = ready.send(filter);
            if refused {
                return;
            }
            loop {
                let timeout = ring_due(&own);
                if let Err(error) = manager.run_with_timeout(timeout) {
                    // Only a broken epoll fd gets here; do not spin on it.
                    tracing::error!(%error, "event thread");
                    std::thread::sleep(Duration::from_millis(10));
                }
            }
        })
        .map_err(|e| ReactorError(Box::new(e)))?;
    let filter = is_ready.recv().map_err(|e| ReactorError(Box::new(e)))?;
    filter.map_err(|e| ReactorError(Box::new(e)))?;
    Ok(EventThread { remote, timers })
}

/// Rings the bells that are due; milliseconds until the next one is, or -1.
fn ring_due(timers: &Timers) -> i32 {
    let now = Instant::now();
    let mut timers = timers.lock().unwrap_or_else(|e| e.into_inner());
    while let Some(Reverse(timer)) = timers.peek() {
        let left = timer.at.saturating_duration_since(now);
        if !left.is_zero() && timer.bell.strong_count() > 0 {
            return i32::try_from(left.as_millis()).map_or(i32::MAX, |ms| ms.saturating_add(1));
        }
        if let Some(Reverse(timer)) = timers.pop()
            && let Some(bell) = timer.bell.upgrade()
        {
            let _ = bell.write(1);
        }
    }
    -1
}

/// A VM's place on an event thread. Dropping it waits until the thread will never touch the VM
/// again (at most for the work that it is doing).
pub(crate) struct Attachment {
    thread: &'static EventThread,
    id: Arc<OnceLock<SubscriberId>>,
}

impl std::fmt::Debug for Attachment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Attachment")
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        let id = Arc::clone(&self.id);
        let removed = self.thread.remote.call_blocking(
            move |ops| -> Result<Option<Devices>, event_manager::Error> {
                // Calls are served in order: the addition has happened.
                id.get().map(|id| ops.remove_subscriber(*id)).transpose()
            },
        );
        if let Err(error) = removed {
            tracing::error!(%error, "a VM could not be taken off its event thread");
        }
    }
}

struct Device {
    transport: SharedTransport,
    bell: Bell,
    /// The earliest timer that is set for it.
    scheduled: Option<Instant>,
}

/// The devices of one VM.
struct Devices {
    devices: Vec<Device>,
    timers: Timers,
    ending: Arc<Ending>,
}

impl MutEventSubscriber for Devices {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        for (index, device) in (0u32..).zip(&self.devices) {
            if let Err(error) = ops.add(Events::with_data(device.bell.fd(), index, EventSet::IN)) {
                tracing::error!(%error, "device without service");
                self.ending.report(Exit::Failed(format!(
                    "a device could not be served: {error}"
                )));
            }
        }
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps<'_>) {
        let index = usize::try_from(events.data()).unwrap_or(usize::MAX);
        let Some(device) = self.devices.get_mut(index) else {
            return;
        };
        let _ = device.bell.answer();
        let run = AssertUnwindSafe(|| {
            let mut transport = lock(&device.transport);
            (transport.run(), transport.deadline())
        });
        match catch_unwind(run) {
            Ok((progress, deadline)) => {
                if progress == Progress::More {
                    device.bell.ring();
                }
                device.schedule(deadline, &self.timers);
            }
            Err(_) => self
                .ending
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
                bell: self.bell.downgrade(),
            };
            timers
                .lock()
                .unwrap_or_else(|e| e.into_inner())
                .push(Reverse(timer));
        }
    }
}
