//! Keeps a spare VM on hosts where `KVM_CREATE_VM` waits.
//!
//! Before Linux 6.13, and in the first releases of the 6.12 series, `KVM_CREATE_VM` starts a thread
//! for the VM's huge pages and attaches it to the caller's control groups (`kvm_mmu_post_init_vm`,
//! `cgroup_attach_task_all`). The attaching caller waits for a grace period of RCU, 10 ms and more,
//! unless another caller attached just before, or the control groups are mounted with
//! `favordynmods`. A fork of a VM takes a tenth of that otherwise. So the process keeps one VM in
//! stock once it has seen such a wait; the thread that creates the next VM waits instead.

use std::sync::{Condvar, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvm_ioctls::{Kvm, VmFd};

use super::{KvmError, create_vm};
use crate::threads::{self, SMALL_STACK};

/// A `KVM_CREATE_VM` that takes this long or longer has waited: without a wait it takes 0.1 to 0.5
/// ms.
const WAIT: Duration = Duration::from_millis(2);
/// Pause before the next VM is created: the caller that took the last one is busy with it.
const AFTER: Duration = Duration::from_millis(2);

static SPARE: LazyLock<Spare<VmFd>> = LazyLock::new(Spare::default);

/// Returns the VM in stock, or creates a new one. `may_wait` says whether this is a host that makes
/// those who create a VM wait; elsewhere a call takes as long only because the host is busy, and no
/// stock is kept.
pub(crate) fn vm(kvm: &'static Kvm, may_wait: bool) -> Result<VmFd, KvmError> {
    if let Some(vm) = SPARE.take() {
        return Ok(vm);
    }
    let begin = Instant::now();
    let vm = create_vm(kvm)?;
    if may_wait && begin.elapsed() >= WAIT {
        SPARE.keep(AFTER, || create_vm(kvm).ok());
    }
    Ok(vm)
}

/// A stock of at most one `T`, filled by a thread of its own once [`Spare::keep`] has started it.
#[derive(Debug)]
struct Spare<T> {
    state: Mutex<State<T>>,
    wanted: Condvar,
}

#[derive(Debug)]
struct State<T> {
    ready: Option<T>,
    is_wanted: bool,
    /// Whether the thread that fills the stock exists.
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

    /// Takes the `T` in stock, if there is one, and asks the thread for the next.
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

    /// Keeps one `T` in stock from now on. If the host refuses the thread, the stock stays empty,
    /// and the next wait tries again.
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
                // After a failure, the next caller of `take` asks again.
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
        // At most one is in stock.
        std::thread::sleep(Duration::from_millis(50));
        assert!(MADE.load(Ordering::SeqCst) <= 6);
        // A second `keep` changes nothing.
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
        let Ok(host) = crate::host::Host::get() else {
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
