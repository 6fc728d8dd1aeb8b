//! virtio-vsock (virtio 1.2 section 5.10): stream sockets between the guest and its host program.
//!
//! ```text
//! VsockHost ─► VsockStream ─► conn (buffers, credit) ─► muxer (turns) ─► device ─► virtqueues
//! ```
//!
//! A [`VsockStream`] is two bounded buffers in memory, not a socket pair: a slow reader on either
//! side throttles its peer by credit, and a thousand connections cost no file descriptors. Host
//! tasks access only their connection's buffers and ring the device's doorbell when it has to act;
//! all queue work is done by [`VsockDevice::run`](super::VirtioDevice::run), a bounded amount at a
//! time.
//!
//! Bounds: at most [`MAX_CONNECTIONS`] connections, including those that the guest has reset and
//! whose host end is not dropped yet. The first [`WIDE_CONNECTIONS`] of them may buffer
//! [`WIDE_WINDOW`] bytes in each direction, the others [`NARROW_WINDOW`]: a hostile guest can make
//! its host hold 184 MiB of received bytes, if that many connections are accepted or wait in
//! backlogs and none is read. Buffers take memory only while they hold bytes.
//!
//! Deliberately absent: datagrams, seqpacket, traffic between guests, and any socket of the host's
//! kernel (the opt-in Unix-socket bridge is a client of [`VsockHost`] like any other).

mod buffer;
mod chain;
mod conn;
mod credit;
mod device;
mod established;
mod host;
mod listener;
mod muxer;
pub mod packet;
mod places;
mod shared;
mod state;
mod stream;
#[cfg(any(test, feature = "testing"))]
#[doc(hidden)]
pub mod testing;
#[cfg(test)]
mod tests;
pub mod unix;
mod unix_end;

use std::sync::{Mutex, MutexGuard, PoisonError};

pub use self::conn::CLOSE_TIMEOUT;
pub use self::device::VsockDevice;
pub use self::host::{CONNECT_TIMEOUT, ConnectError, ListenError, VsockHost};
pub use self::listener::{VsockAnyListener, VsockIncoming, VsockListener};
pub use self::muxer::{
    BACKLOG, MAX_CONNECTIONS, MAX_LISTENERS, NARROW_WINDOW, WIDE_CONNECTIONS, WIDE_WINDOW,
};
pub use self::state::{
    ConnState, CreditState, RawVsockState, RestoreOutcome, StateError, VsockState,
};
pub use self::stream::VsockStream;

/// Locks `mutex` even if it is poisoned: no panic leaves data here half-changed.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
