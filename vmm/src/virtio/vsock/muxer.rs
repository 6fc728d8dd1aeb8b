//! The table of connections, the order in which they send to the guest, and the resets for packets
//! that belong to no connection.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io::{self, Read, Write};
use std::sync::{Arc, Weak};
use std::time::Instant;

use super::conn::{CloseReason, Conn, ConnectionState, Key};
use super::established::Answer;
use super::host::{ConnectError, ListenError};
use super::listener::Backlog;
use super::packet::{HOST_CID, Header, Op, TYPE_STREAM};
use super::places::Places;
use super::shared::{Hub, Inbox};
use super::state::{ConnState, RawVsockState, RestoreOutcome, VsockState};
use super::stream::VsockStream;

/// Most connections of one device, in all states together. A connection counts until both ends have
/// released it.
pub const MAX_CONNECTIONS: usize = 4096;
/// Most ports of one device that the host listens on.
pub const MAX_LISTENERS: usize = 1024;
/// Most connections of one listener that wait to be accepted; the guest's next one is refused.
pub const BACKLOG: usize = 128;
/// How many connections get a [`WIDE_WINDOW`] at a time.
pub const WIDE_CONNECTIONS: usize = 256;
/// Bytes that each of [`WIDE_CONNECTIONS`] connections may buffer in each direction.
pub const WIDE_WINDOW: u32 = 256 * 1024;
/// Bytes that each connection beyond [`WIDE_CONNECTIONS`] may buffer in each direction.
pub const NARROW_WINDOW: u32 = 32 * 1024;
/// Most resets that wait for the guest's RX buffers. The device takes no TX packet while so many
/// wait: each packet of the guest causes at most one reset.
pub(super) const MAX_REFUSALS: usize = 64;
/// Host ports of connections that the host opens; the low ones are for listeners.
pub(super) const HOST_PORTS: std::ops::Range<u32> = 1 << 30..u32::MAX;

/// See the [module](self).
#[derive(Debug)]
pub(super) struct Muxer {
    pub(super) guest_cid: u64,
    hub: Weak<Hub>,
    /// The device has queues.
    active: bool,
    /// The VM has ended.
    closed: bool,
    conns: HashMap<Key, Arc<Conn>>,
    listeners: HashMap<u32, Arc<Backlog>>,
    /// The backlog for ports without a listener of their own.
    any: Option<Arc<Backlog>>,
    /// Connections with a packet pending for the guest, each at most once, served in turn. Empty
    /// while the device is not active.
    turns: VecDeque<Arc<Conn>>,
    /// Resets for packets that belong to no connection.
    refusals: VecDeque<Header>,
    /// Dropped connections in the order in which they time out.
    closing: VecDeque<(Instant, Arc<Conn>)>,
    next_port: u32,
    places: Places,
    /// Restored connections that were not reattached yet.
    detached: HashMap<Key, VsockStream>,
}

impl Muxer {
    pub(super) fn new(guest_cid: u64, hub: Weak<Hub>) -> Self {
        Self {
            guest_cid,
            hub,
            active: false,
            closed: false,
            conns: HashMap::new(),
            listeners: HashMap::new(),
            any: None,
            turns: VecDeque::new(),
            refusals: VecDeque::new(),
            closing: VecDeque::new(),
            next_port: HOST_PORTS.start,
            places: Places::default(),
            detached: HashMap::new(),
        }
    }

    /// The state that a snapshot keeps.
    pub(super) fn save(&self, reset_pending: bool) -> VsockState {
        let refused = self
            .refusals
            .iter()
            .filter(|refusal| refusal.src_cid == HOST_CID && refusal.kind == TYPE_STREAM)
            .map(|refusal| Key {
                host: refusal.src_port,
                guest: refusal.dst_port,
            })
            .map(|key| (key, RestoreOutcome::Refused));
        let known = self.conns.iter().filter_map(|(key, conn)| {
            conn.look(|connection| (!connection.is_unsent()).then(|| (*key, connection.outcome())))
        });
        let outcomes: BTreeMap<_, _> = refused.chain(known).collect();
        let conns = outcomes.into_iter().map(|(key, outcome)| ConnState {
            host_port: key.host,
            guest_port: key.guest,
            outcome,
        });
        VsockState::of_live(RawVsockState {
            guest_cid: self.guest_cid,
            next_port: self.next_port,
            reset_pending,
            conns: conns.collect(),
        })
    }

