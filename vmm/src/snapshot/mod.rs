//! Templates: guests that were booted once, frozen, and are forked copy-on-write.
//!
//! Capture order: vCPUs are parked, devices, KVM state, memory. Restore order: memory slots,
//! interrupt controllers, CPUID, devices (up to here it is a [`PreparedVm`]), state of the
//! controllers and the clock, vCPUs, pending interrupts. A [`Template`]'s memory is a sealed memfd,
//! which no clone or other code can change, or a trusted file ([`Template::load_trusted`]).

pub mod cache;
mod capture;
mod compat;
#[cfg(any(test, feature = "testing"))]
pub(crate) mod fixtures;
mod images;
#[cfg(test)]
mod isolation;
mod manifest;
mod memory;
mod of_vm;
mod prepared;
mod store;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::sync::Arc;

use self::capture::Capture;
pub use self::compat::Difference;
#[cfg(test)]
pub(crate) use self::manifest::FORMAT;
pub use self::prepared::PreparedVm;
pub use self::store::StoreError;
use crate::advice::advice;
use crate::boot_error::BootError;
use crate::host::HostError;
use crate::kvm::KvmError;
use crate::memory::{allocated, seal};
use crate::placement::{Placement, VcpuThread};
use crate::prefetch::WorkingSet;
use crate::saved::VmState;
use crate::vcpu::control::RunState;
use crate::vm::{PauseError, Vm};
use crate::vm_inner::VmInner;

