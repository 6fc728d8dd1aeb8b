//! Random interleavings of both sides' operations, checked against a model of what each side may
//! observe.
//!
//! The guest's sockets behave like Linux's (`virtio_transport_common.c`): a shutdown of both
//! directions is answered with a reset once everything was read, and a close waits for that reset.

use std::collections::VecDeque;
use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Wake;
use std::time::Duration;

use proptest::prelude::*;
use proptest::sample::select;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::*;

/// The only port on which the host listens. The guest listens on even ports and refuses odd ones.
const HOST_PORT: u32 = 52;

#[derive(Clone, Copy, Debug)]
enum Step {
    HostConnect { refused: bool },
    GuestConnect { port: u32 },
    HostWrite(usize, usize),
    HostRead(usize, usize),
    HostShutdown(usize),
    HostDrop(usize),
    GuestSend(usize, usize),
    GuestRead(usize, usize),
    GuestShutdown(usize, bool),
    GuestClose(usize),
    GuestReset(usize),
    GuestResize(usize, u32),
    Refill,
    Pump,
    Expire,
    Restore,
}

fn step() -> impl Strategy<Value = Step> {
    let who = 0usize..8;
    let len = || {
        select(vec![
            1usize, 2, 100, 4052, 4096, 5000, 40_000, 70_000, 300_000,
        ])
    };
    prop_oneof![
        4 => prop::bool::weighted(0.2).prop_map(|refused| Step::HostConnect { refused }),
        4 => (0u32..3).prop_map(|port| Step::GuestConnect { port }),
        12 => (who.clone(), len()).prop_map(|(who, n)| Step::HostWrite(who, n)),
        12 => (who.clone(), len()).prop_map(|(who, n)| Step::HostRead(who, n)),
        2 => who.clone().prop_map(Step::HostShutdown),
        2 => who.clone().prop_map(Step::HostDrop),
        12 => (who.clone(), len()).prop_map(|(who, n)| Step::GuestSend(who, n)),
        12 => (who.clone(), len()).prop_map(|(who, n)| Step::GuestRead(who, n)),
        2 => (who.clone(), any::<bool>()).prop_map(|(who, send)| Step::GuestShutdown(who, send)),
        2 => who.clone().prop_map(Step::GuestClose),
        1 => who.clone().prop_map(Step::GuestReset),
        1 => (who, select(vec![0, 1, 1000, 65536])).prop_map(|(who, n)| Step::GuestResize(who, n)),
        8 => Just(Step::Refill),
        16 => Just(Step::Pump),
        1 => Just(Step::Expire),
        1 => Just(Step::Restore),
    ]
}

#[derive(Clone, Copy, Debug)]
struct Shape {
    event_idx: bool,
    rx_pieces: &'static [u32],
    rx_buffers: u16,
    tx_piece: usize,
    window: u32,
}

fn shape() -> impl Strategy<Value = Shape> {
    (
        any::<bool>(),
        select(vec![&[4096u32][..], &[44, 4052], &[1, 50, 45], &[100]]),
        1u16..16,
        select(vec![7usize, 44, 4096, usize::MAX]),
        select(vec![1u32, 1000, 65536, 262_144]),
    )
        .prop_map(
            |(event_idx, rx_pieces, rx_buffers, tx_piece, window)| Shape {
                event_idx,
                rx_pieces,
                rx_buffers,
                tx_piece,
                window,
            },
        )
}

/// The byte at a position of a connection's stream in one direction.
fn byte(salt: u32, at: usize) -> u8 {
    (at as u32 ^ salt).wrapping_mul(0x9E37_79B1).to_le_bytes()[3]
}

#[derive(Default)]
struct Woken(AtomicBool);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// The waker of a task whose last poll was pending. It must be woken before the operation can
/// succeed.
type Wait = Option<Arc<Woken>>;