    /// Continues from a snapshot: durable connections wait to be reattached. A reset is pending for
    /// every other one, except those that the reset of the whole transport ends.
    pub(super) fn restore(state: &VsockState, hub: Weak<Hub>) -> Self {
        let mut muxer = Self::new(state.guest_cid(), hub);
        muxer.next_port = state.next_port();
        for saved in state.conns() {
            let key = Key {
                host: saved.host_port,
                guest: saved.guest_port,
            };
            match saved.outcome {
                RestoreOutcome::Durable(credit) => {
                    let conn = muxer.insert(key, ConnectionState::resumed(&credit));
                    muxer.detached.insert(key, VsockStream::new(conn));
                }
                RestoreOutcome::Lost if state.resets_transport() => {}
                RestoreOutcome::Lost | RestoreOutcome::Refused => {
                    muxer.insert(key, ConnectionState::lost());
                }
            }
        }
        muxer
    }

    // The host's requests.

    /// Opens a connection, which waits for the guest's answer.
    pub(super) fn connect(&mut self, guest_port: u32) -> Result<VsockStream, ConnectError> {
        if self.closed {
            return Err(ConnectError::VmEnded);
        }
        if self.places.are_taken() {
            return Err(ConnectError::TooMany);
        }
        let host = self.free_port(guest_port).ok_or(ConnectError::TooMany)?;
        let key = Key {
            host,
            guest: guest_port,
        };
        let connection = ConnectionState::connecting(self.places.next_window());
        let conn = self.insert(key, connection);
        self.changed(&conn, |_| ());
        Ok(VsockStream::new(conn))
    }

    /// The next host port in sequence that has no connection with this guest port. The sequence
    /// wraps around after 3 billion connects: by then the guest has long closed the earlier ones.
    fn free_port(&mut self, guest: u32) -> Option<u32> {
        for _ in 0..=MAX_CONNECTIONS {
            let host = self.next_port;
            let next = Some(host + 1).filter(|port| HOST_PORTS.contains(port));
            self.next_port = next.unwrap_or(HOST_PORTS.start);
            if !self.conns.contains_key(&Key { host, guest }) {
                return Some(host);
            }
        }
        None
    }

    pub(super) fn listen(&mut self, port: u32) -> Result<Arc<Backlog>, ListenError> {
        if self.closed {
            return Err(ListenError::VmEnded);
        }
        if self.listeners.contains_key(&port) {
            return Err(ListenError::InUse(port));
        }
        if self.listeners.len() >= MAX_LISTENERS {
            return Err(ListenError::TooMany);
        }
        let backlog = Arc::<Backlog>::default();
        self.listeners.insert(port, Arc::clone(&backlog));
        Ok(backlog)
    }

    pub(super) fn unlisten(&mut self, port: u32) {
        self.listeners.remove(&port);
    }

    /// Listens on every port that has no listener of its own.
    pub(super) fn listen_any(&mut self) -> Result<Arc<Backlog>, ListenError> {
        if self.closed {
            return Err(ListenError::VmEnded);
        }
        if self.any.is_some() {
            return Err(ListenError::AnyInUse);
        }
        let backlog = Arc::<Backlog>::default();
        self.any = Some(Arc::clone(&backlog));
        Ok(backlog)
    }

    pub(super) fn unlisten_any(&mut self) {
        self.any = None;
    }

    pub(super) fn reattach(&mut self, key: Key) -> Option<VsockStream> {
        self.detached.remove(&key)
    }

