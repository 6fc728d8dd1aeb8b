//! The pool of threads that run vCPUs, prepared before there is a vCPU: starting and confining a
//! thread takes longer than all the rest of a fork from a prepared VM.
//!
//! A ready thread is a [`PoolThread`]. It comes from the idle threads of the process, if it is like
//! them (confined, not metered, not placed), and goes back there when its VM is gone; at most
//! [`SPARES`] are kept.

use std::os::raw::c_char;
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::thread::Pid;

use super::quota::{Account, Meter};
use super::{Vcpu, VcpuError, kick};
use crate::limits::Limits;
use crate::placement::{Placement, VcpuThread};
use crate::seccomp::{self, Role};
use crate::threads::{self, SMALL_STACK};

/// Maximum number of idle threads, which belong to no VM.
const SPARES: usize = 2;
/// How long a thread that was woken spins for a vCPU that is about to come: as long as it takes to
/// restore a vCPU's state.
const WAKE_WINDOW: Duration = Duration::from_micros(200);
/// The name of a thread that runs no vCPU.
const IDLE: &str = "hearth-spare";

static STOCK: Mutex<Vec<PoolThread>> = Mutex::new(Vec::new());

/// A thread that is ready to run a vCPU. Dropping it ends the thread.
#[derive(Debug)]
pub(crate) struct PoolThread {
    orders: Sender<Order>,
    id: Receiver<Pid>,
    is_spare: bool,
}

enum Order {
    /// A vCPU comes soon.
    Wake,
    Run(Job),
}

/// A vCPU to run, and the handle that goes back to the pool afterwards.
struct Job {
    vcpu: Vcpu,
    thread: PoolThread,
}

impl PoolThread {
    fn new(limits: Limits, account: Option<Arc<Account>>) -> Result<Self, VcpuError> {
        kick::install()?;
        let (orders, todo) = mpsc::channel();
        let (began, id) = mpsc::channel();
        threads::spawn(IDLE, SMALL_STACK, move || {
            // Received only if the thread is to be placed.
            let _ = began.send(VcpuThread::own_id());
            serve(&todo, limits, account.as_deref())
        })
        .map_err(VcpuError::Thread)?;
        Ok(Self {
            orders,
            id,
            is_spare: is_usual(limits),
        })
    }

    /// Calls the placement hook for the thread, which does not go back to the idle threads
    /// afterwards.
    fn place(&mut self, index: usize, placement: &Placement) -> Result<(), VcpuError> {
        self.is_spare = false;
        let ended = |_| VcpuError::Thread(std::io::ErrorKind::BrokenPipe.into());
        let id = self.id.recv().map_err(ended)?;
        let thread = VcpuThread::new(index, id);
        placement.place(thread).map_err(VcpuError::Placement)
    }

    /// Makes the thread run `vcpu`, which parks first if its VM is paused.
    pub(crate) fn run(self, vcpu: Vcpu) -> Result<(), VcpuError> {
        let control = Arc::clone(&vcpu.control);
        control.enter();
        let orders = self.orders.clone();
        let job = Job { vcpu, thread: self };
        orders.send(Order::Run(job)).map_err(|_| {
            control.leave();
            // The thread waits for a job as long as its `PoolThread` exists.
            VcpuError::Thread(std::io::ErrorKind::BrokenPipe.into())
        })
    }

    /// Returns the thread to the idle threads, or ends it if it is not like them or there are
    /// enough.
    pub(crate) fn give_back(self) {
        let mut stock = stock();
        if self.is_spare && stock.len() < SPARES {
            stock.push(self);
        }
    }
}

/// Whether threads for VMs with these limits are all alike. A meter belongs to one VM, and is made
/// before its thread is confined.
fn is_usual(limits: Limits) -> bool {
    limits.seccomp && limits.cpu_percent.is_none()
}

fn stock() -> MutexGuard<'static, Vec<PoolThread>> {
    STOCK.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Threads for the vCPUs of one VM. Unused ones go back to the idle threads.
#[derive(Debug)]
pub(crate) struct VcpuThreads(Vec<PoolThread>);

impl VcpuThreads {
    /// Acquires `vcpus` threads, and calls `placement` for each.
    pub(crate) fn acquire(
        vcpus: u8,
        limits: Limits,
        placement: Option<&Placement>,
    ) -> Result<Self, VcpuError> {
        let mut vcpu_threads = Self(Vec::with_capacity(usize::from(vcpus)));
        let account = limits.cpu_percent.map(Account::new).map(Arc::new);
        for index in 0..usize::from(vcpus) {
            let usual = is_usual(limits) && placement.is_none();
            let spare = usual.then(|| stock().pop()).flatten();
            let mut thread = match spare {
                Some(spare) => spare,
                None => PoolThread::new(limits, account.clone())?,
            };
            if let Some(placement) = placement {
                thread.place(index, placement)?;
            }
            vcpu_threads.0.push(thread);
        }
        // `next` takes from the end, so the first comes last.
        vcpu_threads.0.reverse();
        Ok(vcpu_threads)
    }

