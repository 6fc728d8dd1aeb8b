//! A VM that is made before it is asked for, where KVM makes the one who asks wait.
//!
//! Before Linux 6.13, and in the first releases of the 6.12 series, `KVM_CREATE_VM` starts a thread
//! for the VM's huge pages and attaches it to the caller's control groups (`kvm_mmu_post_init_vm`,
//! `cgroup_attach_task_all`). Whoever attaches waits for a grace period of RCU, 10 ms and more,
//! unless another did so just before, or the control groups are mounted with `favordynmods`. A fork
//! takes a tenth of that otherwise. So the process keeps one VM in stock as soon as it has seen
//! such a wait; the thread that makes the next one waits instead.

use std::sync::{Condvar, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvm_ioctls::VmFd;

use super::{KvmError, create_vm};
use crate::host::{CpuProfile, Host};
use crate::threads::{self, SMALL_STACK};

/// Making a VM that takes longer was a wait: without one it takes 0.1 to 0.5 ms.
const WAIT: Duration = Duration::from_millis(2);
/// Pause before the next is made: whoever took the last one is at work with it.
const AFTER: Duration = Duration::from_millis(2);

static SPARE: LazyLock<Spare<VmFd>> = LazyLock::new(Spare::default);

/// A VM: the one in stock, or a new one.
pub(crate) fn vm(host: &'static Host) -> Result<VmFd, KvmError> {
    if let Some(vm) = SPARE.take() {
        return Ok(vm);
    }
    let begin = Instant::now();
    let vm = create_vm(host.kvm())?;
    // Where ring 0 is emulated nobody waits so; on a busy machine it may look like it.
    if host.profile() == CpuProfile::Native && begin.elapsed() >= WAIT {
        SPARE.keep(AFTER, || create_vm(host.kvm()).ok());
    }
    Ok(vm)
}

/// One thing in stock, if it is kept at all.
#[derive(Debug)]
struct Spare<T> {
    state: Mutex<State<T>>,
    wanted: Condvar,
}

#[derive(Debug)]
struct State<T> {
    ready: Option<T>,
    is_wanted: bool,
    /// Whether there is a thread that makes it.
    is_kept: bool,
}

impl<T> Default for Spare<T> {
    fn default() -> Self {
        let state = State {
            ready: None,
            is_wanted: false,
            is_kept: false,
        };
        Self {
            state: Mutex::new(state),
            wanted: Condvar::new(),
        }
    }
}

impl<T: Send + 'static> Spare<T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is ready, if anything is. The next one is made from here on.
    fn take(&self) -> Option<T> {
        let mut state = self.lock();
        let taken = state.ready.take();
        state.is_wanted |= state.is_kept;
        let is_kept = state.is_kept;
        drop(state);
        if is_kept {
            self.wanted.notify_one();
        }
        taken
    }

    /// Keeps one in stock from now on. A host that gives no thread for it has none; the next wait
    /// asks again.
    fn keep(&'static self, after: Duration, make: impl Fn() -> Option<T> + Send + 'static) {
        let mut state = self.lock();
        if state.is_kept {
            return;
        }
        let serve = move || self.serve(after, make);
        if threads::spawn("hearth-new-vm", SMALL_STACK, serve).is_ok() {
            state.is_kept = true;
            state.is_wanted = true;
        }
    }

    fn serve(&self, after: Duration, make: impl Fn() -> Option<T>) {
        loop {
            let state = self.lock();
            let waited = self.wanted.wait_while(state, |state| !state.is_wanted);
            waited.unwrap_or_else(PoisonError::into_inner).is_wanted = false;
            std::thread::sleep(after);
            if self.lock().ready.is_none() {
                // What cannot be made now is asked for again by whoever does without.
                let made = make();
                self.lock().ready = made;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    const STUCK: Duration = Duration::from_secs(30);

    fn kept(make: impl Fn() -> Option<u32> + Send + 'static) -> &'static Spare<u32> {
        let spare: &'static Spare<u32> = Box::leak(Box::default());
        assert_eq!(spare.take(), None, "none is kept");
        assert!(!spare.lock().is_wanted);
        spare.keep(Duration::ZERO, make);
        spare
    }

    fn taken<T: Send + 'static>(spare: &Spare<T>) -> T {
        let begin = Instant::now();
        loop {
            if let Some(taken) = spare.take() {
                return taken;
            }
            assert!(begin.elapsed() < STUCK, "none is made");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn the_next_is_made_when_one_is_taken_and_only_then() {
        static MADE: AtomicU32 = AtomicU32::new(0);
        let spare = kept(|| Some(MADE.fetch_add(1, Ordering::SeqCst)));
        for number in 0..5 {
            assert_eq!(taken(spare), number);
        }
        // One at the most is in stock.
        std::thread::sleep(Duration::from_millis(50));
        assert!(MADE.load(Ordering::SeqCst) <= 6);
        // A second wait changes nothing.
        spare.keep(Duration::ZERO, || Some(1000));
        assert_eq!((taken(spare), taken(spare)), (5, 6));
    }

    #[test]
    fn one_that_cannot_be_made_is_tried_again_by_whoever_does_without() {
        static ASKED: AtomicU32 = AtomicU32::new(0);
        let spare = kept(|| {
            let asked = ASKED.fetch_add(1, Ordering::SeqCst);
            (asked >= 3).then_some(asked)
        });
        assert_eq!(taken(spare), 3);
    }

    #[test]
    fn a_spare_vm_is_a_vm() {
        let Ok(host) = Host::get() else {
            let _ = writeln!(std::io::stderr(), "\nNOT MEASURED: no /dev/kvm");
            return;
        };
        static KEPT: LazyLock<Spare<VmFd>> = LazyLock::new(Spare::default);
        KEPT.keep(Duration::ZERO, || create_vm(host.kvm()).ok());
        let vm = taken(&KEPT);
        crate::kvm::create_irqchip(&vm, false).unwrap();
        crate::kvm::create_vcpu(&vm, 0, host.cpuid()).unwrap();
    }
}
