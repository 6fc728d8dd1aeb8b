//! A vsock stream that reports its activity, so that the pool can tell when a lease is idle.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use hearth_vmm::virtio::vsock::VsockStream;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::activity::{Activity, Part};

/// A stream to a port of a guest.
///
/// A task that reads on it, and waits for more to come, keeps its lease from being ended at the
/// idle limit ([`LeaseConfig::idle_ms`](crate::config::LeaseConfig::idle_ms)), as long as the task
/// reads again when it is woken.
#[derive(Debug)]
pub struct GuestStream {
    stream: VsockStream,
    part: Part,
}

impl GuestStream {
    pub(super) fn new(stream: VsockStream, activity: Arc<Activity>) -> Self {
        let part = Part::new(activity);
        Self { stream, part }
    }

    /// Marks the stream as used by the owner of the lease.
    pub(super) fn mark_owned(&self) {
        self.part.set_owned();
    }

    /// Marks that a program of the owner's runs on the stream.
    pub(super) fn mark_running(&self) {
        self.part.set_runs();
    }

    /// Lets the connection persist in the clones of a template that is about to be made of its
    /// guest.
    pub(super) fn mark_durable(&self) {
        self.stream.mark_durable();
    }
}

impl AsyncRead for GuestStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let read = Pin::new(&mut self.stream).poll_read(cx, buffer);
        match read {
            Poll::Ready(_) => self.part.read(),
            Poll::Pending => self.part.found_nothing(cx.waker()),
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
            self.part.wrote();
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
