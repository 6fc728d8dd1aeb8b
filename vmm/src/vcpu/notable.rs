//! Exits that only some hosts make, and only if enabled (`crate::caps`): they report a guest that
//! would slow down other guests.

use std::time::Duration;

use kvm_bindings::{
    KVM_EXIT_NOTIFY, KVM_EXIT_X86_BUS_LOCK, KVM_NOTIFY_CONTEXT_INVALID, KVM_RUN_X86_BUS_LOCK,
    kvm_run,
};

use super::Step;
use crate::state::Exit;

/// How long a vCPU is idle after each bus lock: this allows at most a thousand per second, each of
/// which takes a microsecond of all processors.
pub(super) const REST: Duration = Duration::from_millis(1);

/// Whether the guest has locked the bus in the run that ended: reported by an exit of its own, or
/// noted at another (Documentation/virt/kvm/api.rst, 5, `KVM_RUN_X86_BUS_LOCK`).
pub(super) fn locked_the_bus(run: &kvm_run) -> bool {
    u32::from(run.flags) & KVM_RUN_X86_BUS_LOCK != 0
}

/// Returns the step for an exit that `kvm_ioctls` does not know.
pub(super) fn step(reason: u32, run: &kvm_run) -> Step {
    match reason {
        // See `locked_the_bus`.
        KVM_EXIT_X86_BUS_LOCK => Step::Continue,
        KVM_EXIT_NOTIFY => {
            // SAFETY: the exit is KVM_EXIT_NOTIFY, for which `notify` is the member in use; all its
            // bit patterns are valid.
            let notify = unsafe { run.__bindgen_anon_1.notify };
            if notify.flags & KVM_NOTIFY_CONTEXT_INVALID == 0 {
                // The guest has let no interrupt in for long. The exit let them in.
                return Step::Continue;
            }
            Step::End(Exit::Failed(
                "the guest kept interrupts out until its processor's state was lost".into(),
            ))
        }
        other => Step::End(Exit::Failed(format!("unexpected exit {other}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_of_the_bus_is_seen_alone_and_beside_another_exit() {
        let mut run = kvm_run::default();
        assert!(!locked_the_bus(&run));
        // Bit 0: system management mode.
        run.flags = 1;
        assert!(!locked_the_bus(&run));
        run.flags = 3;
        assert!(locked_the_bus(&run));
        assert!(matches!(step(KVM_EXIT_X86_BUS_LOCK, &run), Step::Continue));
    }

    #[test]
    fn a_guest_that_lets_no_interrupt_in_goes_on_unless_its_state_is_lost() {
        let mut run = kvm_run::default();
        assert!(matches!(step(KVM_EXIT_NOTIFY, &run), Step::Continue));
        run.__bindgen_anon_1.notify.flags = KVM_NOTIFY_CONTEXT_INVALID;
        assert!(matches!(
            step(KVM_EXIT_NOTIFY, &run),
            Step::End(Exit::Failed(_))
        ));
        assert!(matches!(step(99, &run), Step::End(Exit::Failed(_))));
    }
}
