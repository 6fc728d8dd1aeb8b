//! One connection as a state machine, which uses no virtqueue and takes no lock of other objects:
//! the muxer gives it the guest's packets and asks it for the next one to send, a
//! [`super::VsockStream`] reads, writes and closes.
//!
//! ```text
//!  connect() ──► Connecting ──RESPONSE──► Established ──dropped and flushed──► Closing
//!                    │                      ▲   │                                  │
//!                    │       REQUEST,       │   │ RST, SHUTDOWN of both,           │ RST, SHUTDOWN
//!     RST, cancelled │       listener ──────┘   │ violation, 8 s                   │ of both, 8 s
//!                    ▼                          ▼                                  ▼
//!                  Ended ◄──────────────────────┴──────────────────────────────────┘
//! ```
//!
//! `Established` covers both half-closes: the set of directions that each side has closed only
//! grows. `Ended` keeps the bytes that the host has not read yet, and whether a reset to the guest
//! is pending; once none is, the muxer forgets the connection.

use std::io::{self, Read, Write};
use std::sync::{Arc, Mutex, Weak};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use tokio::io::ReadBuf;

use super::buffer::Buffer;
use super::credit::Inbound;
use super::established::{Answer, Established, PendingTx, Verdict};
use super::lock;
use super::packet::{Header, MAX_PAYLOAD, Op, ShutdownFlags};
use super::places::Place;
use super::shared::Hub;
use super::state::{CreditState, RestoreOutcome};
use crate::wake::{self, Awaited};

/// How long a connection dropped by the host may make no progress before the guest gets a reset:
/// Linux's `VSOCK_CLOSE_TIMEOUT`.
pub const CLOSE_TIMEOUT: Duration = Duration::from_secs(8);

/// The two ports that identify a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Key {
    pub(super) host: u32,
    pub(super) guest: u32,
}

/// Why a connection has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CloseReason {
    /// The guest closed both directions with shutdowns.
    Finished,
    /// The guest reset it or broke the protocol, or its driver was reset.
    Reset,
    /// The guest reset it before it was established: it has no listener on that port, for example.
    Refused,
    /// The host dropped its end.
    Dropped,
    /// The VM has ended.
    VmEnded,
}

impl CloseReason {
    fn error(self) -> io::Error {
        match self {
            Self::Finished | Self::Dropped => io::Error::new(
                io::ErrorKind::BrokenPipe,
                "the guest closed this vsock connection",
            ),
            Self::Reset | Self::Refused => io::Error::new(
                io::ErrorKind::ConnectionReset,
                "the guest reset this vsock connection",
            ),
            Self::VmEnded => io::Error::new(io::ErrorKind::ConnectionAborted, "the VM has ended"),
        }
    }
}

#[derive(Debug)]
enum State {
    Connecting {
        sent: bool,
    },
    Established(Established),
    Closing {
        /// Directions that the guest closed.
        guest: ShutdownFlags,
    },
    Ended {
        why: CloseReason,
        unread: Buffer,
        reset_pending: bool,
    },
}

/// The state of a connection, and the wakers of the tasks that wait for it to change.
#[derive(Debug)]
pub(super) struct ConnectionState {
    state: State,
    window: u32,
    reader: Option<Waker>,
    /// Also the task that waits for the connection to be established.
    writer: Option<Waker>,
    /// The task that waits until the guest receives no more.
    refused: Option<Waker>,
    /// Is in the queue of the waking thread (see [`wake`]).
    posted: bool,
    /// Is in the muxer's queue of turns, or on the way there through the inbox.
    pub(super) scheduled: bool,
    /// Survives a save and restore when nothing is in flight.
    pub(super) durable: bool,
    /// When a dropped connection ends if it makes no progress.
    pub(super) deadline: Option<Instant>,
    /// Kept until the connection is over and the host's end is dropped.
    pub(super) place: Option<Place>,
    host_gone: bool,
}

impl ConnectionState {
    fn new(state: State, window: u32) -> Self {
        Self {
            state,
            window,
            reader: None,
            writer: None,
            refused: None,
            posted: false,
            scheduled: false,
            durable: false,
            deadline: None,
            place: None,
            host_gone: false,
        }
    }

    /// A connection that the host asks for.
    pub(super) fn connecting(window: u32) -> Self {
        Self::new(State::Connecting { sent: false }, window)
    }

