//! The embedding program's end of a connection.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::task::coop;

use super::conn::{CloseReason, Conn, ConnectionState, Side};

/// A connection with a program in the guest: reads and writes like a TCP or Unix stream.
///
/// - End of file comes after the guest has closed its sending direction and all its data was read.
/// - `shutdown` closes this side's sending direction; data written before is still delivered.
/// - Dropping the stream closes it; data written before is still delivered unless the guest takes
///   none of it for [`CLOSE_TIMEOUT`](super::CLOSE_TIMEOUT).
/// - Errors: [`BrokenPipe`](io::ErrorKind::BrokenPipe) on a write when the guest takes no more,
///   [`ConnectionReset`](io::ErrorKind::ConnectionReset) when the guest reset the connection (after
///   the data that it sent before was read),
///   [`ConnectionAborted`](io::ErrorKind::ConnectionAborted) when the VM has ended.
///
/// A write returns when the bytes are in this side's buffer, not when the guest has read them.
#[derive(Debug)]
pub struct VsockStream {
    conn: Arc<Conn>,
}

impl VsockStream {
    pub(super) fn new(conn: Arc<Conn>) -> Self {
        Self { conn }
    }

    /// The port on the host's side.
    #[must_use]
    pub fn host_port(&self) -> u32 {
        self.conn.key.host
    }

    /// The port on the guest's side.
    #[must_use]
    pub fn guest_port(&self) -> u32 {
        self.conn.key.guest
    }

    /// Asks that this connection survive a snapshot: in a VM restored from it, the guest's end
    /// continues unchanged, and [`VsockHost::reattach`](super::VsockHost::reattach) gives the
    /// host's end. That holds only if nothing is in flight on the host's side at the moment of the
    /// snapshot (both buffers empty, neither direction closed); else the restored guest sees a
    /// reset, as for every other connection.
    pub fn mark_durable(&self) {
        self.conn
            .change_from_host(|connection| connection.durable = true);
    }

    /// Accepts the connection that the guest requested.
    pub(super) fn accept(&self) {
        self.conn.change_from_host(ConnectionState::accept);
    }

    /// Closes the receiving direction: unread data from the guest is discarded, and the guest's
    /// next write fails.
    pub(super) fn shut_receive(&self) {
        self.conn.change_from_host(ConnectionState::shut_receive);
    }

    /// Resolves once the guest receives no more from this side.
    pub(super) async fn refused(&self) {
        std::future::poll_fn(|cx| {
            self.conn
                .poll(cx, Side::Refused, |connection| connection.poll_refused())
        })
        .await;
    }

    pub(super) fn poll_connected(&self, cx: &Context<'_>) -> Poll<Result<(), CloseReason>> {
        self.conn
            .poll(cx, Side::Writer, |connection| connection.poll_connected())
    }
}

impl AsyncRead for VsockStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut &*self).poll_read(cx, buf)
    }
}

impl AsyncWrite for VsockStream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut &*self).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut &*self).poll_shutdown(cx)
    }
}

/// For one task that reads and one that writes. Of two that read, or two that write, only the one
/// that polled last is woken.
impl AsyncRead for &VsockStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        // A guest that always has data must not keep the runtime's worker from other tasks.
        let turn = ready!(coop::poll_proceed(cx));
        let done = self
            .conn
            .poll(cx, Side::Reader, |connection| connection.poll_read(buf));
        if done.is_ready() {
            turn.made_progress();
        }
        done
    }
}

/// As for reading.
impl AsyncWrite for &VsockStream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let turn = ready!(coop::poll_proceed(cx));
        let done = self
            .conn
            .poll(cx, Side::Writer, |connection| connection.poll_write(buf));
        if done.is_ready() {
            turn.made_progress();
        }
        done
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.conn.change_from_host(ConnectionState::shut_send);
        Poll::Ready(Ok(()))
    }
}

impl Drop for VsockStream {
    fn drop(&mut self) {
        let now = Instant::now();
        let news = self
            .conn
            .change_from_host(|connection| connection.hang_up(now));
        if news && let Some(hub) = self.conn.hub() {
            hub.report_drop(Arc::clone(&self.conn));
        }
    }
}
