//! What a device and its host handles share.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use parking_lot::Mutex as FairMutex;

use super::conn::Conn;
use super::lock;
use super::muxer::Muxer;
use crate::virtio::Doorbell;

/// The meeting point. Lock order: `muxer`, then a connection's machine or `inbox`, never both of
/// these. Streams take only the last two, so that bulk I/O never waits for a device's run.
#[derive(Debug)]
pub(super) struct Hub {
    doorbell: Doorbell,
    /// Handed to whoever waits after each turn of the device (see [`FairMutex`]).
    pub(super) muxer: FairMutex<Muxer>,
    inbox: Mutex<Inbox>,
}

/// What host tasks left for the device's next run. Each connection is in each list at most once.
#[derive(Debug, Default)]
pub(super) struct Inbox {
    /// Owe the guest a packet.
    pub(super) ready: VecDeque<Arc<Conn>>,
    /// Were dropped by their host side.
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

    /// `conn`, just marked as scheduled, wants a turn.
    pub(super) fn request_turn(&self, conn: Arc<Conn>) {
        lock(&self.inbox).ready.push_back(conn);
        self.ring();
    }

    /// `conn`'s host side is gone.
    pub(super) fn report_drop(&self, conn: Arc<Conn>) {
        lock(&self.inbox).dropped.push(conn);
        self.ring();
    }

    pub(super) fn take_inbox(&self) -> Inbox {
        std::mem::take(&mut lock(&self.inbox))
    }

    /// The VM has ended: every stream gets an error, every pending connect and accept fails.
    pub(super) fn close(&self) {
        self.muxer.lock().close();
        drop(self.take_inbox());
    }
}