    pub(super) fn reattach_all(&mut self) -> Vec<VsockStream> {
        self.detached.drain().map(|(_, stream)| stream).collect()
    }

    // The table.

    pub(super) fn connections(&self) -> usize {
        self.conns.len()
    }

    fn insert(&mut self, key: Key, mut connection: ConnectionState) -> Arc<Conn> {
        connection.place = Some(self.places.take(connection.window()));
        let conn = Conn::new(key, Weak::clone(&self.hub), connection);
        self.conns.insert(key, Arc::clone(&conn));
        conn
    }

    /// Changes a connection, then gives it a turn if it needs one and forgets it if it is over.
    fn changed<R>(&mut self, conn: &Arc<Conn>, by: impl FnOnce(&mut ConnectionState) -> R) -> R {
        let (result, needs_turn) = conn.change(by);
        if needs_turn && self.active {
            self.turns.push_back(Arc::clone(conn));
        }
        self.forget_if_over(conn);
        result
    }

    fn forget_if_over(&mut self, conn: &Arc<Conn>) {
        let over = conn.look(ConnectionState::is_over);
        let known = self.conns.get(&conn.key);
        if over && known.is_some_and(|known| Arc::ptr_eq(known, conn)) {
            self.conns.remove(&conn.key);
        }
    }

    // Activation, reset and end of the device.

    /// Marks the device as active: it has queues, and all connections that waited for them get a
    /// turn.
    pub(super) fn activate(&mut self) {
        self.active = true;
        self.turns.clear();
        for conn in self.conns.values() {
            let ((), needs_turn) = conn.change(|connection| connection.scheduled = false);
            if needs_turn {
                self.turns.push_back(Arc::clone(conn));
            }
        }
    }

    /// Handles a reset of the driver: the guest has none of its connections any more, so they end.
    /// Connections whose request was never sent keep waiting.
    pub(super) fn deactivate(&mut self) {
        self.active = false;
        self.turns.clear();
        self.refusals.clear();
        let conns: Vec<_> = self.conns.values().cloned().collect();
        for conn in conns {
            self.changed(&conn, |connection| {
                if !connection.is_unsent() {
                    connection.end(CloseReason::Reset, false);
                    connection.forgive();
                }
            });
        }
        self.closing.clear();
        self.detached.clear();
    }

    /// Ends all connections and listeners for good.
    pub(super) fn close(&mut self) {
        self.closed = true;
        self.turns.clear();
        self.refusals.clear();
        self.closing.clear();
        for conn in std::mem::take(&mut self.conns).into_values() {
            conn.change(|connection| connection.end(CloseReason::VmEnded, false));
        }
        self.detached.clear();
        for (_, backlog) in self.listeners.drain() {
            backlog.close();
        }
        if let Some(backlog) = self.any.take() {
            backlog.close();
        }
    }

    /// Takes the connections that host tasks left in the inbox since the last run.
    pub(super) fn take_in(&mut self, inbox: Inbox) {
        if self.active {
            self.turns.extend(inbox.ready);
        }
        for conn in inbox.dropped {
            if let Some(at) = conn.look(|connection| connection.deadline) {
                self.closing.push_back((at, Arc::clone(&conn)));
            }
            self.forget_if_over(&conn);
        }
        if self.closing.len() > 2 * MAX_CONNECTIONS {
            // Most of these closed in an orderly way long before their deadline.
            self.closing
                .retain(|(_, conn)| conn.look(|connection| connection.deadline.is_some()));
        }
    }

