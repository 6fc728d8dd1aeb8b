//! The gate between a VM's owner and its vCPU threads: run, pause, stop.
//!
//! ```text
//! Run <-> Pause        Stop is final.
//!   \      /
//!    Stop
//! ```
//!
//! Whoever captures the VM holds the gate closed besides ([`VcpuControl::hold`]): then wishes are
//! noted, and take effect when it lets go.
//!
//! A thread that finds the gate closed hands its vCPU over (into its [`VcpuSlot`]) and waits;
//! whoever closed the gate may then look at the vCPU. Lock order: `VcpuControl.state`, then a seat.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use kvm_ioctls::VcpuFd;

use super::kick::Kicker;

/// How long to wait for acknowledgement before kicking again.
const KICK_INTERVAL: Duration = Duration::from_millis(5);
/// The most of a step's time that counts; on a busy host steps take several times what was asked
/// for.
const STEP: Duration = Duration::from_millis(20);

/// How long to wait for threads of this process. What counts is time in which they could have run:
/// a step that took far longer than was asked for says that the whole process stood still (a
/// debugger, a frozen control group), and counts as a short one.
#[derive(Debug)]
pub(crate) struct WaitBudget(Duration);

impl WaitBudget {
    pub(crate) fn new(bound: Duration) -> Self {
        Self(bound)
    }

