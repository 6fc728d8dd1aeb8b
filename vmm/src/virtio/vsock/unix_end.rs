//! Half-close of a bridged Unix socket: detects that the peer receives no more, and stops receiving
//! from it.

use std::io;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream as StdStream;

use rustix::io::Errno;
use rustix::net::{SendFlags, send};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;

/// The bridge's end of a Unix socket, as a second descriptor besides the one that is read and
/// written.
pub(super) struct UnixEnd(AsyncFd<StdStream>);

impl UnixEnd {
    pub(super) fn of(socket: &UnixStream) -> io::Result<Self> {
        let again = StdStream::from(socket.as_fd().try_clone_to_owned()?);
        // Not readable as well: once the peer sends no more, the socket stays readable for ever,
        // and would keep waking a task that waits for both.
        // SAFETY: the standard library's socket owns its descriptor: it is open, and the same one,
        // for as long as the value is.
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

    /// Whether the peer receives no more. While the peer still sends, this is not a readiness of
    /// the socket, but the change wakes a task that waits for readiness.
    fn refuses(&self) -> bool {
        // Sends nothing; only checks whether sending is possible.
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        matches!(send(self.0.get_ref(), &[], flags), Err(Errno::PIPE))
    }

    /// Closes the receiving direction: the peer's next write fails.
    pub(super) fn shut_receive(&self) {
        // Fails if the peer is gone.
        let _ = self.0.get_ref().shutdown(Shutdown::Read);
    }
}
