//! Shells: what of a clone is made ahead of demand.

use std::sync::Arc;
use std::time::Instant;

use super::{Frozen, Template};
use crate::frame::Frame;
use crate::host::Host;
use crate::machine::{BootError, Machine, saved_images};
use crate::memory::{GuestRam, Sharing};
use crate::vcpu::gate::Want;
use crate::vcpu::runner::Crew;
use crate::vm::Vm;

/// A clone of a template that has all but the state of its processors, interrupt controllers and
/// clock: most of the work of a fork, made ahead of demand. See [`Template::shell`].
///
/// A shell costs the host what a parked clone does but for the clone's own pages (it has none), and
/// does nothing. Dropping it releases all of that, off the caller's thread.
#[derive(Debug)]
pub struct Shell {
    vm: Vm,
    frozen: Arc<Frozen>,
}

impl Shell {
    pub(super) fn of(template: &Template) -> Result<Self, BootError> {
        let mut machine = assemble(template)?;
        let hardware = machine.hardware;
        let placement = template.placement.as_ref();
        let crew = Crew::muster(hardware.vcpus, hardware.limits, placement)?;
        machine.start_surely(crew, Want::Pause)?;
        if !machine.settle() {
            return Err(BootError::State("its threads do not come to wait".into()));
        }
        Ok(Self {
            vm: Vm::of(machine),
            frozen: Arc::clone(&template.frozen),
        })
    }

    /// As [`Template::fork`], from here on.
    ///
    /// # Errors
    /// As [`Template::fork`].
    pub fn fork(self) -> Result<Vm, BootError> {
        self.begin(Want::Run)
    }

    /// As [`Template::fork_paused`], from here on.
    ///
    /// # Errors
    /// As [`Template::fork_paused`].
    pub fn fork_paused(self) -> Result<Vm, BootError> {
        self.begin(Want::Pause)
    }

    fn begin(self, want: Want) -> Result<Vm, BootError> {
        let Self { mut vm, frozen } = self;
        vm.restore(&frozen.state, want)?;
        Ok(vm)
    }

    /// The memory that the clone will have.
    #[cfg(test)]
    pub(super) fn ram(&self) -> GuestRam {
        self.vm.ram().unwrap()
    }
}

/// All of a clone but its state and its threads.
fn assemble(template: &Template) -> Result<Machine, BootError> {
    let start = Instant::now();
    let host = Host::get()?;
    let state = &template.frozen.state;
    let memory = Arc::clone(&template.frozen.memory);
    let ram = GuestRam::map_file(memory, state.hardware.memory_bytes, Sharing::Private)?;
    if let Some(set) = &template.working_set {
        set.fill(&ram);
    }
    let frame = Frame::new(host, state.hardware, ram, saved_images(state)?)?;
    let took = start.elapsed();
    let mut machine = Machine::shell(state, frame)?;
    machine.times.kvm = took;
    if template.count_instructions {
        machine.count_instructions();
    }
    Ok(machine)
}

/// A clone without a shell of its own: its threads get their vCPUs when those have their state, and
/// need not be woken a second time.
pub(super) fn fork(template: &Template, want: Want) -> Result<Vm, BootError> {
    let mut machine = assemble(template)?;
    let hardware = machine.hardware;
    let placement = template.placement.as_ref();
    let crew = Crew::muster(hardware.vcpus, hardware.limits, placement)?;
    crew.alert();
    machine.restore(&template.frozen.state)?;
    machine.start(crew, want)?;
    Ok(Vm::of(machine))
}