    /// A step of the wait took so long. False when there is none left.
    pub(crate) fn charge(&mut self, step: Duration) -> bool {
        self.0 = self.0.saturating_sub(step.min(STEP));
        !self.0.is_zero()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RunState {
    Run,
    Pause,
    Stop,
}

#[derive(Debug)]
struct State {
    run_state: RunState,
    /// How many hold the gate closed.
    holds: usize,
    /// Threads that wait at the closed gate.
    waiting: usize,
    /// Threads that have not ended.
    alive: usize,
}

impl State {
    fn is_open(&self) -> bool {
        self.run_state == RunState::Run && self.holds == 0
    }
}

/// One vCPU's place: its kicker and, while the gate is closed, the vCPU itself.
#[derive(Debug, Default)]
pub(crate) struct VcpuSlot {
    pub(super) kicker: Kicker,
    vcpu: Mutex<Option<VcpuFd>>,
}

impl VcpuSlot {
    fn lock(&self) -> MutexGuard<'_, Option<VcpuFd>> {
        self.vcpu.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// See the module's text.
#[derive(Debug)]
pub(crate) struct VcpuControl {
    state: Mutex<State>,
    changed: Condvar,
    /// Set while the gate is not open; lets running threads check without the lock.
    closed: AtomicBool,
    slots: Vec<VcpuSlot>,
}

impl VcpuControl {
    /// A gate for `vcpus` threads.
    pub(crate) fn new(vcpus: usize, run_state: RunState) -> Self {
        Self {
            state: Mutex::new(State {
                run_state,
                holds: 0,
                waiting: 0,
                alive: 0,
            }),
            changed: Condvar::new(),
            closed: AtomicBool::new(run_state != RunState::Run),
            slots: (0..vcpus).map(|_| VcpuSlot::default()).collect(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub(super) fn slot(&self, index: usize) -> Option<&VcpuSlot> {
        self.slots.get(index)
    }

    /// A vCPU thread begins; counted before it is spawned, so that a stop waits for it.
    pub(super) fn enter(&self) {
        self.lock().alive += 1;
    }

    /// A vCPU thread ends.
    pub(super) fn leave(&self) {
        self.lock().alive -= 1;
        self.changed.notify_all();
    }

    /// Whether a running thread must come to the gate.
    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Waits while the gate is closed. Gives the vCPU back when it may run, `None` at a stop (the
    /// vCPU is then closed here).
    pub(super) fn pass(&self, index: usize, vcpu: VcpuFd) -> Option<VcpuFd> {
        let slot = self.slots.get(index)?;
        *slot.lock() = Some(vcpu);
        let mut state = self.lock();
        state.waiting += 1;
        self.changed.notify_all();
        while state.run_state != RunState::Stop && !state.is_open() {
            state = self.changed.wait(state).unwrap_or_else(|e| e.into_inner());
        }
        state.waiting -= 1;
        let run_state = state.run_state;
        drop(state);
        let vcpu = slot.lock().take();
        if run_state == RunState::Stop {
            None
        } else {
            vcpu
        }
    }

    /// Sets what the threads shall do and kicks those that run. Does not wait. A stop is final.
    /// Returns whether the wish was accepted.
    pub(crate) fn set(&self, run_state: RunState) -> bool {
        {
            let mut state = self.lock();
            if state.run_state == RunState::Stop && run_state != RunState::Stop {
                return false;
            }
            if state.run_state == run_state && run_state == RunState::Run {
                return true;
            }
            state.run_state = run_state;
            self.mark(&state);
            if state.alive == 0 {
                return true;
            }
        }
        self.changed.notify_all();
        if run_state != RunState::Run {
            self.kick();
        }
        true
    }

    /// Keeps the gate closed, whatever is wished meanwhile, until the hold is dropped. A stop ends
    /// the threads nevertheless. Does not wait for them; see [`VcpuControl::settle`].
    pub(crate) fn hold(&self) -> PauseGuard<'_> {
        {
            let mut state = self.lock();
            state.holds += 1;
            self.mark(&state);
        }
        self.changed.notify_all();
        self.kick();
        PauseGuard(self)
    }

    /// The state has changed. Whoever says so to the threads that wait does it when the lock is
    /// free again: they would wake only to wait for it.
    fn mark(&self, state: &State) {
        self.closed.store(!state.is_open(), Ordering::Release);
    }

    /// Waits until `until`, but no longer than the gate is open.
    pub(super) fn rest(&self, until: Instant) {
        let mut state = self.lock();
        while state.is_open() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(|e| e.into_inner()).0;
        }
    }

    /// What the threads shall do.
    pub(crate) fn run_state(&self) -> RunState {
        self.lock().run_state
    }

    fn kick(&self) {
        for slot in &self.slots {
            slot.kicker.kick();
        }
    }

    /// Kicks until every thread waits at the gate or has ended; false when it took longer than
    /// `bound`, of time in which this process could run.
    pub(crate) fn settle(&self, bound: Duration) -> bool {
        let mut budget = WaitBudget::new(bound);
        let mut seen = Instant::now();
        loop {
            let state = self.lock();
            let settled = match state.run_state {
                RunState::Stop => state.alive == 0,
                RunState::Run if state.is_open() => true,
                RunState::Run | RunState::Pause => state.waiting >= state.alive,
            };
            if settled {
                return true;
            }
            let step = seen.elapsed();
            seen += step;
            if !budget.charge(step) {
                drop(state);
                self.kick();
                return false;
            }
            let _ = self.changed.wait_timeout(state, KICK_INTERVAL.min(bound));
            self.kick();
        }
    }

    /// vCPUs that have a place.
    pub(crate) fn vcpus(&self) -> usize {
        self.slots.len()
    }

    /// Looks at vCPU `index` while it waits at the closed gate; `None` when it does not.
    pub(crate) fn with_vcpu<R>(
        &self,
        index: usize,
        look: impl FnOnce(&mut VcpuFd) -> R,
    ) -> Option<R> {
        self.slots.get(index)?.lock().as_mut().map(look)
    }
}

/// While it lives, no vCPU passes the gate.
#[derive(Debug)]
pub(crate) struct PauseGuard<'a>(&'a VcpuControl);

impl Drop for PauseGuard<'_> {
    fn drop(&mut self) {
        {
            let mut state = self.0.lock();
            state.holds -= 1;
            self.0.mark(&state);
        }
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Was: a process that a debugger or a control group had held for longer than the bound found,
    /// when it went on, that its vCPUs had not stopped in time.
    #[test]
    fn time_in_which_the_process_stood_still_does_not_count() {
        let mut budget = WaitBudget::new(Duration::from_secs(5));
        for _ in 0..100 {
            assert!(budget.charge(Duration::from_secs(3600)));
        }
        // In steps as they were asked for it ends after as long as was said.
        let mut budget = WaitBudget::new(Duration::from_secs(5));
        let steps = (1..).find(|_| !budget.charge(KICK_INTERVAL));
        assert_eq!(steps, Some(1000));
        // And a host on which each step takes many times as long waits no longer than for so many
        // steps.
        let mut budget = WaitBudget::new(Duration::from_secs(5));
        let steps = (1..).find(|_| !budget.charge(20 * KICK_INTERVAL));
        assert_eq!(steps, Some(250));
    }

    #[test]
    fn a_thread_that_does_not_come_is_waited_for_in_bounded_time_and_seen_when_it_does() {
        let control = VcpuControl::new(1, RunState::Run);
        control.enter();
        control.set(RunState::Stop);
        assert!(!control.settle(Duration::ZERO));
        assert!(!control.settle(Duration::from_millis(50)));
        control.leave();
        assert!(control.settle(Duration::ZERO));
    }
}
