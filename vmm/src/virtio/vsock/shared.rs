//! State that a device and its host handles share.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use parking_lot::Mutex as FairMutex;

use super::conn::Conn;
use super::lock;
use super::muxer::Muxer;
use crate::virtio::Doorbell;

/// The shared state. Lock order: `muxer`, then a connection's state or `inbox`, never both of
/// these. Streams take only the last two, so that bulk I/O never waits for a device's run.
#[derive(Debug)]
pub(super) struct Hub {
    doorbell: Doorbell,
    /// Handed to a waiting thread after each turn of the device (see [`FairMutex`]).
    pub(super) muxer: FairMutex<Muxer>,
    inbox: Mutex<Inbox>,
}

/// Connections that host tasks left for the device's next run. Each connection is in each list at
/// most once.
#[derive(Debug, Default)]
pub(super) struct Inbox {
    /// Connections with a packet pending for the guest.
    pub(super) ready: VecDeque<Arc<Conn>>,
    /// Connections whose host end was dropped.
    pub(super) dropped: Vec<Arc<Conn>>,
}

impl Hub {
    pub(super) fn new(doorbell: Doorbell, muxer: Muxer) -> Self {
        Self {
            doorbell,
            muxer: FairMutex::new(muxer),
            inbox: Mutex::default(),
        }
    }

    pub(super) fn ring(&self) {
        self.doorbell.ring();
    }

    /// Requests a turn for `conn`, which was just marked as scheduled.
    pub(super) fn request_turn(&self, conn: Arc<Conn>) {
        lock(&self.inbox).ready.push_back(conn);
        self.ring();
    }

    /// Reports that the host's end of `conn` was dropped.
    pub(super) fn report_drop(&self, conn: Arc<Conn>) {
        lock(&self.inbox).dropped.push(conn);
        self.ring();
    }

    pub(super) fn take_inbox(&self) -> Inbox {
        std::mem::take(&mut lock(&self.inbox))
    }

    /// Ends all connections because the VM has ended: every stream gets an error, every pending
    /// connect and accept fails.
    pub(super) fn close(&self) {
        self.muxer.lock().close();
        drop(self.take_inbox());
    }
}
