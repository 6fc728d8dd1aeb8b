//! What a bridged Unix socket's peer does last.

use std::io;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream as StdStream;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;

/// A Unix socket's end of the bridge by a descriptor of its own, beside the one that is read and written.
pub(super) struct UnixEnd(AsyncFd<StdStream>);

impl UnixEnd {
    pub(super) fn of(socket: &UnixStream) -> io::Result<Self> {
        let again = StdStream::from(socket.as_fd().try_clone_to_owned()?);
        // The end of one direction stays readable for ever, and would keep who waits for both awake.
        // SAFETY: the standard library's socket owns its descriptor: it is open, and the same one, for as
        // long as the value is.
        let end = unsafe { AsyncFd::register_with_interest(again, Interest::WRITABLE) };
        Ok(Self(end?))
    }

    /// Resolves once the peer neither sends nor receives any more. Cancel-safe.
    pub(super) async fn hung_up(&self) {
        while let Ok(mut guard) = self.0.ready(Interest::WRITABLE).await {
            if guard.ready().is_write_closed() {
                return;
            }
            guard.clear_ready();
        }
    }

    /// Takes no more from the peer: its next write fails.
    pub(super) fn shut_receive(&self) {
        // It fails where the peer is gone.
        let _ = self.0.get_ref().shutdown(Shutdown::Read);
    }
}
