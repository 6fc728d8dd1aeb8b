//! How a VM ends: the first reported cause wins, everyone who waits is told.

use std::future::Future;
use std::sync::{Arc, OnceLock};

use crate::legacy::console::Console;
use crate::state::Exit;
use crate::vcpu::control::{RunState, VcpuControl};
use crate::virtio::vsock::VsockHost;
use crate::wake::Notice;

/// Shared by a VM's threads; the only place that decides how the VM ended.
#[derive(Debug)]
pub(crate) struct ExitEvent {
    cause: Arc<Cause>,
    control: Arc<VcpuControl>,
    console: Console,
    vsock: OnceLock<VsockHost>,
}

/// How the VM ended, for those who wait for that and keep nothing else of it.
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

    /// The streams to end with the VM. Called once, before any vCPU runs.
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

    /// How it ended, if it did.
    pub(crate) fn known(&self) -> Option<Exit> {
        self.cause.exit.get().cloned()
    }

    /// Waits until it has ended.
    pub(crate) fn ended(&self) -> impl Future<Output = Exit> + Send + 'static {
        let cause = Arc::clone(&self.cause);
        async move { cause.known.until(|| cause.exit.get().cloned()).await }
    }
}
