//! One connection as a state machine. It knows neither queues nor locks' neighbours: the muxer
//! feeds it the guest's packets and asks it for the next one to send, a [`super::VsockStream`]
//! reads, writes and closes.
//!
//! ```text
//!  connect() ──► Connecting ──RESPONSE──► Open ──dropped and flushed──► Closing
//!                    │                    ▲  │                             │
//!                    │       REQUEST,     │  │ RST, SHUTDOWN of both,      │ RST, SHUTDOWN
//!     RST, cancelled │       listener ────┘  │ violation, 8 s              │ of both, 8 s
//!                    ▼                       ▼                             ▼
//!                  Ended ◄───────────────────┴─────────────────────────────┘
//! ```
//!
//! `Open` covers both half-closes: what each side has closed only accumulates. `Ended` keeps what
//! the reader has not read yet and whether the guest is still owed a reset; the muxer forgets the
//! connection once it is not.

use std::io::{self, Read, Write};
use std::sync::{Arc, Mutex, Weak};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use tokio::io::ReadBuf;

use super::buffer::Buffer;
use super::credit::Inbound;
use super::hub::Hub;
use super::lock;
use super::open::{Answer, Open, Owed, Verdict};
use super::packet::{Header, MAX_PAYLOAD, Op, Shut};
use super::places::Place;
use super::state::{CreditState, Fate};
use crate::wake::{self, Awaited};

/// How long a connection that its host side dropped may make no progress before the guest gets a
/// reset: Linux's `VSOCK_CLOSE_TIMEOUT`.
pub const CLOSE_TIMEOUT: Duration = Duration::from_secs(8);

/// The two ports that name a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Key {
    pub(super) host: u32,
    pub(super) guest: u32,
}

/// Why a connection is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// The guest closed both directions, in good order.
    Finished,
    /// The guest reset it or broke the protocol.
    Reset,
    /// The guest has no listener on that port.
    Refused,
    /// The host side gave it up.
    Dropped,
    /// The VM has ended.
    VmEnded,
}

impl End {
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
    Open(Open),
    Closing {
        /// What the guest closed.
        guest: Shut,
    },
    Ended {
        why: End,
        unread: Buffer,
        reset_owed: bool,
    },
}

/// The machine: a state and who waits for it to change.
#[derive(Debug)]
pub(super) struct Machine {
    state: State,
    window: u32,
    reader: Option<Waker>,
    /// Also who waits for the connection to be established.
    writer: Option<Waker>,
    /// Who waits for the guest to take no more.
    refused: Option<Waker>,
    /// In the queue of those whose waiters are woken.
    posted: bool,
    /// In the muxer's queue of turns, or on the way there.
    pub(super) scheduled: bool,
    /// Survives a save and restore when nothing is in flight.
    pub(super) durable: bool,
    /// When a dropped connection that makes no progress ends.
    pub(super) deadline: Option<Instant>,
    /// Kept until it is over and the host's end is gone.
    pub(super) place: Option<Place>,
    host_gone: bool,
}

