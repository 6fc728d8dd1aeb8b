//! How a VM becomes a template.

use super::capture::Capture;
use super::{SnapshotError, Template};
use crate::vm::{PauseError, Vm};
use crate::vm_inner::VmInner;

impl Vm {
    /// Captures the VM as a template and lets it continue as it was (running or paused, or as set
    /// by a [`Vm::resume`] or [`Vm::pause`] meanwhile). Blocks while the guest's touched memory is
    /// copied (about 1 ms per MiB); neither other VMs nor other calls that inspect this one wait
    /// for it. A VM that ends or is torn down meanwhile is not captured.
    ///
    /// Programs in a clone continue from where they are, before they can be told that they are in a
    /// clone. An agent that can hold them (`AgentClient::freeze` of hearth-agent) should do so
    /// before the capture.
    ///
    /// # Errors
    /// [`SnapshotError`]; the VM continues.
    pub fn snapshot(&self) -> Result<Template, SnapshotError> {
        let _held = self.hold()?;
        let template = self.capture().and_then(|it| Template::copy_of(&it));
        match self.ended() {
            // The VM ended meanwhile.
            Some(exit) if template.is_err() => Err(PauseError::Ended(exit).into()),
            _ => template,
        }
    }

    /// Returns the parts that a copy needs. The lock on `inner` is free during the copy, so that
    /// calls that inspect or end the VM need not wait.
    pub(crate) fn capture(&self) -> Result<Capture, SnapshotError> {
        let capture = self.inner().as_ref().and_then(VmInner::capture);
        capture.ok_or(SnapshotError::Running)
    }

    /// Turns the VM into a template: it stops, and the template takes its memory without a copy
    /// (that of a clone, or in reserved huge pages, is copied). Blocks for about 20 ms.
    ///
    /// # Errors
    /// [`SnapshotError`]; the VM is gone.
    pub fn into_template(self) -> Result<Template, SnapshotError> {
        self.pause()?;
        let inner = self.inner().take();
        inner.ok_or(SnapshotError::Running).and_then(Template::of)
    }
}
