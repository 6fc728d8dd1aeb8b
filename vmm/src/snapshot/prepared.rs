//! Prepared VMs: clones that are made ahead of demand, except for their state.

use std::sync::Arc;
use std::time::Instant;

use super::{Frozen, Template};
use crate::boot_error::BootError;
use crate::host::Host;
use crate::memory::{GuestRam, Sharing};
use crate::vcpu::control::RunState;
use crate::vcpu::thread_pool::VcpuThreads;
use crate::vm::Vm;
use crate::vm_fds::VmFds;
use crate::vm_inner::{VmInner, saved_images};

/// A clone of a template that has everything but the state of its vCPUs, interrupt controllers and
/// clock: most of the work of a fork, done ahead of demand. See [`Template::prepare`].
///
/// A prepared VM costs the host as much as a parked clone without pages of its own, and does
/// nothing. Dropping it releases all of that, off the caller's thread.
#[derive(Debug)]
pub struct PreparedVm {
    vm: Vm,
    frozen: Arc<Frozen>,
}

impl PreparedVm {
    pub(super) fn of(template: &Template) -> Result<Self, BootError> {
        let mut inner = assemble(template)?;
        let hardware = inner.hardware;
        let placement = template.placement.as_ref();
        let vcpu_threads = VcpuThreads::acquire(hardware.vcpus, hardware.limits, placement)?;
        inner.start_surely(vcpu_threads, RunState::Pause)?;
        if !inner.settle() {
            return Err(BootError::State("its threads do not come to wait".into()));
        }
        Ok(Self {
            vm: Vm::of(inner),
            frozen: Arc::clone(&template.frozen),
        })
    }

    /// As [`Template::fork`], for this prepared VM.
    ///
    /// # Errors
    /// As [`Template::fork`].
    pub fn fork(self) -> Result<Vm, BootError> {
        self.begin(RunState::Run)
    }

    /// As [`Template::fork_paused`], for this prepared VM.
    ///
    /// # Errors
    /// As [`Template::fork_paused`].
    pub fn fork_paused(self) -> Result<Vm, BootError> {
        self.begin(RunState::Pause)
    }

    fn begin(self, run_state: RunState) -> Result<Vm, BootError> {
        let Self { mut vm, frozen } = self;
        vm.restore(&frozen.state, run_state)?;
        Ok(vm)
    }

    /// The memory of the clone.
    #[cfg(test)]
    pub(super) fn ram(&self) -> GuestRam {
        self.vm.ram().unwrap()
    }
}

/// Makes a clone without its state in KVM and without its vCPU threads.
fn assemble(template: &Template) -> Result<VmInner, BootError> {
    let start = Instant::now();
    let host = Host::get()?;
    let state = &template.frozen.state;
    let memory = Arc::clone(&template.frozen.memory);
    let ram = GuestRam::map_file(memory, state.hardware.memory_bytes, Sharing::Private)?;
    if let Some(set) = &template.working_set {
        set.fill(&ram);
    }
    let fds = VmFds::new(host, state.hardware, ram, saved_images(state)?)?;
    let took = start.elapsed();
    let mut inner = VmInner::prepare(state, fds)?;
    inner.times.kvm = took;
    if template.count_instructions {
        inner.count_instructions();
    }
    Ok(inner)
}

/// Forks without a [`PreparedVm`]: the vCPU threads receive their vCPUs when these have their
/// state, and need not be woken a second time.
pub(super) fn fork(template: &Template, run_state: RunState) -> Result<Vm, BootError> {
    let mut inner = assemble(template)?;
    let hardware = inner.hardware;
    let placement = template.placement.as_ref();
    let vcpu_threads = VcpuThreads::acquire(hardware.vcpus, hardware.limits, placement)?;
    vcpu_threads.wake();
    inner.restore(&template.frozen.state)?;
    inner.start(vcpu_threads, run_state)?;
    Ok(Vm::of(inner))
}
