//! The state that the handles of one running program share. Polling any handle drives the
//! connection.
//!
//! The stream holds one waker, which wakes every waiting handle. A handle that is dropped while it
//! waits therefore cannot lose the wake-up of the others.

use std::{
    collections::VecDeque,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Wake, Waker},
};

use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::Instant,
};

use super::{AgentClient, error::ConnectionError, strike, unexpected};
use crate::proto::{Exited, MAX_CHUNK, Request, Response, STDIN_WINDOW};

/// Most bytes of output that are held for a reader; at this size, reading from the connection
/// stops.
const QUEUE: usize = MAX_CHUNK;

/// The handles of a program, as indices of their wakers.
#[derive(Clone, Copy, Debug)]
pub(super) enum Handle {
    Stdin,
    Stdout,
    Stderr,
    Main,
}

/// The state of a running program. Lock order: state, then wakers.
pub(super) struct Shared<S> {
    state: Mutex<State<S>>,
    wakers: Arc<Wakers>,
}

impl<S> fmt::Debug for Shared<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").finish_non_exhaustive()
    }
}

/// The state behind the lock.
pub(super) struct State<S> {
    /// None once the program was cancelled or the connection was returned to the caller.
    pub(super) client: Option<AgentClient<S>>,
    pub(super) stdin: StdinState,
    pub(super) stdout: Queue,
    pub(super) stderr: Queue,
    /// None for a program without a third output.
    pub(super) results: Option<Queue>,
    /// How the program ended, or why the connection failed.
    pub(super) end: Option<Result<Exited, ConnectionError>>,
    /// When data last arrived from the guest.
    pub(super) heard: Instant,
}

/// The host's view of the program's stdin.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct StdinState {
    /// Whether neither the host has ended the input nor the program closed its stdin.
    pub(super) open: bool,
    /// The number of bytes that may be sent. What is missing from [`STDIN_WINDOW`] was sent and is
    /// not reported as taken.
    pub(super) window: usize,
}

/// Output between the connection and its reader.
#[derive(Debug, Default)]
pub(super) struct Queue {
    pub(super) bytes: VecDeque<u8>,
    /// Whether the reader was dropped: new output is then discarded.
    pub(super) discard: bool,
}

impl Queue {
    fn full(&self) -> bool {
        !self.discard && self.bytes.len() >= QUEUE
    }

    fn push(&mut self, chunk: &[u8]) {
        if !self.discard {
            self.bytes.extend(chunk);
        }
    }

    pub(super) fn drop_reader(&mut self) {
        self.discard = true;
        self.bytes = VecDeque::new();
    }
}

