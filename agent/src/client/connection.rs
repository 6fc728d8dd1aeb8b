//! A stream with its partly sent and partly received frames. Every method may be cancelled and
//! called again.

use std::{
    future::poll_fn,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::error::ConnectionError;
use crate::proto::{FrameBuffer, FrameError, Hello, Request, Response, encode};

#[derive(Debug)]
pub(super) struct Connection<S> {
    stream: S,
    input: FrameBuffer,
    output: Vec<u8>,
    /// The number of bytes of `output` that the stream has taken.
    sent: usize,
}

impl<S> Connection<S> {
    pub(super) fn new(stream: S) -> Self {
        Self {
            stream,
            input: FrameBuffer::new(),
            output: Vec::new(),
            sent: 0,
        }
    }

    pub(super) fn stream(&self) -> &S {
        &self.stream
    }

    pub(super) fn into_stream(self) -> S {
        self.stream
    }

    /// Queues a hello; the next flush sends it.
    pub(super) fn queue_hello(&mut self) -> Result<(), FrameError> {
        Hello::default().encode(&mut self.output)
    }

    /// Queues a request; the next flush sends it.
    pub(super) fn queue(&mut self, request: &Request<'_>) -> Result<(), FrameError> {
        encode(request, &mut self.output)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    /// Writes the queued output.
    pub(super) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ConnectionError>> {
        while let Some(rest) = self.output.get(self.sent..).filter(|rest| !rest.is_empty()) {
            match ready!(Pin::new(&mut self.stream).poll_write(cx, rest))? {
                0 => return Poll::Ready(Err(ConnectionError::Closed)),
                count => self.sent += count,
            }
        }
        self.output.clear();
        self.sent = 0;
        Pin::new(&mut self.stream)
            .poll_flush(cx)
            .map_err(ConnectionError::from)
    }

    /// Reads once.
    pub(super) fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ConnectionError>> {
        let mut buffer = ReadBuf::new(self.input.spare()?);
        ready!(Pin::new(&mut self.stream).poll_read(cx, &mut buffer))?;
        match buffer.filled().len() {
            0 => Poll::Ready(Err(ConnectionError::Closed)),
            count => {
                self.input.filled(count);
                Poll::Ready(Ok(()))
            }
        }
    }

    /// Reads once if data is available now. No complete frame may be buffered.
    pub(super) async fn fill_now(&mut self) -> Result<(), ConnectionError> {
        poll_fn(|cx| match self.poll_fill(cx) {
            Poll::Ready(filled) => Poll::Ready(filled),
            Poll::Pending => Poll::Ready(Ok(())),
        })
        .await
    }

    /// Waits until a complete frame is buffered, writing queued output meanwhile.
    pub(super) async fn frame(&mut self) -> Result<(), ConnectionError> {
        poll_fn(|cx| {
            // Blocked output must not stop input from being read: the peer may be blocked in the
            // same way. Neither must failed output: the agent's last message explains why it closed
            // the connection, and may still be in transit.
            let _ = self.poll_flush(cx);
            loop {
                if self.input.peek()?.is_some() {
                    return Poll::Ready(Ok(()));
                }
                ready!(self.poll_fill(cx))?;
            }
        })
        .await
    }

    /// Writes all queued output.
    pub(super) async fn flush(&mut self) -> Result<(), ConnectionError> {
        poll_fn(|cx| self.poll_flush(cx)).await
    }

    /// Takes the next frame, if it is complete, and returns its payload.
    pub(super) fn take_frame(&mut self) -> Result<Option<&[u8]>, FrameError> {
        self.input.next_frame()
    }

    /// Takes the next response, if it is complete.
    pub(super) fn take(&mut self) -> Result<Option<Response<'_>>, ConnectionError> {
        accept(self.input.next_frame()?)
    }

    /// Returns the next response, if it is complete, without taking it.
    pub(super) fn peek(&self) -> Result<Option<Response<'_>>, ConnectionError> {
        accept(self.input.peek()?)
    }
}

/// Decodes a response; [`Response::Rejected`] becomes an error.
fn accept(payload: Option<&[u8]>) -> Result<Option<Response<'_>>, ConnectionError> {
    match payload.map(Response::decode).transpose()? {
        Some(Response::Rejected(reason)) => Err(ConnectionError::Rejected(reason)),
        other => Ok(other),
    }
}