    /// A connection that the guest asked for with `request`.
    pub(super) fn asked(window: u32, request: &Header, answer: Answer) -> Self {
        Self::new(
            State::Established(Established::new(window, request, answer)),
            window,
        )
    }

    /// A durable connection, restored.
    pub(super) fn resumed(saved: &CreditState) -> Self {
        let mut connection =
            Self::new(State::Established(Established::resume(saved)), saved.window);
        connection.durable = true;
        connection
    }

    /// A connection that did not survive a restore: a reset to the guest is pending.
    pub(super) fn lost() -> Self {
        let mut connection = Self::connecting(0);
        connection.host_gone = true;
        connection.end(CloseReason::Dropped, true);
        connection
    }

    /// Bytes that this connection may buffer in each direction.
    pub(super) fn window(&self) -> u32 {
        self.window
    }

    /// Whether the muxer may forget the connection.
    pub(super) fn is_over(&self) -> bool {
        matches!(
            self.state,
            State::Ended {
                reset_pending: false,
                ..
            }
        )
    }

    /// Whether no packet of this connection ever reached the guest.
    pub(super) fn is_unsent(&self) -> bool {
        matches!(self.state, State::Connecting { sent: false })
    }

    /// The outcome for the guest's end in a VM restored from a snapshot taken now.
    pub(super) fn outcome(&self) -> RestoreOutcome {
        match &self.state {
            State::Established(established) if established.answer != Answer::Given => {
                RestoreOutcome::Refused
            }
            State::Established(established) => {
                match established.quiescent().filter(|_| self.durable) {
                    Some(credit) => RestoreOutcome::Durable(credit),
                    None => RestoreOutcome::Lost,
                }
            }
            State::Connecting { .. } | State::Closing { .. } => RestoreOutcome::Lost,
            State::Ended { .. } => RestoreOutcome::Refused,
        }
    }

    /// Ends the connection; bytes that the guest sent before stay readable. Does nothing if it has
    /// ended already. A reset of a connection that was never established counts as a refusal.
    pub(super) fn end(&mut self, mut why: CloseReason, reset_pending: bool) {
        if why == CloseReason::Reset && matches!(self.state, State::Connecting { .. }) {
            why = CloseReason::Refused;
        }
        let unread = match &mut self.state {
            State::Established(established) if !established.host.receive => {
                std::mem::take(&mut established.rx)
            }
            State::Ended { .. } => return,
            _ => Buffer::default(),
        };
        self.deadline = None;
        self.state = State::Ended {
            why,
            unread,
            reset_pending,
        };
    }

    /// Cancels a pending reset: the guest's driver was reset and must get no packet of this
    /// connection.
    pub(super) fn forgive(&mut self) {
        if let State::Ended { reset_pending, .. } = &mut self.state {
            *reset_pending = false;
        }
    }

    /// Ends a dropped connection whose deadline has passed.
    pub(super) fn expire(&mut self, now: Instant) {
        if self.deadline.is_some_and(|at| at <= now) {
            self.end(CloseReason::Dropped, true);
        }
    }

    // The guest's side.

    /// Takes a packet from the guest. `op` is `None` if section 5.10 does not allow the header or
    /// the payload is incomplete; else `payload` holds the header's `len` bytes.
    ///
    /// # Errors
    /// When `payload` cannot be read; the device is faulty then.
    pub(super) fn receive(
        &mut self,
        op: Option<Op>,
        header: &Header,
        payload: &mut impl Read,
    ) -> io::Result<()> {
        match (&mut self.state, op) {
            (State::Ended { reset_pending, .. }, Some(Op::Reset)) => *reset_pending = false,
            (State::Ended { .. }, _) => {}
            (_, Some(Op::Reset)) => self.end(CloseReason::Reset, false),
            (State::Connecting { sent: true }, Some(Op::Response)) => {
                self.state =
                    State::Established(Established::new(self.window, header, Answer::Given));
            }
            (State::Closing { guest }, Some(Op::Shutdown)) => {
                *guest = guest.with(ShutdownFlags::from_flags(header.flags));
                if *guest == ShutdownFlags::BOTH {
                    self.end(CloseReason::Dropped, true);
                }
            }
            (State::Closing { .. }, Some(Op::Data | Op::CreditUpdate | Op::CreditRequest)) => {}
            (State::Established(established), Some(op)) => {
                match established.receive(op, header, payload)? {
                    Verdict::Continues => {}
                    // The guest waits for this reset before it releases the port.
                    Verdict::Finished => self.end(CloseReason::Finished, true),
                    Verdict::Violated => self.end(CloseReason::Reset, true),
                }
            }
            _ => self.end(CloseReason::Reset, true),
        }
        Ok(())
    }

