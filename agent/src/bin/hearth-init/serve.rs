//! The event loop: one thread and one poll, from which everything else is called.
//!
//! The set of descriptors to wait for is computed anew each time: none is polled that cannot make
//! progress, and no event is lost.

use alloc::{vec, vec::Vec};
use core::time::Duration;

use hearth_agent::proto::{Rejection, ShutdownKind};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fd::{AsFd, OwnedFd},
    io::Errno,
    system::RebootCommand,
};

use crate::{
    clock::{self, Instant},
    conn::{Conn, Hangup, Pipe},
    exec::Which,
    guest::Guest,
    reaper::Reaper,
    transport::Transport,
};

/// Most connections at once.
const MAX_CONNECTIONS: usize = 128;
/// Connections accepted in one turn of the loop, before other events are handled.
const ACCEPTS: usize = 8;
/// Pause after the guest ran out of memory or descriptors for a new connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);
/// First pause before the next attempt to connect to the host; it doubles each time.
const REDIAL_PAUSE: Duration = Duration::from_millis(100);
/// Most attempts in a row that fail for another reason than a refusal.
const REDIALS: u32 = 8;
/// Initial size of the read buffer: one page.
const SMALL_READ: usize = 4096;

/// Why the loop ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct End(ShutdownKind);

impl End {
    pub(crate) fn reboot_command(self) -> RebootCommand {
        match self.0 {
            ShutdownKind::PowerOff => RebootCommand::PowerOff,
            ShutdownKind::Reboot => RebootCommand::Restart,
        }
    }
}

/// The server.
#[derive(Debug)]
pub(crate) struct Server {
    guest: Guest,
    reaper: Reaper,
    transport: Transport,
    listener: Option<OwnedFd>,
    conns: Vec<Conn>,
    /// Until then the listener is not polled.
    accept_at: Option<Instant>,
    /// When to connect again, and to listen if that failed.
    redial_at: Option<Instant>,
    failed_dials: u32,
    scratch: Vec<u8>,
}

/// What a polled descriptor stands for.
#[derive(Clone, Copy, Debug)]
enum Source {
    Children,
    Listener,
    Conn(usize),
    /// The start of a program.
    Start(usize),
    Stdin(usize),
    Output(usize, Which),
}

impl Server {
    pub(crate) fn new(guest: Guest, reaper: Reaper, transport: Transport) -> Self {
        Self {
            guest,
            reaper,
            transport,
            listener: None,
            conns: Vec::new(),
            accept_at: None,
            redial_at: None,
            failed_dials: 0,
            scratch: vec![0; SMALL_READ],
        }
    }

    /// Connects to the host. If it cannot be reached yet, the loop tries again.
    pub(crate) fn dial(&mut self) {
        match self.transport.dial() {
            Ok(socket) => self.conns.extend(socket.map(Conn::dialled)),
            Err(errno) => self.dial_failed(errno),
        }
    }

    /// Listens for connections. If that fails, the loop tries again when it next connects.
    pub(crate) fn listen(&mut self) {
        match self.transport.listen() {
            Ok(socket) => self.listener = Some(socket),
            Err(errno) => self.dial_failed(errno),
        }
    }

    /// Schedules another attempt. A host that refuses is there but does not listen: it will connect
    /// by itself.
    fn dial_failed(&mut self, errno: Errno) {
        if matches!(errno, Errno::CONNREFUSED | Errno::CONNRESET) || self.failed_dials >= REDIALS {
            return;
        }
        self.redial_at =
            Instant::now().checked_add(REDIAL_PAUSE.saturating_mul(1 << self.failed_dials));
        self.failed_dials += 1;
    }

    /// Serves until a request ends the guest.
    pub(crate) fn run(&mut self) -> End {
        loop {
            let now = Instant::now();
            for (source, flags) in self.wait(now) {
                self.dispatch(source, flags);
            }
            if self.reaper.has_more() {
                self.reap();
            }
            if let Some(end) = self.settle() {
                return end;
            }
        }
    }

