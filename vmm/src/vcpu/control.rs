//! The run state that a VM's owner sets for its vCPU threads: run, pause, stop.
//!
//! ```text
//! Run <-> Pause        Stop is final.
//!   \      /
//!    Stop
//! ```
//!
//! A capture holds the vCPUs paused besides ([`VcpuControl::hold`]): then run and pause are only
//! recorded, and take effect when the hold is dropped.
//!
//! A thread that may not run parks: it hands its vCPU over (into its [`VcpuSlot`]) and waits. The
//! thread that paused the VM may then access the vCPU. Lock order: `VcpuControl.state`, then a
//! slot.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use kvm_ioctls::VcpuFd;

use super::kick::Kicker;

/// How long to wait for acknowledgement before kicking again.
const KICK_INTERVAL: Duration = Duration::from_millis(5);
/// The most of a step's time that is charged; on a busy host steps take several times as long as
/// requested.
const STEP: Duration = Duration::from_millis(20);

/// The time left in a wait for threads of this process. Only time in which they could have run
/// counts: a step that took far longer than requested means that the whole process stood still (a
/// debugger, a frozen control group), and is charged as at most [`STEP`].
#[derive(Debug)]
pub(crate) struct WaitBudget(Duration);

impl WaitBudget {
    pub(crate) fn new(bound: Duration) -> Self {
        Self(bound)
    }

    /// Charges a step of the wait. Returns false when no time is left.
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
    /// Number of live [`PauseGuard`]s.
    holds: usize,
    /// Threads that are parked.
    waiting: usize,
    /// Threads that have not ended.
    alive: usize,
}

impl State {
    fn is_open(&self) -> bool {
        self.run_state == RunState::Run && self.holds == 0
    }
}

/// One vCPU's slot: its kicker and, while its thread is parked, the vCPU itself.
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

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct VcpuControl {
    state: Mutex<State>,
    changed: Condvar,
    /// Set while the vCPUs may not run; lets running threads check without the lock.
    closed: AtomicBool,
    slots: Vec<VcpuSlot>,
}

impl VcpuControl {
    /// Returns a control for `vcpus` threads.
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

    /// Counts a vCPU thread as alive. Called before the thread gets its vCPU, so that a stop waits
    /// for it.
    pub(super) fn enter(&self) {
        self.lock().alive += 1;
    }

    /// Counts a vCPU thread as ended.
    pub(super) fn leave(&self) {
        self.lock().alive -= 1;
        self.changed.notify_all();
    }

    /// Whether a running thread must park.
    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Parks the calling thread while its vCPU may not run. Returns the vCPU when it may run,
    /// `None` at a stop (the vCPU is then closed here).
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

    /// Sets the run state and, unless it is `Run`, kicks the threads. Does not wait. A stop is
    /// final. Returns whether the state was accepted.
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

    /// Keeps the vCPUs paused until the guard is dropped, even if the run state is set to `Run`
    /// meanwhile. A stop ends the threads nevertheless. Does not wait for them; see
    /// [`VcpuControl::settle`].
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

    /// Updates `closed` after a change of `state`. The caller notifies waiting threads after it has
    /// released the lock: otherwise they would wake only to wait for it.
    fn mark(&self, state: &State) {
        self.closed.store(!state.is_open(), Ordering::Release);
    }

    /// Waits until `until`, but only while the vCPUs may run.
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

    /// Returns the run state that was set.
    pub(crate) fn run_state(&self) -> RunState {
        self.lock().run_state
    }

    fn kick(&self) {
        for slot in &self.slots {
            slot.kicker.kick();
        }
    }

    /// Waits until every thread is parked or has ended, kicking meanwhile; returns at once if the
    /// vCPUs may run. Returns false if it took longer than `bound`, of time in which this process
    /// could run.
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

    /// Returns the number of vCPU slots.
    pub(crate) fn vcpus(&self) -> usize {
        self.slots.len()
    }

    /// Calls `look` with vCPU `index` if its thread is parked; returns `None` if it is not.
    pub(crate) fn with_vcpu<R>(
        &self,
        index: usize,
        look: impl FnOnce(&mut VcpuFd) -> R,
    ) -> Option<R> {
        self.slots.get(index)?.lock().as_mut().map(look)
    }
}

/// While this guard lives, no parked vCPU resumes.
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

    /// Regression test: a process that a debugger or a control group had held for longer than the
    /// bound found, when it continued, that its vCPUs had not stopped in time.
    #[test]
    fn time_in_which_the_process_stood_still_does_not_count() {
        let mut budget = WaitBudget::new(Duration::from_secs(5));
        for _ in 0..100 {
            assert!(budget.charge(Duration::from_secs(3600)));
        }
        // With steps of the requested length the budget lasts as long as its bound.
        let mut budget = WaitBudget::new(Duration::from_secs(5));
        let steps = (1..).find(|_| !budget.charge(KICK_INTERVAL));
        assert_eq!(steps, Some(1000));
        // On a host where each step takes many times as long, the number of steps is bounded.
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
