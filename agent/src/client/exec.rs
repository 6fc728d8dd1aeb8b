//! A program that runs in a guest, and its streams.

use std::{
    future::poll_fn,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::Instant,
};

use super::{
    AgentClient, cancelled,
    error::{ConnectionError, ExecError},
    output::{Output, OutputLimits, collect},
    shared::{Handle, Queue, Shared, State},
};
use crate::proto::{Exited, MAX_CHUNK, Request, WindowSize};

/// A program that runs in a guest. Dropping this, also in the middle of [`wait`](Self::wait), kills
/// the program and all that it started.
///
/// As with a process on the host, a program blocks while its output is not read: read both streams
/// concurrently, or use [`output`](Self::output).
#[derive(Debug)]
pub struct Exec<S> {
    /// None once [`finish`](Self::finish) took the connection.
    shared: Option<Arc<Shared<S>>>,
    pid: u32,
    started: Instant,
    bound: Option<Duration>,
    margin: Duration,
    stdin: Option<ExecStdin<S>>,
    stdout: Option<ExecOutput<S>>,
    stderr: Option<ExecOutput<S>>,
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Exec<S> {
    pub(super) fn new(
        shared: Arc<Shared<S>>,
        pid: u32,
        bound: Option<Duration>,
        margin: Duration,
    ) -> Self {
        Self {
            pid,
            started: Instant::now(),
            bound,
            margin,
            stdin: Some(ExecStdin {
                shared: shared.clone(),
            }),
            stdout: Some(ExecOutput {
                shared: shared.clone(),
                handle: Handle::Stdout,
            }),
            stderr: Some(ExecOutput {
                shared: shared.clone(),
                handle: Handle::Stderr,
            }),
            shared: Some(shared),
        }
    }

    /// Returns the program's process id in the guest.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Takes the writer of the program's stdin; none the second time. Dropping the writer ends the
    /// input.
    pub fn stdin(&mut self) -> Option<ExecStdin<S>> {
        self.stdin.take()
    }

    /// Takes the reader of the program's stdout; none the second time. Dropping the reader discards
    /// further output.
    pub fn stdout(&mut self) -> Option<ExecOutput<S>> {
        self.stdout.take()
    }

    /// Takes the reader of the program's stderr; none the second time. Dropping the reader discards
    /// further output.
    pub fn stderr(&mut self) -> Option<ExecOutput<S>> {
        self.stderr.take()
    }

    /// Sends a signal (1 to 64) to the program's process group; ignored if the program has ended.
    ///
    /// # Errors
    /// [`ConnectionError`] if the connection is closed or failed.
    ///
    /// # Cancel safety
    /// The signal may or may not be sent; it is never sent partly.
    pub async fn signal(&mut self, signal: u8) -> Result<(), ConnectionError> {
        self.tell(Request::Signal(signal)).await
    }

    /// Sets the size of the program's terminal, which sends SIGWINCH to the program. Ignored if it
    /// has no terminal.
    ///
    /// # Errors
    /// [`ConnectionError`] if the connection is closed or failed.
    ///
    /// # Cancel safety
    /// As [`signal`](Self::signal).
    pub async fn resize(&mut self, size: WindowSize) -> Result<(), ConnectionError> {
        self.tell(Request::Resize(size)).await
    }

    /// Sends a request that has no answer.
    async fn tell(&mut self, request: Request<'static>) -> Result<(), ConnectionError> {
        let shared = self.shared()?;
        let mut request = Some(request);
        poll_fn(|cx| {
            shared.poll_until(Handle::Main, cx, |state, cx| {
                if state.end.is_some() {
                    return Poll::Ready(Ok(()));
                }
                if let Some(request) = request.take()
                    && let Err(error) = state.send(&request, cx)
                {
                    return Poll::Ready(Err(error));
                }
                state.poll_flush(cx)
            })
        })
        .await
    }

    /// Waits for the program's end. Input ends and output is discarded, except for streams whose
    /// handles were taken and still exist.
    ///
    /// # Errors
    /// [`ExecError::Overdue`] if the program has a timeout and the guest does not enforce it;
    /// [`ExecError::Connection`].
    ///
    /// # Cancel safety
    /// Dropping the future kills the program.
    pub async fn wait(mut self) -> Result<Exited, ExecError> {
        self.ended().await
    }

    /// As [`wait`](Self::wait), and returns the connection for the next request. Stream handles
    /// that still exist can read the rest of the output.
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    ///
    /// # Cancel safety
    /// Dropping the future kills the program.
    pub async fn finish(mut self) -> Result<(Exited, AgentClient<S>), ExecError> {
        let exited = self.ended().await?;
        let client = self
            .shared
            .take()
            .and_then(|shared| shared.change(|state| state.client.take()));
        Ok((exited, client.ok_or(ConnectionError::Closed)?))
    }

    /// Ends the input, collects the output up to `limits`, and waits for the end.
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    ///
    /// # Cancel safety
    /// Dropping the future kills the program.
    pub async fn output(self, limits: OutputLimits) -> Result<Output, ExecError> {
        self.output_with(&[], limits).await
    }

    /// Writes `input` to the program's stdin, collects the output up to `limits`, and waits for the
    /// end. A program that does not read all of its input is no error.
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    ///
    /// # Cancel safety
    /// Dropping the future kills the program.
    pub async fn output_with(
        self,
        input: &[u8],
        limits: OutputLimits,
    ) -> Result<Output, ExecError> {
        collect(self, input, limits).await
    }

    /// Waits for the program's end without consuming the handle.
    pub(super) async fn ended(&mut self) -> Result<Exited, ExecError> {
        drop((self.stdin.take(), self.stdout.take(), self.stderr.take()));
        let shared = self.shared()?;
        let ended = poll_fn(|cx| {
            shared.poll_until(Handle::Main, cx, |state, _| match &state.end {
                Some(end) => Poll::Ready(end.clone()),
                None if state.client.is_none() => Poll::Ready(Err(ConnectionError::Closed)),
                None => Poll::Pending,
            })
        });
        let Some(bound) = self.bound else {
            return Ok(ended.await?);
        };
        tokio::pin!(ended);
        loop {
            // A guest that still sends output is not overdue: the reader may be slow.
            let heard = shared.change(|state| state.heard);
            let due = self
                .started
                .checked_add(bound)
                .unwrap_or(heard)
                .max(heard)
                .checked_add(self.margin);
            let Some(due) = due else {
                return Ok(ended.await?);
            };
            if Instant::now() >= due {
                return Err(ExecError::Overdue(self.margin));
            }
            if let Ok(end) = tokio::time::timeout_at(due, &mut ended).await {
                return Ok(end?);
            }
        }
    }

    pub(super) fn shared(&self) -> Result<Arc<Shared<S>>, ConnectionError> {
        self.shared.clone().ok_or(ConnectionError::Closed)
    }
}

impl<S> Drop for Exec<S> {
    fn drop(&mut self) {
        if let Some(shared) = &self.shared {
            // Closing the connection kills the program. Streams that outlive this handle must not
            // keep the connection open.
            drop(shared.change(|state| state.client.take()));
        }
    }
}

/// Writes a program's stdin. [`shutdown`](tokio::io::AsyncWriteExt::shutdown) or dropping it ends
/// the input.
///
/// A write returns once its data is queued for sending; the agent holds at most
/// [`STDIN_WINDOW`](crate::proto::STDIN_WINDOW) bytes that the program has not read. Once the
/// program has closed its stdin, writes fail with `BrokenPipe`.
#[derive(Debug)]
pub struct ExecStdin<S> {
    shared: Arc<Shared<S>>,
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> AsyncWrite for ExecStdin<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if bytes.is_empty() {
            return Poll::Ready(Ok(0));
        }
        self.shared.poll_until(Handle::Stdin, cx, |state, cx| {
            if let Some(error) = state.failure() {
                return Poll::Ready(Err(error));
            }
            if !state.stdin.open || state.end.is_some() {
                return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
            }
            // One chunk at a time, so that the queued output is bounded.
            ready!(state.poll_flush(cx))?;
            let chunk = bytes
                .get(..bytes.len().min(state.stdin.window).min(MAX_CHUNK))
                .unwrap_or_default();
            if chunk.is_empty() {
                return Poll::Pending;
            }
            state.send(&Request::Stdin(chunk), cx)?;
            state.stdin.window = state.stdin.window.saturating_sub(chunk.len());
            Poll::Ready(Ok(chunk.len()))
        })
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.shared.poll_until(Handle::Stdin, cx, |state, cx| {
            if let Some(error) = state.failure() {
                return Poll::Ready(Err(error));
            }
            if state.end.is_some() {
                return Poll::Ready(Ok(()));
            }
            state.poll_flush(cx).map_err(io::Error::from)
        })
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.shared.change(|state| state.end_input());
        self.poll_flush(cx)
    }
}