    fn pending_tx(&self, room: u32) -> Option<PendingTx> {
        match &self.state {
            State::Connecting { sent: false } => Some(PendingTx::Request),
            State::Established(established) => established.pending_tx(room),
            State::Ended {
                reset_pending: true,
                ..
            } => Some(PendingTx::Reset),
            State::Connecting { .. } | State::Closing { .. } | State::Ended { .. } => None,
        }
    }

    /// Whether a packet to the guest is pending.
    pub(super) fn owes(&self) -> bool {
        self.pending_tx(MAX_PAYLOAD).is_some()
    }

    /// Writes the next pending packet to the guest: `header` has the addresses, `room` is how much
    /// payload fits. Returns the payload's length, or `None` if no packet is pending.
    ///
    /// # Errors
    /// When `out` is too short or fails; the device is faulty then.
    pub(super) fn emit(
        &mut self,
        mut header: Header,
        room: u32,
        out: &mut impl Write,
    ) -> io::Result<Option<u32>> {
        let Some(pending_tx) = self.pending_tx(room) else {
            return Ok(None);
        };
        match (&mut self.state, pending_tx) {
            (State::Connecting { sent }, _) => {
                *sent = true;
                header.op = Op::Request.to_wire();
                Inbound::new(self.window).announce(&mut header);
                out.write_all(&header.encode())?;
            }
            (State::Established(established), pending_tx) => {
                established.emit(pending_tx, header, out)?;
                if matches!(pending_tx, PendingTx::Data(_)) && self.deadline.is_some() {
                    self.deadline = Some(Instant::now() + CLOSE_TIMEOUT);
                }
                if established.sent_shutdown == ShutdownFlags::BOTH {
                    self.deadline = Some(Instant::now() + CLOSE_TIMEOUT);
                    self.state = State::Closing {
                        guest: established.guest,
                    };
                }
            }
            (State::Ended { reset_pending, .. }, _) => {
                *reset_pending = false;
                header.op = Op::Reset.to_wire();
                out.write_all(&header.encode())?;
            }
            (State::Closing { .. }, _) => {}
        }
        Ok(Some(match pending_tx {
            PendingTx::Data(len) => len,
            _ => 0,
        }))
    }

    // The host's side.

    /// Resolves when the guest has answered the request.
    pub(super) fn poll_connected(&self) -> Poll<Result<(), CloseReason>> {
        match &self.state {
            State::Connecting { .. } => Poll::Pending,
            State::Established(_) | State::Closing { .. } => Poll::Ready(Ok(())),
            // Established, and ended before this poll.
            State::Ended {
                why: CloseReason::Finished | CloseReason::Reset,
                ..
            } => Poll::Ready(Ok(())),
            State::Ended { why, .. } => Poll::Ready(Err(*why)),
        }
    }

    pub(super) fn poll_read(&mut self, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if into.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        match &mut self.state {
            State::Established(established) if !established.rx.is_empty() => {
                let n = drain(&mut established.rx, into);
                established.inbound.consume(n);
            }
            State::Established(established) if established.guest.send => {}
            State::Ended { unread, .. } if !unread.is_empty() => {
                drain(unread, into);
            }
            State::Ended {
                why: CloseReason::Finished | CloseReason::Dropped,
                ..
            }
            | State::Closing { .. } => {}
            State::Ended { why, .. } => return Poll::Ready(Err(why.error())),
            State::Established(_) | State::Connecting { .. } => return Poll::Pending,
        }
        Poll::Ready(Ok(()))
    }

    pub(super) fn poll_write(&mut self, mut from: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.state {
            State::Established(established)
                if established.host.send || established.guest.receive =>
            {
                Poll::Ready(Err(CloseReason::Finished.error()))
            }
            State::Established(established) => {
                let window = usize::try_from(self.window).unwrap_or(usize::MAX);
                let n = from.len().min(window.saturating_sub(established.tx.len()));
                if n == 0 && !from.is_empty() {
                    return Poll::Pending;
                }
                Poll::Ready(established.tx.fill(&mut from, n).map(|()| n))
            }
            State::Connecting { .. } => Poll::Pending,
            State::Closing { .. } => Poll::Ready(Err(CloseReason::Dropped.error())),
            State::Ended { why, .. } => Poll::Ready(Err(why.error())),
        }
    }

