//! vCPU threads: they run the guest, handle its exits, and park when the run state ([`control`])
//! says so.

pub(crate) mod control;
pub(crate) mod exit_event;
pub(crate) mod idle;
pub(crate) mod kick;
mod notable;
pub(crate) mod quota;
pub(crate) mod stats;
pub(crate) mod thread_pool;
pub(crate) mod xsave;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use kvm_ioctls::{VcpuExit, VcpuFd};

use self::control::VcpuControl;
use self::exit_event::ExitEvent;
use self::quota::Meter;
use self::xsave::Request;
use crate::bus::DeviceBus;
use crate::immediate_exit::Running;
use crate::kvm::{KvmError, run_patiently};
use crate::seccomp::SeccompError;
use crate::sigbus::{self, Watch};
use crate::state::{Exit, InternalError};

/// Why a vCPU thread could not be started.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// The handler of the kick signal, or that of SIGBUS, could not be installed, or the signal not
    /// be unblocked.
    #[error("the signals of a vCPU thread could not be handled")]
    Signal(#[source] std::io::Error),
    /// The embedding program handles the signal that kicks vCPUs: it has replaced the library's
    /// handler, or has handlers for all usable signals.
    #[error(
        "signal {0} has a handler of the host program's; leave the one to Hearth that kick_signal() names"
    )]
    SignalTaken(i32),
    /// The host has no thread left.
    #[error(
        "the host refused a vCPU thread; check ulimit -u, pids.max (systemd: TasksMax), kernel.threads-max and ulimit -v"
    )]
    Thread(#[source] std::io::Error),
    /// The timer that meters processor time could not be made.
    #[error("the host refused a timer for the processor quota; raise ulimit -i: {0}")]
    Timer(std::io::Error),
    /// The embedding program's hook did not place the thread.
    #[error("the program's hook, place_vcpus, did not place a vCPU thread")]
    Placement(#[source] std::io::Error),
    /// The thread could not be confined.
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
    /// KVM makes a thread of its own when a VM first runs (since Linux 6.13), and the host has none
    /// left.
    #[error(
        "the host refused KVM a thread for the VM; check ulimit -u and pids.max (systemd: TasksMax)"
    )]
    KvmThread(#[source] std::io::Error),
    /// KVM refuses to run the vCPU.
    #[error("KVM refused to run the vCPU")]
    Run(#[source] KvmError),
}

impl From<VcpuError> for Exit {
    fn from(error: VcpuError) -> Self {
        match error {
            VcpuError::KvmThread(_) => Self::NoThread,
            VcpuError::Run(error) => Self::Failed(format!("{error}: {}", error.source)),
            error => Self::Failed(error.to_string()),
        }
    }
}

/// How often a VM's vCPUs left the guest, by kind. Relaxed counters: exact once the VM is paused.
#[derive(Debug, Default)]
pub struct ExitCounters {
    /// Port reads and writes.
    pub pio: AtomicU64,
    /// Memory-mapped device accesses.
    pub mmio: AtomicU64,
    /// Kicks and other signals.
    pub interrupted: AtomicU64,
    /// Requests of the guest's kernel to save or load a program's registers, where ring 0 is
    /// emulated.
    pub registers: AtomicU64,
    /// Bus locks, which stop the memory of all processors, where the host reports them; after each
    /// the vCPU is idle for a millisecond. They are noted at exits of any kind, and therefore not
    /// part of the sum.
    pub bus_locks: AtomicU64,
    /// See [`ExitCounters::first`].
    first: OnceLock<Instant>,
}

impl ExitCounters {
    /// Returns the number of accesses to devices.
    pub(crate) fn of_devices(&self) -> u64 {
        self.pio.load(Ordering::Relaxed) + self.mmio.load(Ordering::Relaxed)
    }

    /// Returns when the guest first needed its host (any exit but an interruption). The vCPU thread
    /// reads the clock before it handles the exit. For measurements.
    #[must_use]
    pub fn first(&self) -> Option<Instant> {
        self.first.get().copied()
    }

    /// Returns the sum over all kinds.
    #[must_use]
    pub fn total(&self) -> u64 {
        let all = [&self.pio, &self.mmio, &self.interrupted, &self.registers];
        all.iter().map(|c| c.load(Ordering::Relaxed)).sum()
    }
}

/// Maximum number of exits for one instruction's access: 64 bytes in pieces of 8, twice, and a
/// margin.
const PARTS_OF_AN_ACCESS: u32 = 32;

/// A vCPU, and the parts of its VM that its thread uses.
pub(crate) struct Vcpu {
    pub(crate) index: usize,
    /// `None` once the thread runs it.
    pub(crate) fd: Option<VcpuFd>,
    pub(crate) bus: Arc<DeviceBus>,
    pub(crate) control: Arc<VcpuControl>,
    pub(crate) exit_event: Arc<ExitEvent>,
    pub(crate) exits: Arc<ExitCounters>,
    /// Receives whether the vCPU can run. If `None`, a vCPU that cannot run ends its VM.
    pub(crate) begun: Option<Sender<Result<(), VcpuError>>>,
    pub(crate) watch: Arc<Watch>,
}

enum Step {
    Continue,
    /// A signal came: the run state and the meter must be checked.
    Kicked,
    Interrupted,
    End(Exit),
}

impl Vcpu {
    /// Runs the vCPU until its VM is stopped; parks first if the VM is paused. Afterwards the
    /// calling thread holds nothing of the VM.
    fn live(mut self, meter: Option<&mut Meter<'_>>) {
        let control = Arc::clone(&self.control);
        if let (Some(slot), Some(mut fd)) = (control.slot(self.index), self.fd.take()) {
            let begun = self.begun.take();
            let run = AssertUnwindSafe(|| {
                let _serves = self.watch.guard();
                slot.kicker.enlist();
                let warm = warm_up(&mut fd);
                let can_run = warm.is_ok();
                tell(begun, &self.exit_event, warm);
                if can_run {
                    self.run_until_stopped(fd, meter);
                }
            });
            if catch_unwind(run).is_err() {
                let panicked = Exit::Failed("a vCPU thread panicked".into());
                self.exit_event.report(panicked);
            }
            slot.kicker.discharge();
        }
        // The device bus holds guest memory, which must be released before a wait for this thread
        // ends.
        drop(self);
        thread_pool::becomes_idle();
        control.leave();
    }

    /// Reports that the vCPU's thread could not be prepared.
    fn refuse(mut self, error: VcpuError) {
        let control = Arc::clone(&self.control);
        tell(self.begun.take(), &self.exit_event, Err(error));
        drop(self);
        control.leave();
    }

    fn run_until_stopped(&self, mut fd: VcpuFd, mut meter: Option<&mut Meter<'_>>) {
        let Self {
            index,
            bus,
            control,
            exit_event,
            exits,
            watch,
            ..
        } = self;
        let mut has_run = false;
        loop {
            if control.is_closed() {
                if has_run {
                    prepare_to_wait(&mut fd, bus, exit_event, exits);
                }
                match control.pass(*index, fd) {
                    Some(back) => fd = back,
                    None => return,
                }
            }
            has_run = true;
            let running = Running::new(&mut fd);
            let step = loop {
                // Checked after `running` is set: an earlier kick leaves no trace but the changed
                // run state.
                if control.is_closed() {
                    break Step::Interrupted;
                }
                // As above: an earlier SIGBUS is noted in `watch`, a later one makes the run
                // return.
                if watch.is_lost() {
                    break Step::End(Exit::BusError);
                }
                let ran = run_patiently(|| run_once(&mut fd, bus, exits));
                if watch.is_lost() {
                    // Regardless of the result of the run.
                    break Step::End(Exit::BusError);
                }
                match ran {
                    Ok(Step::Continue) => {
                        if notable::locked_the_bus(fd.get_kvm_run()) {
                            exits.bus_locks.fetch_add(1, Ordering::Relaxed);
                            control.rest(Instant::now() + notable::REST);
                        }
                    }
                    Ok(Step::Kicked) => {
                        // It may take several periods to pay off a debt.
                        while let Some(until) = meter.as_mut().and_then(|meter| meter.charge()) {
                            control.rest(until);
                            if control.is_closed() {
                                break;
                            }
                        }
                    }
                    Ok(step) => break step,
                    Err(e) if e.errno() == libc::EFAULT => break Step::End(Exit::BusError),
                    Err(e) => {
                        let e = std::io::Error::from_raw_os_error(e.errno());
                        break Step::End(Exit::Failed(format!("KVM_RUN failed: {e}")));
                    }
                }
            };
            drop(running);
            if let Step::End(exit) = step {
                // Sets the run state to stop; the next iteration ends this thread.
                exit_event.report(exit);
            }
        }
    }
}

/// Reports whether a vCPU can run: to `begun` if that is given; otherwise a vCPU that cannot run
/// ends its VM.
fn tell(
    begun: Option<Sender<Result<(), VcpuError>>>,
    exit_event: &ExitEvent,
    can_run: Result<(), VcpuError>,
) {
    match (begun, can_run) {
        (Some(begun), can_run) => {
            // If the receiver is gone, the VM is being torn down.
            let _ = begun.send(can_run);
        }
        (None, Err(error)) => exit_event.report(error.into()),
        (None, Ok(())) => {}
    }
}

/// Enters KVM and leaves it before the guest runs: KVM makes what a running VM needs (on some hosts
/// a thread) before a caller waits for the guest or continues without waiting.
fn warm_up(fd: &mut VcpuFd) -> Result<(), VcpuError> {
    fd.set_kvm_immediate_exit(1);
    let warm = is_warm(|| fd.run().map(drop));
    fd.set_kvm_immediate_exit(0);
    warm
}

/// Returns whether the vCPU can run, judged by `run`, a `KVM_RUN` that is to leave at once.
fn is_warm(run: impl FnMut() -> Result<(), kvm_ioctls::Error>) -> Result<(), VcpuError> {
    match run_patiently(run) {
        Ok(()) => Ok(()),
        Err(e) => match e.errno() {
            // The expected result.
            libc::EINTR => Ok(()),
            libc::EAGAIN => Err(VcpuError::KvmThread(std::io::Error::from_raw_os_error(
                libc::EAGAIN,
            ))),
            _ => Err(VcpuError::Run(KvmError::of("KVM_RUN")(e))),
        },
    }
}

/// Brings the vCPU to a point at which its state is complete, without running the guest: finishes
/// an exit that KVM has not completed (port reads, MMIO). Also tells the guest that it is about to
/// be paused, so that its watchdogs do not fire (`KVM_KVMCLOCK_CTRL`).
fn prepare_to_wait(fd: &mut VcpuFd, bus: &DeviceBus, exit_event: &ExitEvent, exits: &ExitCounters) {
    // An access over two pages, or of more than 8 bytes, exits once for each part.
    for _ in 0..PARTS_OF_AN_ACCESS {
        fd.set_kvm_immediate_exit(1);
        match run_once(fd, bus, exits) {
            Ok(Step::Continue) => {}
            Ok(Step::End(exit)) => {
                exit_event.report(exit);
                break;
            }
            // EINTR is the expected result: all is complete. The next run reports any other error
            // again.
            Ok(Step::Kicked | Step::Interrupted) | Err(_) => break,
        }
    }
    fd.set_kvm_immediate_exit(0);
    // Refused where the guest has no kvmclock: then it need not be told.
    let _ = fd.kvmclock_ctrl();
}

fn run_once(
    fd: &mut VcpuFd,
    bus: &DeviceBus,
    exits: &ExitCounters,
) -> Result<Step, kvm_ioctls::Error> {
    let count = |counter: &AtomicU64| counter.fetch_add(1, Ordering::Relaxed);
    let exit = match sigbus::in_guest(|| fd.run()) {
        Ok(exit) => exit,
        Err(e) if e.errno() == libc::EINTR => {
            count(&exits.interrupted);
            fd.set_kvm_immediate_exit(0);
            return Ok(Step::Kicked);
        }
        Err(e) => return Err(e),
    };
    exits.first.get_or_init(Instant::now);
    match exit {
        VcpuExit::IoOut(port, data) => {
            if let Some(ram) = &bus.registers
                && let Some(request) = Request::of(port, data)
            {
                count(&exits.registers);
                let answer = request.answer(fd, ram);
                return Ok(
                    answer.map_or_else(|error| Step::End(failed(&error)), |()| Step::Continue)
                );
            }
            count(&exits.pio);
            if let Some(end) = bus.pio_write(port, data) {
                return Ok(Step::End(end));
            }
        }
        VcpuExit::IoIn(port, data) => {
            count(&exits.pio);
            bus.pio_read(port, data);
        }
        VcpuExit::MmioRead(address, data) => {
            count(&exits.mmio);
            bus.mmio_read(address, data);
        }
        VcpuExit::MmioWrite(address, data) => {
            count(&exits.mmio);
            bus.mmio_write(address, data);
        }
        VcpuExit::Shutdown => return Ok(Step::End(Exit::TripleFault)),
        VcpuExit::InternalError => return Ok(Step::End(Exit::InternalError(internal_error(fd)))),
        VcpuExit::FailEntry(reason, _) => {
            return Ok(Step::End(Exit::Failed(format!(
                "the processor refused to enter the guest (reason {reason:#x})"
            ))));
        }
        VcpuExit::MemoryFault { .. } => return Ok(Step::End(Exit::BusError)),
        VcpuExit::Hlt => return Ok(Step::End(Exit::Halt)),
        VcpuExit::Intr | VcpuExit::IrqWindowOpen => {
            count(&exits.interrupted);
            return Ok(Step::Kicked);
        }
        VcpuExit::Unsupported(reason) => return Ok(notable::step(reason, fd.get_kvm_run())),
        other => {
            return Ok(Step::End(Exit::Failed(format!(
                "unexpected exit {other:?}"
            ))));
        }
    }
    Ok(Step::Continue)
}

/// Returns the exit for an error of the library, with its causes.
fn failed(error: &dyn std::error::Error) -> Exit {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    Exit::Failed(causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}")))
}

fn internal_error(fd: &mut VcpuFd) -> InternalError {
    let rip = fd.get_regs().map_or(0, |r| r.rip);
    // SAFETY: the last exit was KVM_EXIT_INTERNAL_ERROR, for which `internal` is the member in use;
    // all its bit patterns are valid.
    let internal = unsafe { fd.get_kvm_run().__bindgen_anon_1.internal };
    // data[0] holds flags, data[1] the length and the first seven bytes, data[2] the rest
    // (struct kvm_run, emulation_failure).
    let words = internal
        .data
        .iter()
        .take((internal.ndata as usize).min(3))
        .skip(1);
    let bytes: Vec<u8> = words.flat_map(|w| w.to_le_bytes()).collect();
    let instruction = match bytes.split_first() {
        Some((len, bytes)) if internal.suberror == 1 => bytes
            .iter()
            .take(usize::from(*len).min(15))
            .copied()
            .collect(),
        _ => Vec::new(),
    };
    InternalError {
        suberror: internal.suberror,
        instruction,
        rip,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_for_which_kvm_gets_no_thread_is_told_from_one_that_was_kicked() {
        // `KVM_RUN` fails with `errno` for the first `times` calls, then with EINTR, as a run that
        // leaves at once does.
        let warm = |errno: i32, times: u32| {
            let mut calls = 0;
            is_warm(|| {
                calls += 1;
                let errno = if calls > times { libc::EINTR } else { errno };
                Err(kvm_ioctls::Error::new(errno))
            })
        };
        assert!(warm(libc::EINTR, 1).is_ok());
        for passing in [libc::EAGAIN, libc::ENOMEM] {
            assert!(warm(passing, 3).is_ok());
        }
        let refused = warm(libc::EAGAIN, u32::MAX).unwrap_err();
        assert!(matches!(refused, VcpuError::KvmThread(_)), "{refused}");
        assert!(refused.to_string().contains("pids.max"), "{refused}");
        for errno in [libc::ENOMEM, libc::EFAULT] {
            let refused = warm(errno, u32::MAX).unwrap_err();
            assert!(matches!(refused, VcpuError::Run(_)), "{refused}");
        }
    }
}
