//! Whether a paused guest has anything to do.

use std::time::Duration;

use kvm_bindings::KVM_MP_STATE_RUNNABLE;
use kvm_ioctls::VcpuFd;

use super::control::VcpuControl;
use crate::cpu::msrs;

/// Returns how long no vCPU has anything to do unless an interrupt arrives. `None` if a vCPU is not
/// idle, or is not parked.
pub(crate) fn quiet_for(control: &VcpuControl) -> Option<Duration> {
    (0..control.vcpus()).try_fold(Duration::MAX, |least, index| {
        let quiet = control.with_vcpu(index, |vcpu| until_timer(vcpu))??;
        Some(least.min(quiet))
    })
}

/// Returns how long the vCPU has nothing to do unless an interrupt arrives: until its timer is due.
/// `None` if it is not idle, or KVM does not report its state.
fn until_timer(vcpu: &VcpuFd) -> Option<Duration> {
    let state = vcpu.get_mp_state().ok()?;
    if state.mp_state == KVM_MP_STATE_RUNNABLE {
        return None;
    }
    let read = msrs::read(vcpu, [msrs::TSC, msrs::TSC_DEADLINE].into_iter()).ok()?;
    let &[now, deadline] = &read[..] else {
        return None;
    };
    // Zero: the timer is not armed (Intel SDM volume 3, section 11.5.4.1).
    if deadline.data == 0 {
        return Some(Duration::MAX);
    }
    let ticks = deadline.data.saturating_sub(now.data);
    let khz = u64::from(vcpu.get_tsc_khz().ok()?.max(1));
    Some(Duration::from_millis(ticks / khz))
}
