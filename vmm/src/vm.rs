//! [`Vm`]: the value that owns a guest.

use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::boot_error::BootError;
use crate::config::VmConfig;
use crate::host::{CpuProfile, Host, is_forked};
use crate::legacy::console::Console;
use crate::prefetch::WorkingSet;
use crate::saved::VmState;
use crate::state::{Exit, VmStatus};
use crate::vcpu::ExitCounters;
use crate::vcpu::control::{PauseGuard, RunState};
use crate::vcpu::idle;
use crate::virtio::DeviceFaults;
use crate::virtio::balloon::Balloon;
use crate::virtio::vsock::VsockHost;
use crate::vm_inner::{CreateTimes, VmInner, teardown_queue};

/// A running guest. Exactly one value owns it; dropping that ends the guest.
///
/// Dropping is safe at any moment and returns at once: it tells the guest's vCPUs to stop, and a
/// thread of the library waits for that and releases all that the VM held. (If 256 VMs are queued
/// for teardown, the drop does this itself.) [`Vm::destroy`] waits for the release.
#[derive(Debug)]
pub struct Vm {
    /// `None` once the VM was torn down, or made a template.
    inner: Mutex<Option<VmInner>>,
    /// Cheap handles that outlive `inner`.
    handles: Handles,
}

#[derive(Debug)]
struct Handles {
    vsock: VsockHost,
    balloon: Balloon,
    console: Console,
    exits: Arc<ExitCounters>,
    exit_event: Arc<crate::vcpu::exit_event::ExitEvent>,
    control: Arc<crate::vcpu::control::VcpuControl>,
    times: CreateTimes,
    profile: CpuProfile,
}

/// Why a VM could not be paused or resumed. See [`Vm::pause`].
#[derive(Debug, thiserror::Error)]
pub enum PauseError {
    /// The VM has ended.
    #[error("the VM has ended: {0}")]
    Ended(Exit),
    /// A vCPU did not stop in time; the VM goes on.
    #[error("a vCPU did not stop in time; the VM goes on")]
    Deadline,
    /// This process was forked from the one that owns the VM.
    #[error("the VM is the parent process's: execute a program after fork(2)")]
    Forked,
}

/// How long a pause waits for the vCPUs, counting only time in which this process could run. vCPUs
/// leave the guest as soon as a signal is delivered.
const PAUSE_BOUND: Duration = Duration::from_secs(5);
/// How long [`Vm::pause_at_rest`] lets the guest run between two checks.
const REST_INTERVAL: Duration = Duration::from_millis(10);
/// How long an emulated guest must not use devices to count as idle. Linux reports free pages 2 s
/// after they were freed (mm/page_reporting.c). In a template captured earlier, that costs each
/// clone its first quarter of a million instructions.
const CALM: Duration = Duration::from_millis(2200);
/// Least time to the next timer of an idle guest: several times as long as a clone takes to answer
/// its first ping on an emulated host.
const QUIET: Duration = Duration::from_millis(300);

impl Vm {
    /// Creates the VM and lets it run. Blocks for a few milliseconds (files are read and copied).
    ///
    /// # Errors
    /// [`BootError`] says what is missing or impossible; nothing is left behind.
    pub fn boot(config: &VmConfig) -> Result<Vm, BootError> {
        let vm = Self::create(config)?;
        vm.handles.control.set(RunState::Run);
        Ok(vm)
    }

    /// Creates the VM without letting it run; [`Vm::resume`] starts it.
    ///
    /// # Errors
    /// As [`Vm::boot`].
    pub fn create(config: &VmConfig) -> Result<Vm, BootError> {
        VmInner::create(config).map(Self::of)
    }

    pub(crate) fn of(inner: VmInner) -> Vm {
        let handles = Handles {
            vsock: inner.vsock.clone(),
            balloon: inner.balloon.clone(),
            console: inner.console.clone(),
            exits: Arc::clone(&inner.exits),
            exit_event: Arc::clone(&inner.exit_event),
            control: Arc::clone(&inner.control),
            times: inner.times,
            profile: inner.hardware.profile,
        };
        Vm {
            inner: Mutex::new(Some(inner)),
            handles,
        }
    }

    /// Restores the rest of the template's state into a prepared VM, and lets it run if `run_state`
    /// says so.
    pub(crate) fn restore(
        &mut self,
        state: &VmState,
        run_state: RunState,
    ) -> Result<(), BootError> {
        Host::get()?;
        let inner = self.inner.get_mut();
        let inner = inner.unwrap_or_else(PoisonError::into_inner);
        let gone = || BootError::State("the VM was torn down".into());
        let inner = inner.as_mut().ok_or_else(gone)?;
        // A vCPU thread that failed to get ready has ended the VM.
        if let Some(exit) = inner.exit_event.known() {
            return Err(BootError::State(exit.to_string()));
        }
        inner.restore(state)?;
        self.handles.times = inner.times;
        if run_state == RunState::Run {
            self.handles.control.set(run_state);
        }
        Ok(())
    }