impl Machine {
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
        Self::new(State::Open(Open::new(window, request, answer)), window)
    }

    /// A durable connection, restored.
    pub(super) fn resumed(saved: &CreditState) -> Self {
        let mut machine = Self::new(State::Open(Open::resume(saved)), saved.window);
        machine.durable = true;
        machine
    }

    /// A connection that did not survive a restore: the guest is owed a reset.
    pub(super) fn lost() -> Self {
        let mut machine = Self::connecting(0);
        machine.host_gone = true;
        machine.end(End::Dropped, true);
        machine
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
                reset_owed: false,
                ..
            }
        )
    }

    /// Whether no packet of this connection ever reached the guest.
    pub(super) fn is_unsent(&self) -> bool {
        matches!(self.state, State::Connecting { sent: false })
    }

    /// What becomes of the guest's end in a VM restored from now.
    pub(super) fn fate(&self) -> Fate {
        match &self.state {
            State::Open(open) if open.answer != Answer::Given => Fate::Refused,
            State::Open(open) => match open.quiescent().filter(|_| self.durable) {
                Some(credit) => Fate::Durable(credit),
                None => Fate::Lost,
            },
            State::Connecting { .. } | State::Closing { .. } => Fate::Lost,
            State::Ended { .. } => Fate::Refused,
        }
    }

    /// Ends the connection; what the guest sent before stays readable. No change if it is over. One
    /// that was never established is refused, not reset.
    pub(super) fn end(&mut self, mut why: End, reset_owed: bool) {
        if why == End::Reset && matches!(self.state, State::Connecting { .. }) {
            why = End::Refused;
        }
        let unread = match &mut self.state {
            State::Open(open) if !open.host.receive => std::mem::take(&mut open.rx),
            State::Ended { .. } => return,
            _ => Buffer::default(),
        };
        self.deadline = None;
        self.state = State::Ended {
            why,
            unread,
            reset_owed,
        };
    }

    /// The guest must not hear of this connection again (its driver was reset).
    pub(super) fn forgive(&mut self) {
        if let State::Ended { reset_owed, .. } = &mut self.state {
            *reset_owed = false;
        }
    }

    /// Ends a dropped connection whose time is up.
    pub(super) fn expire(&mut self, now: Instant) {
        if self.deadline.is_some_and(|at| at <= now) {
            self.end(End::Dropped, true);
        }
    }

    // The guest's side.

    /// Takes a packet from the guest. `op` is `None` where the header is not one that section 5.10
    /// allows; `payload` holds the header's `len` bytes.
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
            (State::Ended { reset_owed, .. }, Some(Op::Reset)) => *reset_owed = false,
            (State::Ended { .. }, _) => {}
            (_, Some(Op::Reset)) => self.end(End::Reset, false),
            (State::Connecting { sent: true }, Some(Op::Response)) => {
                self.state = State::Open(Open::new(self.window, header, Answer::Given));
            }
            (State::Closing { guest }, Some(Op::Shutdown)) => {
                *guest = guest.with(Shut::from_flags(header.flags));
                if *guest == Shut::BOTH {
                    self.end(End::Dropped, true);
                }
            }
            (State::Closing { .. }, Some(Op::Data | Op::CreditUpdate | Op::CreditRequest)) => {}
            (State::Open(open), Some(op)) => match open.receive(op, header, payload)? {
                Verdict::Continues => {}
                // The guest waits for this reset before it lets go of the port.
                Verdict::Finished => self.end(End::Finished, true),
                Verdict::Violated => self.end(End::Reset, true),
            },
            _ => self.end(End::Reset, true),
        }
        Ok(())
    }

    fn owed(&self, room: u32) -> Option<Owed> {
        match &self.state {
            State::Connecting { sent: false } => Some(Owed::Request),
            State::Open(open) => open.owed(room),
            State::Ended {
                reset_owed: true, ..
            } => Some(Owed::Reset),
            State::Connecting { .. } | State::Closing { .. } | State::Ended { .. } => None,
        }
    }

    /// Whether the guest is owed a packet now.
    pub(super) fn owes(&self) -> bool {
        self.owed(MAX_PAYLOAD).is_some()
    }

    /// Writes the next packet that the guest is owed: `header` has the addresses, `room` is how
    /// much payload fits. Returns the payload's length, or `None` if nothing is owed.
    ///
    /// # Errors
    /// When `out` is too short or fails; the device is faulty then.
    pub(super) fn emit(
        &mut self,
        mut header: Header,
        room: u32,
        out: &mut impl Write,
    ) -> io::Result<Option<u32>> {
        let Some(owed) = self.owed(room) else {
            return Ok(None);
        };
        match (&mut self.state, owed) {
            (State::Connecting { sent }, _) => {
                *sent = true;
                header.op = Op::Request.to_wire();
                Inbound::new(self.window).announce(&mut header);
                out.write_all(&header.encode())?;
            }
            (State::Open(open), owed) => {
                open.emit(owed, header, out)?;
                if matches!(owed, Owed::Data(_)) && self.deadline.is_some() {
                    self.deadline = Some(Instant::now() + CLOSE_TIMEOUT);
                }
                if open.told == Shut::BOTH {
                    self.deadline = Some(Instant::now() + CLOSE_TIMEOUT);
                    self.state = State::Closing { guest: open.guest };
                }
            }
            (State::Ended { reset_owed, .. }, _) => {
                *reset_owed = false;
                header.op = Op::Reset.to_wire();
                out.write_all(&header.encode())?;
            }
            (State::Closing { .. }, _) => {}
        }
        Ok(Some(match owed {
            Owed::Data(len) => len,
            _ => 0,
        }))
    }

    // The host's side.

    /// Resolves when the guest answered the request.
    pub(super) fn poll_connected(&self) -> Poll<Result<(), End>> {
        match &self.state {
            State::Connecting { .. } => Poll::Pending,
            State::Open(_) | State::Closing { .. } => Poll::Ready(Ok(())),
            // Established and over before anyone looked.
            State::Ended {
                why: End::Finished | End::Reset,
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
            State::Open(open) if !open.rx.is_empty() => {
                let n = drain(&mut open.rx, into);
                open.inbound.consume(n);
            }
            State::Open(open) if open.guest.send => {}
            State::Ended { unread, .. } if !unread.is_empty() => {
                drain(unread, into);
            }
            State::Ended {
                why: End::Finished | End::Dropped,
                ..
            }
            | State::Closing { .. } => {}
            State::Ended { why, .. } => return Poll::Ready(Err(why.error())),
            State::Open(_) | State::Connecting { .. } => return Poll::Pending,
        }
        Poll::Ready(Ok(()))
    }

    pub(super) fn poll_write(&mut self, mut from: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.state {
            State::Open(open) if open.host.send || open.guest.receive => {
                Poll::Ready(Err(End::Finished.error()))
            }
            State::Open(open) => {
                let window = usize::try_from(self.window).unwrap_or(usize::MAX);
                let n = from.len().min(window.saturating_sub(open.tx.len()));
                if n == 0 && !from.is_empty() {
                    return Poll::Pending;
                }
                Poll::Ready(open.tx.fill(&mut from, n).map(|()| n))
            }
            State::Connecting { .. } => Poll::Pending,
            State::Closing { .. } => Poll::Ready(Err(End::Dropped.error())),
            State::Ended { why, .. } => Poll::Ready(Err(why.error())),
        }
    }

    /// Whether nothing that the host side writes can reach the guest any more.
    fn is_refused(&self) -> bool {
        match &self.state {
            State::Connecting { .. } => false,
            State::Open(open) => open.guest.receive,
            State::Closing { .. } | State::Ended { .. } => true,
        }
    }

    /// Resolves once the guest takes no more.
    pub(super) fn poll_refused(&self) -> Poll<()> {
        match self.is_refused() {
            true => Poll::Ready(()),
            false => Poll::Pending,
        }
    }

    /// The host side takes the connection that the guest asked for.
    pub(super) fn accept(&mut self) {
        if let State::Open(open) = &mut self.state
            && open.answer == Answer::Undecided
        {
            open.answer = Answer::Owed;
        }
    }

    /// The host side sends no more; what it wrote before is still delivered.
    pub(super) fn shut_send(&mut self) {
        if let State::Open(open) = &mut self.state {
            open.host.send = true;
        }
    }

    /// The host side takes no more.
    pub(super) fn shut_receive(&mut self) {
        match &mut self.state {
            State::Open(open) => {
                // A guest that sends no more has nothing to learn from it.
                open.host.receive |= !open.guest.send;
                let unread = open.rx.clear();
                open.inbound.consume(unread);
            }
            State::Ended { unread, .. } => {
                unread.clear();
            }
            State::Connecting { .. } | State::Closing { .. } => {}
        }
    }

    /// The host side is gone; what it wrote before is still delivered, if the guest takes it.
    /// Returns whether the muxer has to know: not when the connection was over before.
    pub(super) fn hang_up(&mut self, now: Instant) -> bool {
        self.host_gone = true;
        self.shut_receive();
        match &mut self.state {
            State::Connecting { sent } => {
                let reset_owed = *sent;
                self.end(End::Dropped, reset_owed);
            }
            State::Open(open) if open.answer == Answer::Undecided => self.end(End::Dropped, true),
            State::Open(open) => {
                open.host = Shut::BOTH;
                self.deadline = Some(now + CLOSE_TIMEOUT);
            }
            State::Closing { .. } => {}
            State::Ended { .. } => return false,
        }
        true
    }

    /// Marks it as scheduled, if it owes the guest a packet and was not scheduled before.
    fn needs_turn(&mut self) -> bool {
        let needs_turn = !self.scheduled && self.owes();
        self.scheduled |= needs_turn;
        needs_turn
    }

    fn readable(&self) -> bool {
        match &self.state {
            State::Open(open) => !open.rx.is_empty() || open.guest.send || open.host.receive,
            State::Connecting { .. } => false,
            State::Closing { .. } | State::Ended { .. } => true,
        }
    }

    /// A writer that waits is woken when a good part of the buffer is free, not for every packet.
    fn writable(&self) -> bool {
        match &self.state {
            State::Open(open) => {
                let window = usize::try_from(self.window).unwrap_or(usize::MAX);
                open.tx.len() <= window - window / 4 || open.host.send || open.guest.receive
            }
            State::Connecting { .. } => false,
            State::Closing { .. } | State::Ended { .. } => true,
        }
    }

    /// Whether somebody waited for the state as it is now.
    fn wakes(&self) -> bool {
        (self.reader.is_some() && self.readable())
            || (self.writer.is_some() && self.writable())
            || (self.refused.is_some() && self.is_refused())
    }

    /// Frees its place among the device's connections once neither side has anything of it.
    fn leave_place(&mut self) {
        if self.is_over() && self.host_gone {
            self.place = None;
        }
    }

    /// Takes who waited for the state as it is now.
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

/// What a task waits for. Whoever polled last for it is woken.
#[derive(Clone, Copy, Debug)]
pub(super) enum Side {
    Reader,
    /// Also for the connection to be established.
    Writer,
    /// For the guest to take no more.
    Refused,
}

/// Moves what fits from `buffer` to `into`.
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

/// A connection as the muxer and its stream share it.
#[derive(Debug)]
pub(super) struct Conn {
    pub(super) key: Key,
    hub: Weak<Hub>,
    machine: Mutex<Machine>,
}

impl Conn {
    pub(super) fn new(key: Key, hub: Weak<Hub>, machine: Machine) -> Arc<Self> {
        Arc::new(Self {
            key,
            hub,
            machine: Mutex::new(machine),
        })
    }

    pub(super) fn hub(&self) -> Option<Arc<Hub>> {
        self.hub.upgrade()
    }

    /// Looks at the machine without changing it.
    pub(super) fn look<R>(&self, at: impl FnOnce(&Machine) -> R) -> R {
        at(&lock(&self.machine))
    }

    /// Changes the machine; whom the change concerns is woken soon, on another thread: the caller
    /// may hold locks. True if the connection needs a turn and the caller must queue it.
    pub(super) fn change<R>(self: &Arc<Self>, by: impl FnOnce(&mut Machine) -> R) -> (R, bool) {
        let mut machine = lock(&self.machine);
        let result = by(&mut machine);
        machine.leave_place();
        let wakes = machine.wakes() && !machine.posted;
        machine.posted |= wakes;
        let needs_turn = machine.needs_turn();
        drop(machine);
        if wakes {
            wake::post(Arc::clone(self) as Arc<dyn Awaited>);
        }
        (result, needs_turn)
    }

    /// A change from the host's side, by a thread of the embedding program that holds no lock of
    /// ours: whom it concerns is woken here. The device is told when it has to act.
    pub(super) fn change_from_host<R>(self: &Arc<Self>, by: impl FnOnce(&mut Machine) -> R) -> R {
        let mut machine = lock(&self.machine);
        let result = by(&mut machine);
        machine.leave_place();
        let woken = machine.woken();
        let needs_turn = machine.needs_turn();
        drop(machine);
        if needs_turn && let Some(hub) = self.hub() {
            hub.request_turn(Arc::clone(self));
        }
        woken.into_iter().flatten().for_each(Waker::wake);
        result
    }

    /// As [`Conn::change_from_host`]; where the host's side has to wait, its task is woken when it
    /// is worth another try. A waker is cloned and dropped without the lock: both may be the
    /// embedding program's code.
    pub(super) fn poll<R>(
        self: &Arc<Self>,
        cx: &Context<'_>,
        side: Side,
        mut by: impl FnMut(&mut Machine) -> Poll<R>,
    ) -> Poll<R> {
        let mut waker = None;
        loop {
            let outcome = self.change_from_host(|machine| {
                let polled = by(machine);
                let slot = match side {
                    Side::Reader => &mut machine.reader,
                    Side::Writer => &mut machine.writer,
                    Side::Refused => &mut machine.refused,
                };
                let known = |slot: &Option<Waker>| {
                    slot.as_ref()
                        .is_some_and(|waker| waker.will_wake(cx.waker()))
                };
                if polled.is_pending() && !known(slot) {
                    let new = waker.take()?;
                    // The one before is dropped below.
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
            let mut machine = lock(&self.machine);
            machine.posted = false;
            machine.woken()
        };
        woken.into_iter().flatten().for_each(Waker::wake);
    }
}