/// Polls as a task would, with a fresh waker. Panics if the operation is ready although the task,
/// whose last poll was pending, was not woken.
fn attempt<T>(
    wait: &mut Wait,
    what: &str,
    poll: impl FnOnce(&mut Context<'_>) -> Poll<T>,
) -> Option<T> {
    crate::wake::flush();
    let asleep = wait
        .take()
        .is_some_and(|woken| !woken.0.load(Ordering::SeqCst));
    let woken = Arc::new(Woken::default());
    let waker = Waker::from(Arc::clone(&woken));
    match poll(&mut Context::from_waker(&waker)) {
        Poll::Ready(value) => {
            assert!(!asleep, "{what} was possible, but nobody was woken");
            Some(value)
        }
        Poll::Pending => {
            *wait = Some(woken);
            None
        }
    }
}

#[derive(Debug, PartialEq)]
enum GuestState {
    Absent,
    Asking,
    Open,
    /// Closed by its program; waits for the host's reset.
    Closing,
    Gone,
}

type Connecting = Pin<Box<dyn Future<Output = Result<VsockStream, ConnectError>>>>;

struct Pair {
    salt: u32,
    socket: Socket,
    guest: GuestState,
    guest_shut: ShutdownFlags,
    host_told: ShutdownFlags,
    /// Bytes in the guest's receive buffer.
    guest_unread: usize,
    guest_got: usize,
    /// All bytes that arrived, including those after the guest stopped receiving.
    guest_heard: usize,
    guest_sent: usize,
    connecting: Option<Connecting>,
    stream: Option<VsockStream>,
    host_wrote: usize,
    host_read: usize,
    host_shut: bool,
    read_wait: Wait,
    write_wait: Wait,
    /// The connection may end other than by an orderly close of both programs.
    broken: bool,
    /// The host's end belongs to a device that was saved and dropped.
    stale: bool,
}

struct World {
    guest: Guest,
    listener: VsockListener,
    pairs: Vec<Pair>,
    outbox: VecDeque<(Header, Vec<u8>)>,
    tx_piece: usize,
    window: u32,
    next_guest_port: u32,
    events: usize,
}

impl World {
    fn new(shape: Shape) -> Self {
        let mut guest = Guest::new(Setup {
            event_idx: shape.event_idx,
            rx_pieces: shape.rx_pieces,
            rx_buffers: shape.rx_buffers,
        });
        guest.refill = false;
        Self {
            listener: guest.host.listen(HOST_PORT).unwrap(),
            guest,
            pairs: Vec::new(),
            outbox: VecDeque::new(),
            tx_piece: shape.tx_piece,
            window: shape.window,
            next_guest_port: 1000,
            events: 0,
        }
    }

    fn pair(&mut self, socket: Socket, guest: GuestState) -> &mut Pair {
        let salt = self.pairs.len() as u32 * 77;
        self.pairs.push(Pair {
            salt,
            socket,
            guest,
            guest_shut: ShutdownFlags::default(),
            host_told: ShutdownFlags::default(),
            guest_unread: 0,
            guest_got: 0,
            guest_heard: 0,
            guest_sent: 0,
            connecting: None,
            stream: None,
            host_wrote: 0,
            host_read: 0,
            host_shut: false,
            read_wait: None,
            write_wait: None,
            broken: false,
            stale: false,
        });
        self.pairs.last_mut().unwrap()
    }

    fn step(&mut self, step: Step) {
        let alive = self.pairs.len();
        // Prefers recent pairs: old ones are mostly over.
        let at = |who: usize| alive.checked_sub(1 + who % alive.max(1));
        match step {
            Step::HostConnect { refused } => {
                self.next_guest_port += 2;
                let port = self.next_guest_port & !1 | u32::from(refused);
                let host = self.guest.host.clone();
                let socket = self.guest.socket(port, 0, self.window);
                let mut connecting: Connecting = Box::pin(async move { host.connect(port).await });
                assert!(poll(connecting.as_mut()).is_none());
                self.pair(socket, GuestState::Absent).connecting = Some(connecting);
            }
            Step::GuestConnect { port } => {
                let port = if port == 0 { HOST_PORT + 1 } else { HOST_PORT };
                self.next_guest_port += 2;
                let socket = self.guest.socket(self.next_guest_port, port, self.window);
                self.outbox
                    .push_back((socket.header(Op::Request), Vec::new()));
                self.pair(socket, GuestState::Asking);
            }
            Step::HostWrite(who, n) => drop(at(who).map(|at| self.pairs[at].host_write(n))),
            Step::HostRead(who, n) => drop(at(who).map(|at| self.pairs[at].host_read(n))),
            Step::HostShutdown(who) => drop(at(who).map(|at| self.pairs[at].host_shutdown())),
            Step::HostDrop(who) => {
                if let Some(at) = at(who) {
                    let pair = &mut self.pairs[at];
                    pair.stream = None;
                    if pair.connecting.take().is_some() {
                        pair.broken = true;
                    }
                }
            }
            Step::GuestSend(who, n) => {
                if let Some(at) = at(who) {
                    self.outbox.extend(self.pairs[at].guest_send(n));
                }
            }
            Step::GuestRead(who, n) => {
                if let Some(at) = at(who) {
                    self.outbox.extend(self.pairs[at].guest_read(n));
                }
            }
            Step::GuestShutdown(who, send) => {
                if let Some(at) = at(who) {
                    let shut = if send { SEND } else { RECEIVE };
                    self.outbox.extend(self.pairs[at].guest_shutdown(shut));
                }
            }
            Step::GuestClose(who) => {
                if let Some(at) = at(who) {
                    self.outbox.extend(self.pairs[at].guest_close());
                }
            }
            Step::GuestReset(who) => {
                if let Some(at) = at(who)
                    && matches!(self.pairs[at].guest, GuestState::Open | GuestState::Closing)
                {
                    let pair = &mut self.pairs[at];
                    pair.guest = GuestState::Gone;
                    pair.broken = true;
                    self.outbox
                        .push_back((pair.socket.header(Op::Reset), Vec::new()));
                }
            }
            Step::GuestResize(who, window) => {
                if let Some(at) = at(who)
                    && self.pairs[at].guest == GuestState::Open
                {
                    let socket = &mut self.pairs[at].socket;
                    socket.window = window;
                    self.outbox
                        .push_back((socket.header(Op::CreditUpdate), Vec::new()));
                }
            }
            Step::Refill => {
                for at in std::mem::take(&mut self.guest.rx_idle) {
                    self.guest.post_rx(at);
                }
            }
            Step::Pump => self.exchange(),
            Step::Expire => {
                self.guest.wait(CLOSE_TIMEOUT + Duration::from_secs(1));
                // Connections that the host has dropped may be cut short now.
                for pair in &mut self.pairs {
                    pair.broken |= pair.stream.is_none() && pair.connecting.is_none();
                }
                self.exchange();
            }
            Step::Restore => self.restore(),
        }
    }

    /// Moves packets both ways until neither side can go on by itself.
    fn exchange(&mut self) {
        loop {
            self.guest.pump();
            while self.guest.can_send()
                && let Some((header, payload)) = self.outbox.pop_front()
            {
                let mut bytes = header.encode().to_vec();
                bytes.extend(payload);
                self.guest.post_tx(&bytes, self.tx_piece);
                self.guest.pump();
            }
            self.see_events();
            let Some((header, payload)) = self.guest.inbox.pop_front() else {
                break;
            };
            self.guest_receives(&header, &payload);
        }
        self.host_notices();
    }

    fn see_events(&mut self) {
        if std::mem::replace(&mut self.events, self.guest.events.len()) == self.guest.events.len() {
            return;
        }
        for pair in &mut self.pairs {
            if pair.stale && pair.guest != GuestState::Asking {
                pair.guest = GuestState::Gone;
            }
        }
    }

    fn guest_receives(&mut self, header: &Header, payload: &[u8]) {
        let op = Op::from_wire(header.op).unwrap();
        let known = self.pairs.iter_mut().find(|pair| {
            pair.socket.is_for(header)
                && !matches!(pair.guest, GuestState::Absent | GuestState::Gone)
        });
        if let Some(pair) = known {
            self.outbox.extend(pair.guest_receives(op, header, payload));
            return;
        }
        if op == Op::Request && header.dst_port.is_multiple_of(2) {
            let waiting = self.pairs.iter_mut().find(|pair| {
                pair.guest == GuestState::Absent && pair.socket.guest_port == header.dst_port
            });
            if let Some(pair) = waiting {
                pair.socket = Socket::answering(header, self.window);
                pair.guest = GuestState::Open;
                self.outbox
                    .push_back((pair.socket.header(Op::Response), Vec::new()));
                return;
            }
        }
        self.outbox
            .extend(header.refusal().map(|reset| (reset, Vec::new())));
    }

    /// Polls the host's pending connects and accepts.
    fn host_notices(&mut self) {
        for pair in &mut self.pairs {
            let Some(connecting) = &mut pair.connecting else {
                continue;
            };
            let Some(outcome) = poll(connecting.as_mut()) else {
                continue;
            };
            pair.connecting = None;
            match outcome {
                Ok(stream) => {
                    assert_eq!(stream.guest_port() % 2, 0, "a refused connect succeeded");
                    pair.stream = Some(stream);
                }
                Err(ConnectError::Refused(port)) => {
                    assert!(
                        port % 2 == 1 || pair.broken,
                        "an accepted connect was refused"
                    );
                }
                Err(ConnectError::VmEnded) => assert!(pair.stale),
                Err(other) => panic!("{other}"),
            }
        }
        while let Some(accepted) = poll(Box::pin(self.listener.accept()).as_mut()) {
            let stream = accepted.unwrap();
            let pair = self.pairs.iter_mut().find(|pair| {
                (pair.socket.guest_port, pair.socket.host_port)
                    == (stream.guest_port(), stream.host_port())
            });
            let pair = pair.unwrap();
            pair.stream = Some(stream);
            // After a restore, it is the restored device that received the guest's request.
            pair.stale = false;
        }
    }

    fn restore(&mut self) {
        for pair in &mut self.pairs {
            pair.stale = true;
            pair.broken = true;
        }
        self.guest.pump();
        self.guest.restore();
        self.listener = self.guest.host.listen(HOST_PORT).unwrap();
        // Packets in the outbox stay there: they are part of the guest's memory.
        for pair in &mut self.pairs {
            if let Some(connecting) = &mut pair.connecting {
                let outcome = poll(connecting.as_mut()).unwrap();
                assert!(outcome.is_err() || pair.guest != GuestState::Absent);
                pair.connecting = None;
            }
        }
        self.exchange();
    }

    /// Lets both sides finish: all bytes must arrive and all connections must end.
    fn finish(mut self) {
        self.guest.refill = true;
        for _ in 0..3 {
            // Moves bytes until none is left that its receiver can take.
            loop {
                let before: Vec<_> = self
                    .pairs
                    .iter()
                    .map(|p| (p.host_read, p.guest_got))
                    .collect();
                self.step(Step::Refill);
                for at in 0..self.pairs.len() {
                    self.pairs[at].socket.window = self.pairs[at].socket.window.max(1000);
                    let reply = self.pairs[at].guest_read(usize::MAX);
                    self.outbox.extend(reply);
                    if self.pairs[at].guest == GuestState::Open {
                        let update = self.pairs[at].socket.header(Op::CreditUpdate);
                        self.outbox.push_back((update, Vec::new()));
                    }
                    self.exchange();
                    self.pairs[at].host_read(usize::MAX);
                    self.exchange();
                }
                let after: Vec<_> = self
                    .pairs
                    .iter()
                    .map(|p| (p.host_read, p.guest_got))
                    .collect();
                if before == after {
                    break;
                }
            }
        }
        for pair in &self.pairs {
            pair.expect_everything_arrived();
        }
        for at in 0..self.pairs.len() {
            if at % 2 == 0 {
                self.step(Step::HostDrop(self.pairs.len() - 1 - at));
                self.exchange();
            }
            let close = self.pairs[at].guest_close();
            self.outbox.extend(close);
            self.exchange();
            self.pairs[at].stream = None;
            self.pairs[at].connecting = None;
            self.exchange();
        }
        self.exchange();
        for pair in &self.pairs {
            let over = matches!(pair.guest, GuestState::Gone | GuestState::Absent);
            assert!(over, "the guest still waits: {:?}", pair.guest);
        }
        assert_eq!(self.guest.connections(), 0);
        assert!(self.outbox.is_empty() && self.guest.inbox.is_empty());
        let runs = self.guest.runs;
        self.guest.pump();
        assert_eq!(self.guest.runs, runs);
    }
}

impl Pair {
    fn host_write(&mut self, n: usize) {
        let Some(stream) = &mut self.stream else {
            return;
        };
        let bytes: Vec<u8> = (0..n)
            .map(|i| byte(self.salt, self.host_wrote + i))
            .collect();
        let asleep = self
            .write_wait
            .as_ref()
            .is_some_and(|w| !w.0.load(Ordering::SeqCst));
        if asleep {
            // A writer is woken only when a quarter of the buffer is free; the assertion below
            // checks that.
            self.write_wait = None;
        }
        let outcome = attempt(&mut self.write_wait, "a write", |cx| {
            Pin::new(stream).poll_write(cx, &bytes)
        });
        match outcome {
            Some(Ok(written)) => {
                assert!(
                    !asleep || written <= WIDE_WINDOW as usize / 4,
                    "a writer slept"
                );
                assert!(!self.host_shut);
                self.host_wrote += written;
            }
            Some(Err(error)) if self.stale && error.kind() == ErrorKind::ConnectionAborted => {}
            Some(Err(error)) => match error.kind() {
                ErrorKind::BrokenPipe => assert!(
                    self.host_shut
                        || self.guest_shut.receive
                        || self.guest == GuestState::Closing
                        || self.guest == GuestState::Gone
                ),
                ErrorKind::ConnectionReset => assert!(self.broken),
                kind => panic!("{kind}"),
            },
            None => {}
        }
    }

    fn host_read(&mut self, n: usize) {
        let Some(stream) = &mut self.stream else {
            return;
        };
        let mut left = n;
        while left > 0 {
            let mut space = [0; 8192];
            let len = left.min(space.len());
            let mut buf = ReadBuf::new(&mut space[..len]);
            let outcome = attempt(&mut self.read_wait, "a read", |cx| {
                Pin::new(&mut *stream).poll_read(cx, &mut buf)
            });
            match outcome {
                None => return,
                Some(Err(error)) => {
                    let kind = error.kind();
                    let aborted = self.stale && kind == ErrorKind::ConnectionAborted;
                    let reset = self.broken && kind == ErrorKind::ConnectionReset;
                    assert!(aborted || reset, "{kind}");
                    return;
                }
                Some(Ok(())) if buf.filled().is_empty() => {
                    let ended = self.guest_shut.send || self.guest == GuestState::Gone;
                    assert!(ended, "an end of file that the guest did not send");
                    assert!(self.host_read == self.guest_sent || self.stale);
                    return;
                }
                Some(Ok(())) => {
                    for got in buf.filled() {
                        assert_eq!(*got, byte(!self.salt, self.host_read));
                        self.host_read += 1;
                    }
                    assert!(self.host_read <= self.guest_sent);
                    left -= buf.filled().len();
                }
            }
        }
    }

    fn host_shutdown(&mut self) {
        if let Some(stream) = &mut self.stream {
            let done = Pin::new(stream).poll_shutdown(&mut Context::from_waker(Waker::noop()));
            assert!(matches!(done, Poll::Ready(Ok(()))));
            self.host_shut = true;
        }
    }

    fn guest_send(&mut self, n: usize) -> Vec<(Header, Vec<u8>)> {
        let mut packets = Vec::new();
        let mut left = n;
        while left > 0
            && self.guest == GuestState::Open
            && !self.guest_shut.send
            && !self.host_told.receive
            && self.socket.room() > 0
        {
            let len = left.min(self.socket.room()).min(65536);
            let bytes = (0..len)
                .map(|i| byte(!self.salt, self.guest_sent + i))
                .collect();
            packets.push((self.socket.data(len), bytes));
            self.guest_sent += len;
            left -= len;
        }
        packets
    }

    /// The guest's program reads.
    fn guest_read(&mut self, n: usize) -> Option<(Header, Vec<u8>)> {
        let n = n.min(self.guest_unread);
        self.guest_unread -= n;
        self.guest_got += n;
        self.socket.consumed = self.socket.consumed.wrapping_add(n as u32);
        if self.guest != GuestState::Open || n == 0 {
            return None;
        }
        Some((self.socket.header(Op::CreditUpdate), Vec::new()))
    }

    fn guest_shutdown(&mut self, shut: ShutdownFlags) -> Option<(Header, Vec<u8>)> {
        if self.guest != GuestState::Open {
            return None;
        }
        self.guest_shut = self.guest_shut.with(shut);
        Some((self.socket.shutdown(shut), Vec::new()))
    }

    fn guest_close(&mut self) -> Option<(Header, Vec<u8>)> {
        match self.guest {
            GuestState::Open if self.host_told == ShutdownFlags::BOTH => {
                self.guest = GuestState::Gone;
                self.guest_shut = ShutdownFlags::BOTH;
                Some((self.socket.header(Op::Reset), Vec::new()))
            }
            GuestState::Open => {
                self.guest = GuestState::Closing;
                let told = std::mem::replace(&mut self.guest_shut, ShutdownFlags::BOTH);
                (told != ShutdownFlags::BOTH)
                    .then(|| (self.socket.shutdown(ShutdownFlags::BOTH), Vec::new()))
            }
            GuestState::Asking => {
                self.guest = GuestState::Gone;
                self.broken = true;
                None
            }
            _ => None,
        }
    }

    fn guest_receives(
        &mut self,
        op: Op,
        header: &Header,
        payload: &[u8],
    ) -> Option<(Header, Vec<u8>)> {
        self.socket.hear(header);
        match op {
            Op::Response => {
                assert_eq!(self.guest, GuestState::Asking);
                self.guest = GuestState::Open;
            }
            Op::Reset => {
                let in_order =
                    self.host_told == ShutdownFlags::BOTH || self.guest_shut == ShutdownFlags::BOTH;
                let refused =
                    self.guest == GuestState::Asking && self.socket.host_port != HOST_PORT;
                assert!(
                    in_order || refused || self.broken,
                    "a reset out of the blue: {self:?}"
                );
                self.guest = GuestState::Gone;
            }
            Op::Shutdown => {
                self.host_told = self.host_told.with(shut(header));
                if self.host_told == ShutdownFlags::BOTH && self.guest_unread == 0 {
                    self.guest = GuestState::Gone;
                    self.guest_shut = ShutdownFlags::BOTH;
                    return Some((self.socket.header(Op::Reset), Vec::new()));
                }
            }
            Op::Data => {
                for got in payload {
                    assert_eq!(*got, byte(self.salt, self.guest_heard));
                    self.guest_heard += 1;
                }
                assert!(!self.host_told.send, "data after its end");
                if self.guest == GuestState::Open && !self.guest_shut.receive {
                    self.guest_unread += payload.len();
                    assert!(
                        self.guest_unread <= 262_144,
                        "more than the guest has room for"
                    );
                }
            }
            Op::CreditRequest => {
                return Some((self.socket.header(Op::CreditUpdate), Vec::new()));
            }
            Op::CreditUpdate => {}
            Op::Request => panic!("a request on an open connection"),
        }
        None
    }

    fn expect_everything_arrived(&self) {
        if self.broken {
            return;
        }
        let guest_reads = self.guest_shut != ShutdownFlags::BOTH && !self.guest_shut.receive;
        if guest_reads && !matches!(self.guest, GuestState::Absent | GuestState::Asking) {
            assert_eq!(self.guest_got, self.host_wrote, "to the guest: {self:?}");
        }
        if self.stream.is_some() {
            assert_eq!(self.host_read, self.guest_sent, "to the host: {self:?}");
        }
    }
}

impl std::fmt::Debug for Pair {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pair")
            .field("socket", &self.socket)
            .field("guest", &self.guest)
            .field("guest_shut", &self.guest_shut)
            .field("host_told", &self.host_told)
            .field("guest_unread", &self.guest_unread)
            .field("guest_got", &self.guest_got)
            .field("guest_sent", &self.guest_sent)
            .field("host_wrote", &self.host_wrote)
            .field("host_read", &self.host_read)
            .field("host_shut", &self.host_shut)
            .field("stream", &self.stream)
            .finish_non_exhaustive()
    }
}

proptest! {
    // PROPTEST_CASES raises this in the long tier.
    #![proptest_config(ProptestConfig {
        cases: std::env::var("PROPTEST_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(500),
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn any_interleaving_keeps_the_promises_of_a_stream(
        shape in shape(),
        steps in proptest::collection::vec(step(), 1..120),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap();
        // Outside tokio's cooperative budget, which would report ready operations as pending.
        runtime.block_on(tokio::task::unconstrained(async {
            let mut world = World::new(shape);
            for step in steps {
                world.step(step);
            }
            world.finish();
        }));
    }
}