    /// Whether the guest receives no more data from the host.
    fn is_refused(&self) -> bool {
        match &self.state {
            State::Connecting { .. } => false,
            State::Established(established) => established.guest.receive,
            State::Closing { .. } | State::Ended { .. } => true,
        }
    }

    /// Resolves once the guest receives no more.
    pub(super) fn poll_refused(&self) -> Poll<()> {
        match self.is_refused() {
            true => Poll::Ready(()),
            false => Poll::Pending,
        }
    }

    /// Accepts the connection that the guest requested.
    pub(super) fn accept(&mut self) {
        if let State::Established(established) = &mut self.state
            && established.answer == Answer::Undecided
        {
            established.answer = Answer::Pending;
        }
    }

    /// Closes the host's sending direction; data written before is still delivered.
    pub(super) fn shut_send(&mut self) {
        if let State::Established(established) = &mut self.state {
            established.host.send = true;
        }
    }

    /// Closes the host's receiving direction and discards unread data.
    pub(super) fn shut_receive(&mut self) {
        match &mut self.state {
            State::Established(established) => {
                // A guest that has closed its sending direction needs no shutdown of this one.
                established.host.receive |= !established.guest.send;
                let unread = established.rx.clear();
                established.inbound.consume(unread);
            }
            State::Ended { unread, .. } => {
                unread.clear();
            }
            State::Connecting { .. } | State::Closing { .. } => {}
        }
    }

    /// Closes the host's end; data written before is still delivered, if the guest takes it.
    /// Returns whether the muxer must be notified: not if the connection had ended before.
    pub(super) fn hang_up(&mut self, now: Instant) -> bool {
        self.host_gone = true;
        self.shut_receive();
        match &mut self.state {
            State::Connecting { sent } => {
                let reset_pending = *sent;
                self.end(CloseReason::Dropped, reset_pending);
            }
            State::Established(established) if established.answer == Answer::Undecided => {
                self.end(CloseReason::Dropped, true)
            }
            State::Established(established) => {
                established.host = ShutdownFlags::BOTH;
                self.deadline = Some(now + CLOSE_TIMEOUT);
            }
            State::Closing { .. } => {}
            State::Ended { .. } => return false,
        }
        true
    }

    /// Marks the connection as scheduled if a packet is pending and it was not scheduled before;
    /// returns whether it did.
    fn needs_turn(&mut self) -> bool {
        let needs_turn = !self.scheduled && self.owes();
        self.scheduled |= needs_turn;
        needs_turn
    }

    fn readable(&self) -> bool {
        match &self.state {
            State::Established(established) => {
                !established.rx.is_empty() || established.guest.send || established.host.receive
            }
            State::Connecting { .. } => false,
            State::Closing { .. } | State::Ended { .. } => true,
        }
    }

    /// Whether to wake a waiting writer: once a quarter of the buffer is free, not for every
    /// packet.
    fn writable(&self) -> bool {
        match &self.state {
            State::Established(established) => {
                let window = usize::try_from(self.window).unwrap_or(usize::MAX);
                established.tx.len() <= window - window / 4
                    || established.host.send
                    || established.guest.receive
            }
            State::Connecting { .. } => false,
            State::Closing { .. } | State::Ended { .. } => true,
        }
    }

    /// Whether a task waits for the state that the connection has now.
    fn wakes(&self) -> bool {
        (self.reader.is_some() && self.readable())
            || (self.writer.is_some() && self.writable())
            || (self.refused.is_some() && self.is_refused())
    }

    /// Frees the connection's place once it is over and the host's end is dropped.
    fn leave_place(&mut self) {
        if self.is_over() && self.host_gone {
            self.place = None;
        }
    }

    /// Takes the wakers of the tasks that wait for the state that the connection has now.
    fn woken(&mut self) -> [Option<Waker>; 3] {
        let reader = if self.readable() {
            self.reader.take()
        } else {
            None
        };
        let writer = if self.writable() {
            self.writer.take()
        } else {
            None
        };
        let refused = if self.is_refused() {
            self.refused.take()
        } else {
            None
        };
        [reader, writer, refused]
    }
}

