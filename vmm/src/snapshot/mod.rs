//! Templates: a guest that was booted once, frozen, and is forked copy-on-write.
//!
//! Capture order: vCPUs wait at the gate, devices, KVM state, memory. Restore order: memory slots,
//! interrupt controllers, CPUID, devices (up to here it is a [`PreparedVm`]), clock, vCPUs, pending
//! interrupts. A [`Template`]'s memory is a sealed memfd: no clone, and nothing else, can change
//! it.

pub mod cache;
mod compat;
pub(crate) mod cpu;
#[cfg(any(test, feature = "testing"))]
pub(crate) mod fixtures;
pub(crate) mod idle;
mod images;
pub(crate) mod irqchip;
#[cfg(test)]
mod isolation;
mod manifest;
mod memory;
mod prepared;
mod serial;
mod store;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vm_superio::serial::SerialState;

pub use self::compat::Difference;
use self::cpu::VcpuState;
use self::irqchip::ChipState;
#[cfg(test)]
pub(crate) use self::manifest::FORMAT;
pub(crate) use self::memory::allocated;
pub use self::prepared::PreparedVm;
pub use self::store::StoreError;
use crate::advice::advice;
use crate::capture::Capture;
use crate::host::HostError;
use crate::kvm::KvmError;
use crate::memory::seal;
use crate::placement::{Placement, VcpuThread};
use crate::prefetch::WorkingSet;
use crate::vcpu::control::RunState;
use crate::virtio::mmio::TransportState;
use crate::vm::{PauseError, Vm};
use crate::vm_inner::{BootError, Hardware, VmInner};

/// Why a VM could not be captured. The VM goes on as it was.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The VM could not be paused.
    #[error(transparent)]
    Pause(#[from] PauseError),
    /// A vCPU was not at rest.
    #[error("the VM was resumed while it was captured; capture it again")]
    Running,
    /// The host's KVM could not be asked.
    #[error(transparent)]
    Host(#[from] HostError),
    /// KVM did not give its state.
    #[error("KVM did not give the VM's state")]
    Kvm(#[from] KvmError),
    /// Guest memory could not be copied or sealed.
    #[error("guest memory could not be captured; the host may be out of memory{}", advice(.0))]
    Memory(#[source] std::io::Error),
}

/// All of a VM but its memory. A change here or in any part of it raises [`manifest::FORMAT`].
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct VmState {
    pub(crate) hardware: Hardware,
    pub(crate) vcpus: Vec<VcpuState>,
    pub(crate) chips: ChipState,
    pub(crate) transports: Vec<TransportState>,
    #[serde(with = "serial")]
    pub(crate) serial: Option<SerialState>,
}

/// A frozen guest. Cheap to clone; its memory goes with the last clone and the last VM forked from
/// it.
#[derive(Clone, Debug)]
pub struct Template {
    frozen: Arc<Frozen>,
    count_instructions: bool,
    placement: Option<Placement>,
    /// Pages that clones have from the start.
    working_set: Option<Arc<WorkingSet>>,
    /// Keeps the cache entry that holds this template.
    _lease: Option<Arc<cache::Lease>>,
}

#[derive(Debug)]
struct Frozen {
    state: VmState,
    /// Sealed, or a file that nobody changes (see [`Template::load_trusted`]).
    memory: Arc<File>,
}

impl Template {
    /// A VM that goes on where the template stopped. Its memory is the template's until it writes.
    ///
    /// Connections end on both sides, but for durable ones (see
    /// [`VsockStream::mark_durable`](crate::virtio::vsock::VsockStream::mark_durable)), which are
    /// taken up with [`VsockHost::reattach`](crate::VsockHost::reattach).
    ///
    /// # Errors
    /// [`BootError`] when the host refuses; nothing is left behind. Whether KVM gets the thread
    /// that it needs is not waited for, which takes a quarter of a fork: a VM that cannot run
    /// for want of it ends by [`Exit::NoThread`](crate::Exit::NoThread).
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

    /// The part of a fork that can be made ahead of demand: [`PreparedVm::fork`] does the rest, in
    /// a fraction of the time.
    ///
    /// # Errors
    /// As [`Template::fork`].
    pub fn prepare(&self) -> Result<PreparedVm, BootError> {
        PreparedVm::of(self)
    }

    /// Lets [`Vm::emulated_instructions`] count in the clones of this value: for measurements.
    /// Costs each a descriptor per vCPU.
    #[must_use]
    pub fn count_instructions(mut self, on: bool) -> Self {
        self.count_instructions = on;
        self
    }

    /// Has `place` decide where the vCPU threads of this value's clones run, as
    /// [`VmConfigBuilder::place_vcpus`](crate::VmConfigBuilder::place_vcpus) does for a VM that
    /// boots; of a [`PreparedVm`], when it is made. A template does not keep what it was booted
    /// with.
    #[must_use]
    pub fn place_vcpus(
        mut self,
        place: impl Fn(&VcpuThread) -> std::io::Result<()> + Send + Sync + 'static,
    ) -> Self {
        self.placement = Some(Placement::new(place));
        self
    }

    /// Gives the clones of this value the pages of `set` before they run, so that they need not
    /// wait for each: what one clone had touched ([`Vm::working_set`]). It costs each fork the
    /// time to copy what was written; the memory it would have cost anyway. A set of another
    /// template makes clones slower, and wrong in nothing.
    #[must_use]
    pub fn prefetch(mut self, set: WorkingSet) -> Self {
        self.working_set = Some(Arc::new(set));
        self
    }

    /// Bytes of host memory (of a file, if that was mapped) that the template itself holds, once
    /// for all its clones. Grows as clones touch pages for the first time that the template has
    /// as a hole: the host then keeps one page of zeroes for all of them.
    #[must_use]
    pub fn footprint(&self) -> u64 {
        memory::allocated(&self.frozen.memory)
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

    /// Captures a paused machine that goes on afterwards: its memory is copied.
    pub(crate) fn copy_of(capture: &Capture) -> Result<Self, SnapshotError> {
        let goes_on = || !capture.is_over();
        let (state, memory) = capture.save(|ram| memory::copy_out(ram, goes_on))?;
        Self::freeze(state, Arc::new(memory))
    }

    /// Captures a paused machine and takes it apart: its memory becomes the template's.
    pub(crate) fn of(mut inner: VmInner) -> Result<Self, SnapshotError> {
        // Else a device could write between its capture and the unmapping: to the template's
        // memory, past the positions that were saved.
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
        // Sealing needs the last writable mapping gone.
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

    /// The same template, which keeps its cache entry.
    fn kept_by(&self, lease: cache::Lease) -> Self {
        Self {
            _lease: Some(Arc::new(lease)),
            ..self.clone()
        }
    }
}