/// Error of a capture. After an error of [`Vm::snapshot`] the VM goes on as it was.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The VM could not be paused.
    #[error(transparent)]
    Pause(#[from] PauseError),
    /// A vCPU was not parked.
    #[error("the VM was resumed while it was captured; capture it again")]
    Running,
    /// The host's KVM could not be queried.
    #[error(transparent)]
    Host(#[from] HostError),
    /// KVM did not return the VM's state.
    #[error("KVM did not give the VM's state")]
    Kvm(#[from] KvmError),
    /// Guest memory could not be copied or sealed.
    #[error("guest memory could not be captured; the host may be out of memory{}", advice(.0))]
    Memory(#[source] std::io::Error),
}

/// A frozen guest. Cheap to clone; its memory is freed with the last clone of this value and the
/// last VM forked from it.
#[derive(Clone, Debug)]
pub struct Template {
    frozen: Arc<Frozen>,
    count_instructions: bool,
    placement: Option<Placement>,
    /// Pages that clones get before they run.
    working_set: Option<Arc<WorkingSet>>,
    /// Keeps the cache entry of this template from being evicted.
    _lease: Option<Arc<cache::Lease>>,
}

#[derive(Debug)]
struct Frozen {
    state: VmState,
    /// Sealed, or a file that must not change (see [`Template::load_trusted`]).
    memory: Arc<File>,
}

impl Template {
    /// Forks a VM that goes on where the template stopped. It shares the template's memory until it
    /// writes.
    ///
    /// Connections end on both sides, except for durable ones (see
    /// [`VsockStream::mark_durable`](crate::virtio::vsock::VsockStream::mark_durable)), which the
    /// host takes up with [`VsockHost::reattach`](crate::VsockHost::reattach).
    ///
    /// # Errors
    /// [`BootError`] when the host refuses; nothing is left behind. A fork does not wait until KVM
    /// has created the thread that it needs, which takes a quarter of a fork's time: a VM that
    /// cannot run without it ends with [`Exit::NoThread`](crate::Exit::NoThread).
    pub fn fork(&self) -> Result<Vm, BootError> {
        prepared::fork(self, RunState::Run)
    }

    /// As [`Template::fork`], but the VM does not run before [`Vm::resume`].
    ///
    /// # Errors
    /// As [`Template::fork`].
    pub fn fork_paused(&self) -> Result<Vm, BootError> {
        prepared::fork(self, RunState::Pause)
    }

    /// Makes the part of a fork that can be made ahead of demand: [`PreparedVm::fork`] does the
    /// rest, in a fraction of the time.
    ///
    /// # Errors
    /// As [`Template::fork`].
    pub fn prepare(&self) -> Result<PreparedVm, BootError> {
        PreparedVm::of(self)
    }

    /// Lets [`Vm::emulated_instructions`] count in the clones of this value, for measurements.
    /// Costs each clone one file descriptor per vCPU.
    #[must_use]
    pub fn count_instructions(mut self, on: bool) -> Self {
        self.count_instructions = on;
        self
    }

    /// Lets `place` decide where the vCPU threads of this value's clones run, as
    /// [`VmConfigBuilder::place_vcpus`](crate::VmConfigBuilder::place_vcpus) does for a VM that
    /// boots. For a [`PreparedVm`], `place` is called when that is made. A template does not
    /// inherit the placement of the VM that it was made from.
    #[must_use]
    pub fn place_vcpus(
        mut self,
        place: impl Fn(&VcpuThread) -> std::io::Result<()> + Send + Sync + 'static,
    ) -> Self {
        self.placement = Some(Placement::new(place));
        self
    }

    /// Gives the clones of this value the pages of `set` before they run, so that they need not
    /// wait for each: the pages that one clone had touched ([`Vm::working_set`]). It costs each
    /// fork the time to copy the written pages; clones would use that memory anyway. The set of
    /// another template makes clones slower, but does not change what they do.
    #[must_use]
    pub fn prefetch(mut self, set: WorkingSet) -> Self {
        self.working_set = Some(Arc::new(set));
        self
    }

    /// Returns the bytes of host memory (of a file, if that was mapped) that the template itself
    /// holds, once for all its clones. Grows when clones first touch pages that are holes in the
    /// template: the host then keeps one page of zeroes for all of them.
    #[must_use]
    pub fn footprint(&self) -> u64 {
        allocated(&self.frozen.memory)
    }

    /// Guest memory of each clone in bytes.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        self.frozen.state.hardware.memory_bytes
    }

    /// vCPUs of each clone.
    #[must_use]
    pub fn vcpus(&self) -> u8 {
        self.frozen.state.hardware.vcpus
    }

    /// Captures a paused VM that goes on afterwards: its memory is copied.
    pub(crate) fn copy_of(capture: &Capture) -> Result<Self, SnapshotError> {
        let goes_on = || !capture.is_over();
        let (state, memory) = capture.save(|ram| memory::copy_out(ram, goes_on))?;
        Self::freeze(state, Arc::new(memory))
    }

    /// Captures a paused VM and tears it down: its memory becomes the template's, or is copied if
    /// it cannot be shared.
    pub(crate) fn of(mut inner: VmInner) -> Result<Self, SnapshotError> {
        // Otherwise a device could write to the template's memory between its capture and the
        // unmapping, past the saved queue positions.
        inner.detach();
        if !inner.memory_can_be_shared() {
            let capture = inner.capture().ok_or(SnapshotError::Running)?;
            return Self::copy_of(&capture);
        }
        let capture = inner.capture().ok_or(SnapshotError::Running)?;
        let (state, memory) = capture.save(|ram| {
            memory::complete(ram)?;
            Ok(Arc::clone(ram.file()))
        })?;
        // Sealing requires that the last writable mapping is gone.
        drop(capture);
        drop(inner);
        Self::freeze(state, memory)
    }

    fn freeze(state: VmState, memory: Arc<File>) -> Result<Self, SnapshotError> {
        seal(&memory).map_err(SnapshotError::Memory)?;
        Ok(Self::with(state, memory))
    }

    fn with(state: VmState, memory: Arc<File>) -> Self {
        Self {
            frozen: Arc::new(Frozen { state, memory }),
            count_instructions: false,
            placement: None,
            working_set: None,
            _lease: None,
        }
    }

    /// Returns the same template, which also keeps its cache entry.
    fn kept_by(&self, lease: cache::Lease) -> Self {
        Self {
            _lease: Some(Arc::new(lease)),
            ..self.clone()
        }
    }
}