/// What a task waits for. Only the last task that polled for it is woken.
#[derive(Clone, Copy, Debug)]
pub(super) enum Side {
    Reader,
    /// Also for the connection to be established.
    Writer,
    /// For the guest to receive no more.
    Refused,
}

/// Moves as many bytes as fit from `buffer` to `into`; returns how many.
fn drain(buffer: &mut Buffer, into: &mut ReadBuf<'_>) -> usize {
    let before = into.remaining();
    while into.remaining() > 0 && !buffer.is_empty() {
        let front = buffer.front();
        let n = front.len().min(into.remaining());
        into.put_slice(front.get(..n).unwrap_or_default());
        buffer.consume(n);
    }
    before - into.remaining()
}

/// A connection, shared by the muxer and its stream.
#[derive(Debug)]
pub(super) struct Conn {
    pub(super) key: Key,
    hub: Weak<Hub>,
    connection: Mutex<ConnectionState>,
}

impl Conn {
    pub(super) fn new(key: Key, hub: Weak<Hub>, connection: ConnectionState) -> Arc<Self> {
        Arc::new(Self {
            key,
            hub,
            connection: Mutex::new(connection),
        })
    }

    pub(super) fn hub(&self) -> Option<Arc<Hub>> {
        self.hub.upgrade()
    }

    /// Reads the state without changing it.
    pub(super) fn look<R>(&self, at: impl FnOnce(&ConnectionState) -> R) -> R {
        at(&lock(&self.connection))
    }

    /// Changes the state. Tasks that waited for the change are woken soon, on another thread: the
    /// caller may hold locks. The second value is true if the connection needs a turn and the
    /// caller must queue it.
    pub(super) fn change<R>(
        self: &Arc<Self>,
        by: impl FnOnce(&mut ConnectionState) -> R,
    ) -> (R, bool) {
        let mut connection = lock(&self.connection);
        let result = by(&mut connection);
        connection.leave_place();
        let wakes = connection.wakes() && !connection.posted;
        connection.posted |= wakes;
        let needs_turn = connection.needs_turn();
        drop(connection);
        if wakes {
            wake::post(Arc::clone(self) as Arc<dyn Awaited>);
        }
        (result, needs_turn)
    }

    /// Changes the state from a thread of the embedding program that holds no lock of this crate:
    /// tasks that waited for the change are woken on this thread. Notifies the device if it has to
    /// act.
    pub(super) fn change_from_host<R>(
        self: &Arc<Self>,
        by: impl FnOnce(&mut ConnectionState) -> R,
    ) -> R {
        let mut connection = lock(&self.connection);
        let result = by(&mut connection);
        connection.leave_place();
        let woken = connection.woken();
        let needs_turn = connection.needs_turn();
        drop(connection);
        if needs_turn && let Some(hub) = self.hub() {
            hub.request_turn(Arc::clone(self));
        }
        woken.into_iter().flatten().for_each(Waker::wake);
        result
    }

    /// As [`Conn::change_from_host`]; while `by` returns pending, the task is woken when another
    /// try is worthwhile. A waker is cloned and dropped without the lock: both may run the
    /// embedding program's code.
    pub(super) fn poll<R>(
        self: &Arc<Self>,
        cx: &Context<'_>,
        side: Side,
        mut by: impl FnMut(&mut ConnectionState) -> Poll<R>,
    ) -> Poll<R> {
        let mut waker = None;
        loop {
            let outcome = self.change_from_host(|connection| {
                let polled = by(connection);
                let slot = match side {
                    Side::Reader => &mut connection.reader,
                    Side::Writer => &mut connection.writer,
                    Side::Refused => &mut connection.refused,
                };
                let known = |slot: &Option<Waker>| {
                    slot.as_ref()
                        .is_some_and(|waker| waker.will_wake(cx.waker()))
                };
                if polled.is_pending() && !known(slot) {
                    let new = waker.take()?;
                    // The previous waker is dropped on return, without the lock.
                    waker = slot.replace(new);
                }
                Some(polled)
            });
            match outcome {
                Some(polled) => return polled,
                None => waker = Some(cx.waker().clone()),
            }
        }
    }
}

impl Awaited for Conn {
    fn wake_waiters(&self) {
        let woken = {
            let mut connection = lock(&self.connection);
            connection.posted = false;
            connection.woken()
        };
        woken.into_iter().flatten().for_each(Waker::wake);
    }
}
