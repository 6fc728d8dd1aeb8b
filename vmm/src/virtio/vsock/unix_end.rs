//! What a bridged Unix socket's peer does last.

use std::io;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream as StdStream;

use rustix::io::Errno;
use rustix::net::{SendFlags, send};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;

/// A Unix socket's end of the bridge by a descriptor of its own, beside the one that is read and
/// written.
pub(super) struct UnixEnd(AsyncFd<StdStream>);

impl UnixEnd {
    pub(super) fn of(socket: &UnixStream) -> io::Result<Self> {
        let again = StdStream::from(socket.as_fd().try_clone_to_owned()?);
        // The end of one direction stays readable for ever, and would keep who waits for both
        // awake. SAFETY: the standard library's socket owns its descriptor: it is open, and
        // the same one, for as long as the value is.
        let end = unsafe { AsyncFd::register_with_interest(again, Interest::WRITABLE) };
        Ok(Self(end?))
    }

    /// Resolves once the peer receives no more. Cancel-safe.
    pub(super) async fn refused(&self) {
        while let Ok(mut guard) = self.0.ready(Interest::WRITABLE).await {
            if self.refuses() {
                return;
            }
            guard.clear_ready();
        }
    }

    /// Whether the peer receives no more. That it does not, though it still sends, is no readiness
    /// of the socket's, but the change wakes whoever waits for one.
    fn refuses(&self) -> bool {
        // Nothing is sent, but whether it could be is looked at.
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        matches!(send(self.0.get_ref(), &[], flags), Err(Errno::PIPE))
    }

    /// Takes no more from the peer: its next write fails.
    pub(super) fn shut_receive(&self) {
        // It fails where the peer is gone.
        let _ = self.0.get_ref().shutdown(Shutdown::Read);
    }
}