    /// Wakes the threads for the vCPUs that come next: waking a thread takes as long as restoring a
    /// vCPU's state.
    pub(crate) fn wake(&self) {
        for thread in &self.0 {
            // If the thread is gone, sending its vCPU reports that.
            let _ = thread.orders.send(Order::Wake);
        }
    }

    /// Takes the next thread.
    pub(crate) fn next(&mut self) -> Result<PoolThread, VcpuError> {
        let none = || VcpuError::Thread(std::io::ErrorKind::NotFound.into());
        self.0.pop().ok_or_else(none)
    }
}

impl Drop for VcpuThreads {
    fn drop(&mut self) {
        self.0.drain(..).for_each(PoolThread::give_back);
    }
}

/// Makes an idle thread for the next VM if there is none, after the last was taken for this one.
/// Makes none where the host has no thread left; the VM that needs one reports that.
pub(crate) fn replenish(limits: Limits) {
    if is_usual(limits) && stock().is_empty() {
        let spare = PoolThread::new(limits, None);
        spare.into_iter().for_each(PoolThread::give_back);
    }
}

/// Runs the vCPUs that come, one after another, until all senders are dropped.
fn serve(todo: &Receiver<Order>, limits: Limits, account: Option<&Account>) {
    yield_to_host();
    let mut meter = match prepare(limits, account) {
        Ok(meter) => meter,
        Err(error) => return refuse(todo, error),
    };
    while let Ok(order) = todo.recv() {
        let job = match order {
            Order::Run(job) => Some(job),
            Order::Wake => soon(todo),
        };
        let Some(Job { vcpu, thread }) = job else {
            continue;
        };
        rename(&format!("hearth-vcpu{}", vcpu.index));
        vcpu.live(meter.as_mut());
        thread.give_back();
    }
}

/// Reports `error` to the VM whose vCPU is sent to this thread.
fn refuse(todo: &Receiver<Order>, error: VcpuError) {
    let job = todo.iter().find_map(|order| match order {
        Order::Run(job) => Some(job),
        Order::Wake => None,
    });
    if let Some(job) = job {
        job.vcpu.refuse(error);
    }
}

/// Waits for the job that was announced; `None` if it does not come within [`WAKE_WINDOW`].
fn soon(todo: &Receiver<Order>) -> Option<Job> {
    let until = Instant::now() + WAKE_WINDOW;
    while Instant::now() < until {
        match todo.try_recv() {
            Ok(Order::Run(job)) => return Some(job),
            Ok(Order::Wake) | Err(TryRecvError::Empty) => std::hint::spin_loop(),
            Err(TryRecvError::Disconnected) => return None,
        }
    }
    None
}

/// Sets up the signal mask, the CPU meter, then the seccomp filter, which must be last.
fn prepare(limits: Limits, account: Option<&Account>) -> Result<Option<Meter<'_>>, VcpuError> {
    kick::let_in()?;
    let meter = account.map(Meter::start).transpose();
    let meter = meter.map_err(VcpuError::Timer)?;
    if limits.seccomp {
        seccomp::confine(Role::Vcpu)?;
    }
    Ok(meter)
}

/// Keeps the calling thread from preempting threads of the embedding program when its guest wakes
/// up, such as the thread that has just resumed it. Threads of `SCHED_BATCH` preempt no normal
/// threads when they wake (sched(7)); their share of the processor is the same. A failure is
/// ignored: the thread works without it.
fn yield_to_host() {
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: a live structure; the call changes this thread's policy and nothing else.
    unsafe { libc::sched_setscheduler(0, libc::SCHED_BATCH, &raw const parameters) };
}

/// Names the calling thread, for tools that list the process's threads.
fn rename(name: &str) {
    let mut bytes: [c_char; 16] = [0; 16];
    let room = bytes.len() - 1;
    for (to, from) in bytes.iter_mut().zip(name.bytes().take(room)) {
        *to = from.cast_signed();
    }
    // SAFETY: the kernel reads up to 16 bytes of the array, the last of which is zero (prctl(2)).
    unsafe { libc::prctl(libc::PR_SET_NAME, bytes.as_ptr(), 0, 0, 0) };
}

/// Renames the calling thread, which runs no vCPU any more.
pub(super) fn becomes_idle() {
    rename(IDLE);
}