    /// The VM's memory, for tests.
    #[cfg(test)]
    pub(crate) fn ram(&self) -> Option<crate::memory::GuestRam> {
        self.inner().as_ref().and_then(VmInner::ram).cloned()
    }

    pub(crate) fn inner(&self) -> MutexGuard<'_, Option<VmInner>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns whether the VM is running, paused or ended.
    #[must_use]
    pub fn status(&self) -> VmStatus {
        match self.ended() {
            Some(exit) => VmStatus::Ended(exit),
            None if self.handles.control.run_state() == RunState::Run => VmStatus::Running,
            None => VmStatus::Paused,
        }
    }

    /// How the guest ended, if it did.
    pub(crate) fn ended(&self) -> Option<Exit> {
        self.handles.exit_event.known()
    }

    /// Resolves when the guest has ended. Any number of tasks may wait; the future does not keep
    /// the VM alive. Cancel-safe.
    pub fn exited(&self) -> impl Future<Output = Exit> + Send + 'static {
        self.handles.exit_event.ended()
    }

    /// Stops the vCPUs until [`Vm::resume`]. Returns once none runs. Blocks about as long as a
    /// signal takes to be delivered.
    ///
    /// # Errors
    /// [`PauseError`]; on `Deadline` the VM goes on running.
    pub fn pause(&self) -> Result<(), PauseError> {
        self.run_state(RunState::Pause)?;
        let settled = self.settled();
        if let Err(PauseError::Deadline) = settled {
            self.handles.control.set(RunState::Run);
        }
        settled
    }

    /// As [`Vm::pause`], but first waits until the guest is idle: every vCPU idle, no timer due
    /// soon and, where ring 0 is emulated ([`CpuProfile::Emulated`]), no device used for 2.2 s. A
    /// template then holds no work half done or about to begin, which each of its clones would have
    /// to do. After half of `limit` idle vCPUs are enough; after `limit` the guest is stopped as it
    /// is. Returns whether it was idle. Blocks.
    ///
    /// # Errors
    /// As [`Vm::pause`].
    pub fn pause_at_rest(&self, limit: Duration) -> Result<bool, PauseError> {
        let begin = Instant::now();
        let calm = match self.handles.profile {
            CpuProfile::Emulated => CALM,
            CpuProfile::Native => Duration::ZERO,
        };
        let mut seen = (self.handles.exits.of_devices(), begin);
        loop {
            let used = self.handles.exits.of_devices();
            if used != seen.0 {
                seen = (used, Instant::now());
            }
            let hurry = begin.elapsed() >= limit / 2;
            if hurry || seen.1.elapsed() >= calm {
                self.pause()?;
                let quiet = idle::quiet_for(&self.handles.control);
                let enough = if hurry { Duration::ZERO } else { QUIET };
                if quiet.is_some_and(|quiet| quiet >= enough) || begin.elapsed() >= limit {
                    return Ok(quiet.is_some());
                }
                self.resume()?;
            }
            std::thread::sleep(REST_INTERVAL);
        }
    }

    /// As [`Vm::pause`], but returns at once: the vCPUs stop soon. A later [`Vm::resume`] overrides
    /// it.
    ///
    /// # Errors
    /// [`PauseError::Ended`] when the VM has ended.
    pub fn request_pause(&self) -> Result<(), PauseError> {
        self.run_state(RunState::Pause)
    }

    /// Lets the vCPUs run again.
    ///
    /// # Errors
    /// [`PauseError::Ended`] when the VM has ended.
    pub fn resume(&self) -> Result<(), PauseError> {
        self.run_state(RunState::Run)
    }

    /// Keeps the vCPUs parked while the guard lives, even if the VM is resumed meanwhile.
    pub(crate) fn hold(&self) -> Result<PauseGuard<'_>, PauseError> {
        Self::is_here()?;
        let hold = self.handles.control.hold();
        self.settled().map(|()| hold)
    }

    /// Waits until every vCPU is parked (not at all if they may run).
    fn settled(&self) -> Result<(), PauseError> {
        if !self.handles.control.settle(PAUSE_BOUND) {
            return Err(PauseError::Deadline);
        }
        match self.status() {
            VmStatus::Ended(exit) => Err(PauseError::Ended(exit)),
            _ => Ok(()),
        }
    }

    /// Checks that the VM's threads are in this process.
    fn is_here() -> Result<(), PauseError> {
        match is_forked() {
            true => Err(PauseError::Forked),
            false => Ok(()),
        }
    }

    fn run_state(&self, run_state: RunState) -> Result<(), PauseError> {
        Self::is_here()?;
        // The exit is recorded before the run state becomes `Stop`.
        if let Some(exit) = self.ended() {
            return Err(PauseError::Ended(exit));
        }
        if self.handles.control.set(run_state) {
            return Ok(());
        }
        let exit = self.ended().unwrap_or(Exit::Killed);
        Err(PauseError::Ended(exit))
    }

    /// Ends the guest at once. Does not wait; [`Vm::exited`] resolves right away.
    pub fn kill(&self) {
        if !is_forked() {
            self.handles.exit_event.report(Exit::Killed);
        }
    }

    /// The host's side of the guest's vsock sockets.
    #[must_use]
    pub fn vsock(&self) -> &VsockHost {
        &self.handles.vsock
    }

    /// The host's control of the guest's balloon.
    #[must_use]
    pub fn balloon(&self) -> &Balloon {
        &self.handles.balloon
    }

    /// The guest's output on its serial console (if it was given one).
    #[must_use]
    pub fn console(&self) -> &Console {
        &self.handles.console
    }

    /// How often the vCPUs left the guest.
    #[must_use]
    pub fn exits(&self) -> &ExitCounters {
        &self.handles.exits
    }

    /// How the guest's drivers treated the virtio devices, in the order of their MMIO regions:
    /// vsock, balloon, pmem. Empty once the VM was torn down. For logs only: a guest controls these
    /// numbers.
    #[must_use]
    pub fn device_faults(&self) -> Vec<DeviceFaults> {
        let inner = self.inner();
        let virtio = inner.iter().flat_map(|inner| &inner.bus.virtio);
        virtio.map(|transport| transport.lock().report()).collect()
    }

    /// Guest instructions that KVM's emulator has run so far, over all vCPUs: nearly all of the
    /// guest's kernel on a host that emulates ring 0, a few device accesses elsewhere. Repeatable
    /// within a few percent where times are not. `None` unless [`VmConfig`] asked for it and the
    /// host counts (Linux 5.14).
    #[must_use]
    pub fn emulated_instructions(&self) -> Option<u64> {
        let inner = self.inner();
        let stats = &inner.as_ref()?.stats;
        let counts = stats.iter().map(|vcpu| vcpu.emulated_instructions().ok());
        counts.sum::<Option<u64>>().filter(|_| !stats.is_empty())
    }

    /// Bytes of host memory that hold guest memory not shared with another VM: pages written by a
    /// clone, or all pages touched by a cold VM. Reads the host's page table: about 3 us per MiB.
    ///
    /// # Errors
    /// When `/proc` cannot be read, or the VM was torn down.
    pub fn private_bytes(&self) -> std::io::Result<u64> {
        let inner = self.inner();
        let ram = inner.as_ref().and_then(VmInner::ram);
        let ram = ram.ok_or(std::io::ErrorKind::NotFound)?;
        crate::pagemap::private_bytes(ram)
    }

    /// The pages that this VM, a clone, has touched so far, for
    /// [`Template::prefetch`](crate::Template::prefetch). The VM may be running or paused.
    ///
    /// # Errors
    /// When the host does not report its pages, or the VM was torn down.
    pub fn working_set(&self) -> std::io::Result<WorkingSet> {
        let inner = self.inner();
        let ram = inner.as_ref().and_then(VmInner::ram);
        WorkingSet::of(ram.ok_or(std::io::ErrorKind::NotFound)?)
    }

    /// How long the steps of creating this VM took.
    #[must_use]
    pub fn times(&self) -> CreateTimes {
        self.handles.times
    }

    /// The CPU profile that this VM runs with.
    #[must_use]
    pub fn profile(&self) -> CpuProfile {
        self.handles.profile
    }

    /// Keeps `guard` until nothing of the VM is left, and drops it last, on the thread that tears
    /// the VM down; at once if that has begun. If the VM is [leaked](crate::leaked_vms), the guard
    /// is dropped when that is known.
    ///
    /// Its drop may do anything but block for long: there are few teardown threads.
    pub fn on_drop(&self, guard: impl Send + 'static) {
        if let Some(inner) = &*self.inner() {
            inner.drop_guards.add(Box::new(guard));
        }
    }

    /// Ends the guest and waits until everything that it held is released (bounded: a VM whose vCPU
    /// thread does not stop in 5 s is [leaked](crate::leaked_vms), and released once it has
    /// stopped). Blocks; from async code use `spawn_blocking` or simply drop.
    pub fn destroy(self) {
        self.teardown();
    }

    /// As [`Vm::destroy`], for a VM with another owner. The remaining value still knows how its
    /// guest ended. Does not wait if another thread tears the VM down already; a guard given to
    /// [`Vm::on_drop`] is dropped when that is done.
    pub fn teardown(&self) {
        let inner = self.inner().take();
        drop(inner);
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let inner = self.inner().take();
        if let Some(inner) = inner {
            if is_forked() {
                return drop(inner);
            }
            inner.exit_event.report(Exit::Killed);
            teardown_queue().push(inner);
        }
    }
}
