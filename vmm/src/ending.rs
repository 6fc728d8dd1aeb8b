//! How a VM ends: the first reported cause wins, everyone who waits is told.

use std::sync::{Arc, OnceLock};

use tokio::sync::watch;

use crate::legacy::console::Console;
use crate::state::Exit;
use crate::vcpu::gate::{Gate, Want};
use crate::virtio::vsock::VsockHost;

/// Shared by a VM's threads; the only place that decides how the VM ended.
#[derive(Debug)]
pub(crate) struct Ending {
    exit: watch::Sender<Option<Exit>>,
    gate: Arc<Gate>,
    console: Console,
    vsock: OnceLock<VsockHost>,
}

impl Ending {
    pub(crate) fn new(gate: Arc<Gate>, console: Console) -> Self {
        Self {
            exit: watch::Sender::new(None),
            gate,
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
        let first = self.exit.send_if_modified(|known| {
            let first = known.is_none();
            if first {
                tracing::debug!(%exit, "VM ended");
                *known = Some(exit);
            }
            first
        });
        self.gate.set(Want::Stop);
        if first {
            self.console.close();
            if let Some(vsock) = self.vsock.get() {
                vsock.close();
            }
        }
    }

    /// How it ended, if it did.
    pub(crate) fn known(&self) -> Option<Exit> {
        self.exit.borrow().clone()
    }

    pub(crate) fn watch(&self) -> watch::Receiver<Option<Exit>> {
        self.exit.subscribe()
    }
}
