//! Shells: what of a clone is made ahead of demand.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Frozen, Template};
use crate::frame::Frame;
use crate::host::Host;
use crate::machine::{BootError, Machine, saved_images};
use crate::memory::{GuestRam, Sharing};
use crate::vcpu::gate::Want;
use crate::vcpu::runner::Crew;
use crate::vm::Vm;

/// A clone of a template without the template's state: KVM's VM with its memory, vCPUs and the wires of its
/// devices, and threads that wait for the vCPUs. It is most of the work of a fork, and can be made ahead of demand.
///
/// A shell costs the host what a parked clone does but for the clone's own pages (it has none), and does nothing.
/// Dropping it releases all of that, which takes up to some milliseconds.
#[derive(Debug)]
pub struct Shell {
    // Before the frame: threads that are not needed do not wait for KVM.
    crew: Crew,
    frame: Frame,
    frozen: Arc<Frozen>,
    count_instructions: bool,
    took: Duration,
}

impl Shell {
    pub(super) fn of(template: &Template) -> Result<Self, BootError> {
        let start = Instant::now();
        let host = Host::get()?;
        let state = &template.frozen.state;
        let hardware = state.hardware;
        let memory = Arc::clone(&template.frozen.memory);
        let ram = GuestRam::map_file(memory, hardware.memory_bytes, Sharing::Private)?;
        let images = saved_images(state)?;
        Ok(Self {
            crew: Crew::muster(hardware.vcpus, hardware.limits)?,
            frame: Frame::new(host, hardware, ram, images)?,
            frozen: Arc::clone(&template.frozen),
            count_instructions: template.count_instructions,
            took: start.elapsed(),
        })
    }

    /// As [`Template::fork`].
    ///
    /// # Errors
    /// As [`Template::fork`].
    pub fn fork(self) -> Result<Vm, BootError> {
        self.begin(Want::Run)
    }

    /// As [`Template::fork_paused`].
    ///
    /// # Errors
    /// As [`Template::fork_paused`].
    pub fn fork_paused(self) -> Result<Vm, BootError> {
        self.begin(Want::Pause)
    }

    fn begin(self, want: Want) -> Result<Vm, BootError> {
        let mut machine = Machine::restore(&self.frozen.state, self.frame)?;
        machine.times.kvm += self.took;
        if self.count_instructions {
            machine.count_instructions();
        }
        machine.start(self.crew, want)?;
        Ok(Vm::of(machine))
    }

    /// The memory that the clone will have.
    #[cfg(test)]
    pub(super) fn ram(&self) -> &GuestRam {
        &self.frame.ram
    }
}