enum Step {
    /// Something happened; check again.
    Progress,
    /// Nothing can happen before the stream or a reader makes progress.
    Blocked,
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Shared<S> {
    pub(super) fn new(client: AgentClient<S>, piped: bool, results: bool) -> Arc<Self> {
        let state = State {
            client: Some(client),
            stdin: StdinState {
                open: piped,
                window: STDIN_WINDOW,
            },
            stdout: Queue::default(),
            stderr: Queue::default(),
            results: results.then(Queue::default),
            end: None,
            heard: Instant::now(),
        };
        Arc::new(Self {
            state: Mutex::new(state),
            wakers: Arc::default(),
        })
    }

    /// Drives the connection until `check` has a result or no further progress is possible now.
    pub(super) fn poll_until<T>(
        &self,
        handle: Handle,
        cx: &mut Context<'_>,
        mut check: impl FnMut(&mut State<S>, &mut Context<'_>) -> Poll<T>,
    ) -> Poll<T> {
        self.wakers.set(handle, cx.waker());
        let all = Waker::from(self.wakers.clone());
        let cx = &mut Context::from_waker(&all);
        let mut moved = false;
        let result = {
            let mut state = self.lock();
            loop {
                if let Poll::Ready(result) = check(&mut state, cx) {
                    moved = true;
                    break Poll::Ready(result);
                }
                match state.step(cx) {
                    Ok(Step::Progress) => moved = true,
                    Ok(Step::Blocked) => break Poll::Pending,
                    Err(error) => {
                        moved = true;
                        state.end.get_or_insert(Err(error));
                        // `check` sees `end` now. If it still returns `Pending`, there is nothing
                        // left to wait for.
                        break check(&mut state, cx);
                    }
                }
            }
        };
        if moved {
            self.wakers.wake_others(handle);
        }
        result
    }
}

impl<S> Shared<S> {
    /// Changes the state outside of a poll and wakes all waiting handles.
    pub(super) fn change<T>(&self, change: impl FnOnce(&mut State<S>) -> T) -> T {
        let result = change(&mut self.lock());
        self.wakers.wake_by_ref_all();
        result
    }

    fn lock(&self) -> MutexGuard<'_, State<S>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> State<S> {
    /// Writes what can be written, then takes one frame or reads once.
    fn step(&mut self, cx: &mut Context<'_>) -> Result<Step, ConnectionError> {
        if self.end.is_some() {
            return Ok(Step::Blocked);
        }
        let Some(client) = &mut self.client else {
            return Ok(Step::Blocked);
        };
        let AgentClient {
            connection,
            unanswered,
            ..
        } = client;
        // A failed write is not the end yet: the guest's last messages before it closed the
        // connection are still to be read, and the stream may not have received them yet.
        let _ = connection.poll_flush(cx);
        let Some(response) = connection.peek()? else {
            return Ok(match connection.poll_fill(cx) {
                Poll::Ready(filled) => {
                    filled?;
                    self.heard = Instant::now();
                    Step::Progress
                }
                Poll::Pending => Step::Blocked,
            });
        };
        match response {
            Response::Stdout(chunk) => {
                if self.stdout.full() {
                    return Ok(Step::Blocked);
                }
                self.stdout.push(chunk);
            }
            Response::Stderr(chunk) => {
                if self.stderr.full() {
                    return Ok(Step::Blocked);
                }
                self.stderr.push(chunk);
            }
            Response::Results(chunk) => {
                let Some(results) = &mut self.results else {
                    return Err(unexpected());
                };
                if results.full() {
                    return Ok(Step::Blocked);
                }
                results.push(chunk);
            }
            Response::StdinTaken(count) => self.stdin.taken(count)?,
            Response::StdinClosed => self.stdin.open = false,
            Response::Exited(exited) => self.end = Some(Ok(exited)),
            Response::Pong(pong) => strike(unanswered, pong.nonce)?,
            _ => return Err(unexpected()),
        }
        let _ = connection.take_frame()?;
        Ok(Step::Progress)
    }

    /// Queues a request and tries to write it out.
    pub(super) fn send(
        &mut self,
        request: &Request<'_>,
        cx: &mut Context<'_>,
    ) -> Result<(), ConnectionError> {
        let Some(AgentClient { connection, .. }) = &mut self.client else {
            return Err(ConnectionError::Closed);
        };
        connection.queue(request)?;
        match connection.poll_flush(cx) {
            Poll::Ready(Err(error)) => Err(error),
            _ => Ok(()),
        }
    }

    /// Writes the queued output.
    pub(super) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ConnectionError>> {
        match &mut self.client {
            Some(client) => client.connection.poll_flush(cx),
            None => Poll::Ready(Err(ConnectionError::Closed)),
        }
    }
}

impl StdinState {
    fn taken(&mut self, count: u32) -> Result<(), ConnectionError> {
        let opened = usize::try_from(count)
            .ok()
            .and_then(|count| self.window.checked_add(count));
        match opened {
            Some(opened) if opened <= STDIN_WINDOW => {
                self.window = opened;
                Ok(())
            }
            _ => Err(ConnectionError::Protocol("more input taken than was sent")),
        }
    }
}

/// The wakers of all waiting handles, and a waker that wakes them all.
#[derive(Debug, Default)]
struct Wakers(Mutex<[Option<Waker>; 4]>);

impl Wakers {
    fn set(&self, handle: Handle, waker: &Waker) {
        let mut slots = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(slot) = slots.get_mut(handle as usize) {
            match slot {
                Some(old) => old.clone_from(waker),
                None => *slot = Some(waker.clone()),
            }
        }
    }

    fn wake_others(&self, handle: Handle) {
        let taken = {
            let mut slots = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let own = slots.get_mut(handle as usize).and_then(Option::take);
            let taken = std::mem::take(&mut *slots);
            if let Some(slot) = slots.get_mut(handle as usize) {
                *slot = own;
            }
            taken
        };
        taken.into_iter().flatten().for_each(Waker::wake);
    }

    fn wake_by_ref_all(&self) {
        let taken = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        taken.into_iter().flatten().for_each(Waker::wake);
    }
}

impl Wake for Wakers {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref_all();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.wake_by_ref_all();
    }
}

impl<S> fmt::Debug for State<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("State")
            .field("stdin", &self.stdin)
            .field("end", &self.end)
            .finish_non_exhaustive()
    }
}
