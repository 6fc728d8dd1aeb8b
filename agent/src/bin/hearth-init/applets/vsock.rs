//! Peers for tests and benchmarks of vsock connections between guest and host, in both directions.

use alloc::{vec, vec::Vec};

use rustix::{
    event::{PollFd, PollFlags, poll},
    fd::{AsFd, BorrowedFd, OwnedFd},
    io::{Errno, ioctl_fionbio, read, write},
    net::{
        AddressFamily, Shutdown, SocketFlags, SocketType, accept_with, bind, connect, listen,
        shutdown, socket_with,
    },
};

use super::{Failure, number};
use crate::{
    sys::{VsockAddr, stdin, stdout},
    text::{put, say},
};

const BACKLOG: i32 = 256;
const CHUNK: usize = 64 * 1024;
/// Bytes of a request's header.
const HEAD: usize = 8;

/// `vsock-echo PORT`: listens and sends back the bytes of each connection, until the peer ends its
/// direction.
pub(super) fn echo(args: &[Vec<u8>]) -> Result<u8, Failure> {
    let listener = listening(number(args, 0)?)?;
    let mut conns: Vec<(OwnedFd, Flow)> = Vec::new();
    loop {
        let mut wanted = vec![(listener.as_fd(), PollFlags::IN)];
        wanted.extend(
            conns
                .iter()
                .map(|(conn, flow)| (conn.as_fd(), flow.input() | flow.output())),
        );
        let mut ready = wait(&wanted)?.into_iter();
        let arrived = ready.next() == Some(true);
        // A connection that fails does not affect others.
        conns.retain_mut(|(conn, flow)| {
            ready.next() != Some(true)
                || flow
                    .pump(conn.as_fd(), conn.as_fd())
                    .is_ok_and(|()| !flow.done())
        });
        if arrived {
            let conn = accept_with(&listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?;
            conns.push((conn, Flow::default()));
        }
    }
}

/// `vsock-dial PORT`: connects to the host, sends stdin to it and prints received bytes on stdout.
pub(super) fn dial(args: &[Vec<u8>]) -> Result<u8, Failure> {
    let conn = socket()?;
    connect(
        &conn,
        &VsockAddr {
            cid: VsockAddr::HOST_CID,
            port: number(args, 0)?,
        },
    )?;
    ioctl_fionbio(&conn, true)?;
    let (stdin, stdout) = (stdin(), stdout());
    let (mut there, mut back) = (
        Flow::default(),
        Flow {
            to_socket: false,
            ..Flow::default()
        },
    );
    while !(there.done() && back.done()) {
        let wanted = [
            (stdin, there.input()),
            (conn.as_fd(), there.output()),
            (conn.as_fd(), back.input()),
            (stdout, back.output()),
        ];
        // Standard input and output may block: only what is ready is touched.
        let ready = wait(&wanted)?;
        if let [true, _, ..] | [_, true, ..] = ready.as_slice() {
            there.pump(stdin, conn.as_fd())?;
        }
        if let [.., true, _] | [.., true] = ready.as_slice() {
            back.pump(conn.as_fd(), stdout)?;
        }
    }
    Ok(0)
}

/// `vsock-exchange PORT`: listens and answers requests, on one connection after the other. A
/// request begins with its own length (header included) and the length of its answer, 32 bits each,
/// little-endian.
pub(super) fn exchange(args: &[Vec<u8>]) -> Result<u8, Failure> {
    let listener = listening(number(args, 0)?)?;
    let mut chunk = vec![0; CHUNK];
    loop {
        let conn = accept_with(&listener, SocketFlags::CLOEXEC)?;
        // A connection that fails does not affect others.
        while let Ok(true) = answer(conn.as_fd(), &mut chunk) {}
    }
}

/// Reads a request and answers it; returns false at the end of the connection.
fn answer(conn: BorrowedFd<'_>, chunk: &mut [u8]) -> Result<bool, Errno> {
    let mut taken = 0;
    while taken < HEAD {
        match read(conn, chunk.get_mut(taken..).unwrap_or_default())? {
            0 => return Ok(false),
            count => taken += count,
        }
    }
    let mut numbers = chunk.chunks_exact(4).map(|bytes| {
        let bytes = bytes.try_into().unwrap_or_default();
        u32::from_le_bytes(bytes) as usize
    });
    let (asked, mut left) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    while taken < asked {
        let most = chunk.len().min(asked - taken);
        match read(conn, chunk.get_mut(..most).unwrap_or_default())? {
            0 => return Ok(false),
            count => taken += count,
        }
    }
    while left > 0 {
        let part = chunk.get(..left.min(chunk.len())).unwrap_or_default();
        put(conn, part)?;
        left -= part.len();
    }
    Ok(true)
}

/// Listens for connections from the host, and prints `listening`.
fn listening(port: u32) -> Result<OwnedFd, Failure> {
    let listener = socket()?;
    let address = VsockAddr {
        cid: VsockAddr::ANY_CID,
        port,
    };
    bind(&listener, &address)?;
    listen(&listener, BACKLOG)?;
    say("listening")?;
    Ok(listener)
}

fn socket() -> Result<OwnedFd, Errno> {
    socket_with(
        AddressFamily::VSOCK,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )
}

/// Waits until an event occurs on a wanted descriptor. Returns for each whether it did.
fn wait(wanted: &[(BorrowedFd<'_>, PollFlags)]) -> Result<Vec<bool>, Errno> {
    // A hang-up is reported even if it is not asked for, so descriptors without flags are left out.
    let asked = wanted.iter().filter(|(_, flags)| !flags.is_empty());
    let mut fds: Vec<_> = asked
        .map(|&(fd, flags)| PollFd::from_borrowed_fd(fd, flags))
        .collect();
    poll(&mut fds, None)?;
    let mut happened = fds.iter().map(|fd| !fd.revents().is_empty());
    Ok(wanted
        .iter()
        .map(|(_, flags)| !flags.is_empty() && happened.next() == Some(true))
        .collect())
}

/// One direction of a connection: a chunk that was read and not written, and whether the source has
/// ended.
struct Flow {
    chunk: Vec<u8>,
    ended: bool,
    /// Whether the destination is a socket, which is shut down for writing at the end.
    to_socket: bool,
}

impl Default for Flow {
    fn default() -> Self {
        Self {
            chunk: Vec::new(),
            ended: false,
            to_socket: true,
        }
    }
}

impl Flow {
    /// Returns the events to wait for at the source.
    fn input(&self) -> PollFlags {
        if self.chunk.is_empty() && !self.ended {
            PollFlags::IN
        } else {
            PollFlags::empty()
        }
    }

    /// Returns the events to wait for at the destination.
    fn output(&self) -> PollFlags {
        if self.chunk.is_empty() {
            PollFlags::empty()
        } else {
            PollFlags::OUT
        }
    }

    fn done(&self) -> bool {
        self.ended && self.chunk.is_empty()
    }

    /// Reads once if no chunk is buffered, then writes as much as it can.
    fn pump(&mut self, from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> Result<(), Errno> {
        if self.chunk.is_empty() && !self.ended {
            self.chunk.resize(CHUNK, 0);
            let count = match read(from, &mut self.chunk) {
                Ok(count) => Some(count),
                Err(Errno::AGAIN) => None,
                Err(errno) => return Err(errno),
            };
            self.chunk.truncate(count.unwrap_or(0));
            self.ended = count == Some(0);
        }
        if !self.chunk.is_empty() {
            match write(to, &self.chunk) {
                Ok(count) => drop(self.chunk.drain(..count.min(self.chunk.len()))),
                Err(Errno::AGAIN) => {}
                Err(errno) => return Err(errno),
            }
        }
        if self.done() && self.to_socket {
            shutdown(to, Shutdown::Write)?;
        }
        Ok(())
    }
}
