//! Connections that programs in the guest open.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, Weak};

use super::host::ListenError;
use super::lock;
use super::muxer::BACKLOG;
use super::shared::Hub;
use super::stream::VsockStream;
use crate::wake::Notice;

/// Connections that wait to be accepted.
#[derive(Debug, Default)]
pub(super) struct Backlog {
    waiting: Mutex<Waiting>,
    changed: Notice,
}

#[derive(Debug, Default)]
struct Waiting {
    streams: VecDeque<VsockStream>,
    /// No more connections will come.
    closed: bool,
}

impl Backlog {
    /// Whether there is room for another connection.
    pub(super) fn has_room(&self) -> bool {
        lock(&self.waiting).streams.len() < BACKLOG
    }

    pub(super) fn push(&self, stream: VsockStream) {
        lock(&self.waiting).streams.push_back(stream);
        self.changed.post();
    }

    pub(super) fn close(&self) {
        lock(&self.waiting).closed = true;
        self.changed.post();
    }

    /// Waits for the next connection. Cancel-safe.
    async fn next(&self) -> Result<VsockStream, ListenError> {
        let look = || {
            let mut waiting = lock(&self.waiting);
            let next = waiting.streams.pop_front().map(Ok);
            next.or_else(|| waiting.closed.then_some(Err(ListenError::VmEnded)))
        };
        self.changed.until(look).await
    }
}

/// A port of the host to which programs in the guest connect. Dropping it closes the connections
/// that were not accepted and frees the port.
#[derive(Debug)]
pub struct VsockListener {
    port: u32,
    backlog: Arc<Backlog>,
    hub: Weak<Hub>,
}

impl VsockListener {
    pub(super) fn new(port: u32, backlog: Arc<Backlog>, hub: Weak<Hub>) -> Self {
        Self { port, backlog, hub }
    }

    /// The port.
    #[must_use]
    pub fn port(&self) -> u32 {
        self.port
    }

    /// Waits for the next connection of the guest; it is established already. Cancel-safe.
    ///
    /// # Errors
    /// [`ListenError::VmEnded`].
    pub async fn accept(&mut self) -> Result<VsockStream, ListenError> {
        self.backlog.next().await
    }
}

impl Drop for VsockListener {
    fn drop(&mut self) {
        if let Some(hub) = self.hub.upgrade() {
            hub.muxer.lock().unlisten(self.port);
        }
    }
}

/// All ports of the host that have no [`VsockListener`]. Dropping it refuses the connections that
/// wait.
#[derive(Debug)]
pub struct VsockAnyListener {
    backlog: Arc<Backlog>,
    hub: Weak<Hub>,
}

impl VsockAnyListener {
    pub(super) fn new(backlog: Arc<Backlog>, hub: Weak<Hub>) -> Self {
        Self { backlog, hub }
    }

    /// Waits for the next connection that the guest requests. Cancel-safe.
    ///
    /// # Errors
    /// [`ListenError::VmEnded`].
    pub async fn next(&mut self) -> Result<VsockIncoming, ListenError> {
        let stream = self.backlog.next().await?;
        Ok(VsockIncoming { stream })
    }
}

impl Drop for VsockAnyListener {
    fn drop(&mut self) {
        if let Some(hub) = self.hub.upgrade() {
            hub.muxer.lock().unlisten_any();
        }
    }
}

/// A connection that the guest has requested and the host has not answered. Dropping it refuses it.
#[derive(Debug)]
pub struct VsockIncoming {
    stream: VsockStream,
}

impl VsockIncoming {
    /// The port of the host that the guest connects to.
    #[must_use]
    pub fn host_port(&self) -> u32 {
        self.stream.host_port()
    }

    /// The port on the guest's side.
    #[must_use]
    pub fn guest_port(&self) -> u32 {
        self.stream.guest_port()
    }

    /// Establishes the connection.
    #[must_use]
    pub fn accept(self) -> VsockStream {
        self.stream.accept();
        self.stream
    }
}