    /// When [`Muxer::expire`] has something to do next.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.closing.front().map(|(at, _)| *at)
    }

    /// Ends dropped connections that made no progress for too long. All have the same timeout, so
    /// the queue is in order; one that has made progress since moves to the back.
    pub(super) fn expire(&mut self, now: Instant) {
        while let Some((_, conn)) = self.closing.pop_front_if(|(at, _)| *at <= now) {
            match conn.look(|connection| connection.deadline) {
                Some(later) if later > now => self.closing.push_back((later, conn)),
                Some(_) => self.changed(&conn, |connection| connection.expire(now)),
                None => {}
            }
        }
    }

    // The guest's packets.

    /// Whether another packet of the guest may be taken: there must be space for its refusal.
    pub(super) fn can_receive(&self) -> bool {
        self.refusals.len() < MAX_REFUSALS
    }

    /// Takes a packet from the guest. `available` is how many bytes of payload follow in `payload`.
    ///
    /// # Errors
    /// When the payload cannot be read.
    pub(super) fn receive(
        &mut self,
        header: &Header,
        available: usize,
        payload: &mut impl Read,
    ) -> io::Result<()> {
        if header.src_cid != self.guest_cid {
            // Not answered: the source is not the guest's own context id.
            return Ok(());
        }
        if header.dst_cid != HOST_CID || header.kind != TYPE_STREAM {
            self.refuse(header);
            return Ok(());
        }
        let key = Key {
            host: header.dst_port,
            guest: header.src_port,
        };
        let whole = header.len <= super::packet::MAX_PAYLOAD
            && usize::try_from(header.len).is_ok_and(|len| len <= available);
        let op = Op::from_wire(header.op).filter(|_| whole);
        if let Some(conn) = self.conns.get(&key).cloned() {
            self.changed(&conn, |connection| connection.receive(op, header, payload))
        } else {
            if op != Some(Op::Request) || !self.accept(key, header) {
                self.refuse(header);
            }
            Ok(())
        }
    }

    /// Hands the guest's request to a listener; returns false if none has room for it.
    fn accept(&mut self, key: Key, request: &Header) -> bool {
        if self.places.are_taken() {
            return false;
        }
        let (backlog, answer) = match (self.listeners.get(&key.host), &self.any) {
            (Some(backlog), _) => (backlog, Answer::Pending),
            (None, Some(backlog)) => (backlog, Answer::Undecided),
            (None, None) => return false,
        };
        if !backlog.has_room() {
            return false;
        }
        let backlog = Arc::clone(backlog);
        let connection = ConnectionState::asked(self.places.next_window(), request, answer);
        let conn = self.insert(key, connection);
        self.changed(&conn, |_| ());
        backlog.push(VsockStream::new(conn));
        true
    }

    fn refuse(&mut self, header: &Header) {
        self.refusals.extend(header.refusal());
    }

    // Packets to the guest.

    /// Whether [`Muxer::send`] has a packet to send. Drops the turns of connections that no longer
    /// have one.
    pub(super) fn has_packet(&mut self) -> bool {
        while self.refusals.is_empty()
            && let Some(conn) = self.turns.front()
        {
            if conn.look(ConnectionState::owes) {
                return true;
            }
            let conn = Arc::clone(conn);
            self.turns.pop_front();
            self.end_turn(&conn);
        }
        !self.refusals.is_empty()
    }

    /// Writes one packet to `out`, which has space for `room` bytes of payload. Returns the
    /// payload's length; writes nothing if [`Muxer::has_packet`] is false.
    ///
    /// # Errors
    /// When `out` is too short.
    pub(super) fn send(&mut self, room: u32, out: &mut impl Write) -> io::Result<u32> {
        if let Some(refusal) = self.refusals.pop_front() {
            return out.write_all(&refusal.encode()).map(|()| 0);
        }
        let Some(conn) = self.turns.pop_front() else {
            return Ok(0);
        };
        let header = Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: conn.key.host,
            dst_port: conn.key.guest,
            kind: TYPE_STREAM,
            ..Header::default()
        };
        let (sent, _) = conn.change(|connection| connection.emit(header, room, out));
        self.end_turn(&conn);
        Ok(sent?.unwrap_or(0))
    }

    /// Ends the connection's turn; queues it again, behind the others, if another packet is
    /// pending.
    fn end_turn(&mut self, conn: &Arc<Conn>) {
        self.changed(conn, |connection| connection.scheduled = false);
    }
}
