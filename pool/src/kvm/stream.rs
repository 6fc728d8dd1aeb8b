//! A vsock stream that counts what moves on it, so that the pool can tell an idle lease.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};

use hearth_vmm::virtio::vsock::VsockStream;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// A stream to a port of a guest.
#[derive(Debug)]
pub struct GuestStream {
    stream: VsockStream,
    activity: Arc<AtomicU64>,
}

impl GuestStream {
    pub(super) fn new(stream: VsockStream, activity: Arc<AtomicU64>) -> Self {
        Self { stream, activity }
    }

    /// Lets the connection survive in the clones of a template that is now made of its guest.
    pub(super) fn mark_durable(&self) {
        self.stream.mark_durable();
    }

    fn moved(&self) {
        self.activity.fetch_add(1, Ordering::Relaxed);
    }
}

impl AsyncRead for GuestStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let read = Pin::new(&mut self.stream).poll_read(cx, buffer);
        if read.is_ready() {
            self.moved();
        }
        read
    }
}

impl AsyncWrite for GuestStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        if written.is_ready() {
            self.moved();
        }
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
