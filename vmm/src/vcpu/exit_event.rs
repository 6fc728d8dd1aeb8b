//! How a VM ended: the first reported cause wins, and all waiting tasks are notified.

use std::future::Future;
use std::sync::{Arc, OnceLock};

use super::control::{RunState, VcpuControl};
use crate::legacy::console::Console;
use crate::state::Exit;
use crate::virtio::vsock::VsockHost;
use crate::wake::Notice;

/// Records how the VM ended, and is the only place that decides it. Shared by the VM's threads.
#[derive(Debug)]
pub(crate) struct ExitEvent {
    cause: Arc<Cause>,
    control: Arc<VcpuControl>,
    console: Console,
    vsock: OnceLock<VsockHost>,
}

/// How the VM ended. Waiting tasks keep this part only, nothing else of the VM.
#[derive(Debug, Default)]
struct Cause {
    exit: OnceLock<Exit>,
    known: Notice,
}

impl ExitEvent {
    pub(crate) fn new(control: Arc<VcpuControl>, console: Console) -> Self {
        Self {
            cause: Arc::default(),
            control,
            console,
            vsock: OnceLock::new(),
        }
    }

    /// Sets the vsock host whose streams end with the VM. Called once, before any vCPU runs.
    pub(crate) fn ends_streams(&self, vsock: VsockHost) {
        let _ = self.vsock.set(vsock);
    }

    /// Records how the VM ended, unless that is known already, and stops its vCPUs. Does not wait.
    pub(crate) fn report(&self, exit: Exit) {
        let first = self.cause.exit.set(exit).is_ok();
        self.control.set(RunState::Stop);
        if first {
            self.cause.known.post();
            self.console.close();
            if let Some(vsock) = self.vsock.get() {
                vsock.close();
            }
            if let Some(exit) = self.cause.exit.get() {
                tracing::debug!(%exit, "VM ended");
            }
        }
    }

    /// Returns how the VM ended, if it has.
    pub(crate) fn known(&self) -> Option<Exit> {
        self.cause.exit.get().cloned()
    }

    /// Waits until the VM has ended.
    pub(crate) fn ended(&self) -> impl Future<Output = Exit> + Send + 'static {
        let cause = Arc::clone(&self.cause);
        async move { cause.known.until(|| cause.exit.get().cloned()).await }
    }
}
