//! The embedding program's handle on a device.

use std::future::poll_fn;
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::time::Instant;

use super::conn::{CloseReason, Key};
use super::listener::{VsockAnyListener, VsockListener};
use super::muxer::{BACKLOG, MAX_CONNECTIONS, MAX_LISTENERS};
use super::shared::Hub;
use super::stream::VsockStream;

/// How long [`VsockHost::connect`] waits for the guest's answer.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// First and longest pause of [`VsockHost::connect_retry`] between two attempts.
const RETRY_PAUSE: (Duration, Duration) = (Duration::from_millis(2), Duration::from_millis(100));

/// Why a connection to the guest was not established.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConnectError {
    /// The guest answered with a reset (virtio 1.2, 5.10.6.2): nothing listens on this port, or so
    /// many connections wait there that its kernel takes no more. The protocol does not distinguish
    /// the two.
    #[error(
        "the guest refused a connection to vsock port {0}: nothing listens there yet (connect_retry waits until it does), \
         or its listener has too many connections waiting (close some)"
    )]
    Refused(u32),
    /// The guest did not answer in time: its driver is not up, or it is stuck.
    #[error("the guest did not answer on vsock port {port} within {waited:?}")]
    TimedOut {
        /// The guest's port.
        port: u32,
        /// How long the host waited.
        waited: Duration,
    },
    /// The VM has ended.
    #[error("the VM has ended")]
    VmEnded,
    /// The device's table is full.
    #[error("{MAX_CONNECTIONS} vsock connections are open; close some first")]
    TooMany,
}

/// Why the host cannot listen, or no longer listens, on a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ListenError {
    /// There is a listener on this port; drop it first.
    #[error("vsock port {0} has a listener already; drop it first")]
    InUse(u32),
    /// There is a listener for all ports already; drop it first.
    #[error("vsock ports without a listener have one for all of them already; drop it first")]
    AnyInUse,
    /// The VM has ended.
    #[error("the VM has ended")]
    VmEnded,
    /// Too many listeners.
    #[error("{MAX_LISTENERS} vsock listeners are open; drop some first")]
    TooMany,
}

/// Opens and accepts vsock connections of one VM. Cheap to clone; does not keep the VM alive.
#[derive(Clone, Debug)]
pub struct VsockHost {
    hub: Weak<Hub>,
}

impl VsockHost {
    pub(super) fn new(hub: &Arc<Hub>) -> Self {
        Self {
            hub: Arc::downgrade(hub),
        }
    }

    /// [`VsockHost::connect_timeout`] with [`CONNECT_TIMEOUT`].
    ///
    /// # Errors
    /// See [`ConnectError`].
    pub async fn connect(&self, guest_port: u32) -> Result<VsockStream, ConnectError> {
        self.connect_timeout(guest_port, CONNECT_TIMEOUT).await
    }

    /// Connects to a program in the guest. Resolves when the guest has answered, not before. A
    /// guest whose driver is not up yet gets the request once it is, if that is in time. Needs a
    /// tokio runtime with its timer.
    ///
    /// Cancel-safe: dropping the future closes the connection.
    ///
    /// # Errors
    /// See [`ConnectError`].
    pub async fn connect_timeout(
        &self,
        guest_port: u32,
        limit: Duration,
    ) -> Result<VsockStream, ConnectError> {
        let stream = {
            let hub = self.hub.upgrade().ok_or(ConnectError::VmEnded)?;
            let stream = hub.muxer.lock().connect(guest_port)?;
            hub.ring();
            stream
        };
        let answer = tokio::time::timeout(limit, poll_fn(|cx| stream.poll_connected(cx))).await;
        match answer {
            Ok(Ok(())) => Ok(stream),
            Ok(Err(CloseReason::VmEnded)) => Err(ConnectError::VmEnded),
            Ok(Err(_)) => Err(ConnectError::Refused(guest_port)),
            Err(_) => Err(ConnectError::TimedOut {
                port: guest_port,
                waited: limit,
            }),
        }
    }

    /// Connects to a program that may not listen yet: tries again after a refusal, with pauses that
    /// grow to 100 ms, until `deadline`. Cancel-safe.
    ///
    /// # Errors
    /// The last [`ConnectError::Refused`], or [`ConnectError::TimedOut`] if the guest did not
    /// answer at all; [`ConnectError::VmEnded`] and [`ConnectError::TooMany`] at once.
    pub async fn connect_retry(
        &self,
        guest_port: u32,
        deadline: Instant,
    ) -> Result<VsockStream, ConnectError> {
        let mut pause = RETRY_PAUSE.0;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.connect_timeout(guest_port, left).await {
                Err(ConnectError::Refused(_)) if Instant::now() + pause < deadline => {
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(RETRY_PAUSE.1);
                }
                outcome => return outcome,
            }
        }
    }

    /// Listens on a port of the host. At most 128 connections wait to be accepted; the guest's next
    /// one is refused, like one to a port without a listener.
    ///
    /// # Errors
    /// See [`ListenError`].
    pub fn listen(&self, port: u32) -> Result<VsockListener, ListenError> {
        const { assert!(BACKLOG == 128) };
        let hub = self.hub.upgrade().ok_or(ListenError::VmEnded)?;
        let backlog = hub.muxer.lock().listen(port)?;
        Ok(VsockListener::new(port, backlog, Weak::clone(&self.hub)))
    }

    /// Listens on every port that has no listener of its own, and lets the host decide on each
    /// connection. At most 128 connections wait for a decision.
    ///
    /// # Errors
    /// See [`ListenError`].
    pub fn listen_any(&self) -> Result<VsockAnyListener, ListenError> {
        let hub = self.hub.upgrade().ok_or(ListenError::VmEnded)?;
        let backlog = hub.muxer.lock().listen_any()?;
        Ok(VsockAnyListener::new(backlog, Weak::clone(&self.hub)))
    }

    /// Returns the host's end of a connection that survived a restore (see
    /// [`VsockStream::mark_durable`]); `None` if it did not survive or was reattached before.
    #[must_use]
    pub fn reattach(&self, guest_port: u32, host_port: u32) -> Option<VsockStream> {
        let hub = self.hub.upgrade()?;
        hub.muxer.lock().reattach(Key {
            host: host_port,
            guest: guest_port,
        })
    }

    /// As [`VsockHost::reattach`], for all connections that survived and were not reattached
    /// before, in no particular order.
    #[must_use]
    pub fn reattach_all(&self) -> Vec<VsockStream> {
        let hub = self.hub.upgrade();
        hub.map_or_else(Vec::new, |hub| hub.muxer.lock().reattach_all())
    }

    /// Marks the VM as ended: streams fail with [`ConnectionAborted`](std::io::ErrorKind) after the
    /// bytes that the guest sent are read; pending and new connects and accepts fail. Also happens
    /// when the device is dropped.
    pub fn close(&self) {
        if let Some(hub) = self.hub.upgrade() {
            hub.close();
        }
    }
}