impl<S> Drop for ExecStdin<S> {
    fn drop(&mut self) {
        // The end of input is sent when another handle of the program is polled.
        self.shared.change(State::queue_end_of_input);
    }
}

/// Reads a program's stdout or stderr up to its end. Reading fails if the connection fails before
/// that.
#[derive(Debug)]
pub struct ExecOutput<S> {
    shared: Arc<Shared<S>>,
    handle: Handle,
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> AsyncRead for ExecOutput<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let handle = self.handle;
        self.shared.poll_until(handle, cx, |state, _| {
            let queue = state.queue(handle);
            if queue.bytes.is_empty() {
                return match (&state.end, state.failure()) {
                    (Some(Ok(_)), _) => Poll::Ready(Ok(())),
                    (_, Some(error)) => Poll::Ready(Err(error)),
                    (_, None) => Poll::Pending,
                };
            }
            let (front, _) = queue.bytes.as_slices();
            let count = front.len().min(buffer.remaining());
            buffer.put_slice(front.get(..count).unwrap_or_default());
            queue.bytes.drain(..count);
            Poll::Ready(Ok(()))
        })
    }
}

impl<S> Drop for ExecOutput<S> {
    fn drop(&mut self) {
        let handle = self.handle;
        self.shared
            .change(|state| state.queue(handle).drop_reader());
    }
}

impl<S> State<S> {
    fn queue(&mut self, handle: Handle) -> &mut Queue {
        match handle {
            Handle::Stderr => &mut self.stderr,
            _ => &mut self.stdout,
        }
    }

    /// Returns the error of the program's streams once the connection failed or the program was
    /// cancelled.
    fn failure(&self) -> Option<io::Error> {
        match &self.end {
            Some(Err(error)) => Some(error.clone().into()),
            Some(Ok(_)) => None,
            None => self.client.is_none().then(cancelled),
        }
    }

    fn queue_end_of_input(&mut self) {
        if std::mem::take(&mut self.stdin.open)
            && self.end.is_none()
            && let Some(client) = &mut self.client
        {
            // An end of input always fits in a frame.
            let _ = client.connection.queue(&Request::StdinEof);
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> State<S> {
    /// Ends the input and tries at once to send the end of input.
    fn end_input(&mut self) {
        self.queue_end_of_input();
        let _ = self.poll_flush(&mut Context::from_waker(Waker::noop()));
    }
}