    /// Waits for events or until the next deadline.
    fn wait(&self, now: Instant) -> Vec<(Source, PollFlags)> {
        let (mut sources, mut fds) = (Vec::new(), Vec::new());
        if let Some(deaths) = self.reaper.fd() {
            sources.push(Source::Children);
            fds.push(PollFd::from_borrowed_fd(deaths, PollFlags::IN));
        }
        if let (Some(listener), None) = (&self.listener, self.accept_at) {
            sources.push(Source::Listener);
            fds.push(PollFd::new(listener, PollFlags::IN));
        }
        for (index, conn) in self.conns.iter().enumerate() {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::IN, !conn.is_connecting() && conn.wants_input());
            flags.set(
                PollFlags::OUT,
                conn.is_connecting() || conn.channel.output.unsent() > 0,
            );
            sources.push(Source::Conn(index));
            fds.push(PollFd::from_borrowed_fd(conn.channel.fd(), flags));
            if let Some(program) = conn.program() {
                let (stdin, outputs) = program.waits_for(conn.channel.output.has_room());
                let outputs = Which::ALL.into_iter().zip(outputs);
                let start = program.waits_to_run();
                let wanted = [
                    (Source::Start(index), start, PollFlags::empty()),
                    (Source::Stdin(index), stdin, PollFlags::OUT),
                ];
                let wanted = wanted.into_iter().chain(
                    outputs.map(|(which, fd)| (Source::Output(index, which), fd, PollFlags::IN)),
                );
                for (source, fd, flags) in wanted {
                    if let Some(fd) = fd {
                        sources.push(source);
                        fds.push(PollFd::from_borrowed_fd(fd, flags));
                    }
                }
            }
        }
        match poll(&mut fds, self.time_to_wait(now).as_ref()) {
            Ok(_) => {}
            Err(Errno::INTR) => return Vec::new(),
            // Out of memory, or more descriptors than allowed: pause instead of spinning, then
            // reap, as ended children may have freed some.
            Err(_) => {
                clock::sleep(ACCEPT_PAUSE);
                return vec![(Source::Children, PollFlags::IN)];
            }
        }
        sources
            .into_iter()
            .zip(fds.iter().map(PollFd::revents))
            .filter(|(_, flags)| !flags.is_empty())
            .collect()
    }

    /// Returns the time until the next deadline; `None` if there is none.
    fn time_to_wait(&self, now: Instant) -> Option<Timespec> {
        if self.reaper.has_more() || self.conns.iter().any(Conn::is_busy) {
            return Some(Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            });
        }
        let programs = self
            .conns
            .iter()
            .filter_map(|conn| conn.program()?.next_tick());
        let due = programs.chain(self.accept_at).chain(self.redial_at).min()?;
        Timespec::try_from(due.saturating_duration_since(now)).ok()
    }

    fn dispatch(&mut self, source: Source, flags: PollFlags) {
        let Self {
            guest,
            conns,
            scratch,
            ..
        } = self;
        match source {
            Source::Children => self.reap(),
            Source::Listener => self.accept(),
            Source::Conn(index) => {
                let Some(conn) = conns.get_mut(index) else {
                    return;
                };
                if conn.is_connecting() {
                    conn.connected(guest);
                } else if flags
                    .intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL)
                {
                    conn.read();
                }
            }
            Source::Start(index) => {
                if let Some(conn) = conns.get_mut(index) {
                    conn.started(guest);
                }
            }
            Source::Stdin(index) => {
                if let Some(conn) = conns.get_mut(index) {
                    conn.pump(Pipe::Stdin, scratch);
                }
            }
            Source::Output(index, which) => {
                if let Some(conn) = conns.get_mut(index) {
                    conn.pump(
                        Pipe::Output {
                            which,
                            hung_up: flags.contains(PollFlags::HUP),
                        },
                        scratch,
                    );
                }
            }
        }
    }

    /// Reaps dead children and notifies their connections.
    fn reap(&mut self) {
        let dead = self.reaper.reap();
        let now = Instant::now();
        for dead in &dead {
            // It belongs to no connection if it is an orphan, a child that could not execute its
            // program, or the program of a closed connection.
            let known = self
                .conns
                .iter_mut()
                .any(|conn| conn.reaped(dead, now, &mut self.guest, &mut self.scratch));
            if !known {
                self.guest.reaped(dead.pid);
            }
        }
    }

    fn accept(&mut self) {
        let Some(listener) = &self.listener else {
            return;
        };
        for _ in 0..ACCEPTS {
            match self.transport.accept(listener.as_fd()) {
                Ok(Some(socket)) => {
                    let mut conn = Conn::accepted(socket, &self.guest);
                    if self.conns.len() >= MAX_CONNECTIONS {
                        conn.refuse(Rejection::TooManyConnections);
                    } else {
                        self.conns.push(conn);
                    }
                }
                Ok(None) | Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(Errno::AGAIN) => break,
                // Out of descriptors or memory: the connection stays in the queue, and accepting
                // again at once would spin.
                Err(_) => {
                    self.accept_at = Instant::now().checked_add(ACCEPT_PAUSE);
                    break;
                }
            }
        }
    }

    /// Lets every connection do what it can, then handles what is due.
    fn settle(&mut self) -> Option<End> {
        let now = Instant::now();
        let (mut shutdown, mut ponged, mut hangup) = (None, false, None);
        for conn in &mut self.conns {
            let asked = conn.settle(&mut self.guest, now, &mut self.scratch);
            shutdown = shutdown.or(asked.shutdown);
            ponged |= asked.ponged;
            hangup = hangup.or(conn.hangup());
        }
        self.conns.retain(|conn| conn.over().is_none());
        match hangup {
            Some(Hangup::NotTaken(errno)) => self.dial_failed(errno),
            Some(Hangup::Broken) => self.redial_at = Some(now),
            Some(Hangup::Wanted) | None => {}
        }
        if let Some(kind) = shutdown {
            return Some(End(kind));
        }
        if ponged {
            // The host has its answer: now set up what programs will need.
            self.failed_dials = 0;
            self.guest.prepare();
        }
        if self.accept_at.is_some_and(|at| now >= at) {
            self.accept_at = None;
        }
        if self.redial_at.is_some_and(|at| now >= at) {
            self.redial_at = None;
            if self.listener.is_none() {
                self.listen();
            }
            self.dial();
        }
        None
    }
}
