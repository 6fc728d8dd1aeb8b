//! The number of connections of a device, limited by places.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::muxer::{MAX_CONNECTIONS, NARROW_WINDOW, WIDE_CONNECTIONS, WIDE_WINDOW};

/// The places of a device for connections. A connection that the guest has reset keeps its place
/// until the host's end is dropped as well: it may hold a window full of bytes, in a backlog or in
/// a task that does not read, and the guest could otherwise open the next one.
#[derive(Debug, Default)]
pub(super) struct Places(Arc<Taken>);

#[derive(Debug, Default)]
struct Taken {
    all: AtomicUsize,
    wide: AtomicUsize,
}

/// A connection's place; freed when dropped.
#[derive(Debug)]
pub(super) struct Place {
    taken: Arc<Taken>,
    wide: bool,
}

impl Places {
    /// Whether no place is free.
    pub(super) fn are_taken(&self) -> bool {
        self.0.all.load(Ordering::Relaxed) >= MAX_CONNECTIONS
    }

    /// Bytes that the next connection may buffer in each direction.
    pub(super) fn next_window(&self) -> u32 {
        if self.0.wide.load(Ordering::Relaxed) < WIDE_CONNECTIONS {
            WIDE_WINDOW
        } else {
            NARROW_WINDOW
        }
    }

    /// Takes a place for a connection with this window. Callers hold the muxer's lock, so that no
    /// place is given twice.
    pub(super) fn take(&self, window: u32) -> Place {
        let wide = window > NARROW_WINDOW;
        self.0.all.fetch_add(1, Ordering::Relaxed);
        self.0.wide.fetch_add(usize::from(wide), Ordering::Relaxed);
        Place {
            taken: Arc::clone(&self.0),
            wide,
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.taken.all.fetch_sub(1, Ordering::Relaxed);
        let wide = usize::from(self.wide);
        self.taken.wide.fetch_sub(wide, Ordering::Relaxed);
    }
}
