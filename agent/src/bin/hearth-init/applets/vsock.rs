//! Peers for tests of the sockets between guest and host, in both directions.

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
    text::say,
};

const BACKLOG: i32 = 256;
const CHUNK: usize = 64 * 1024;

/// `vsock-echo PORT`: listens and sends back what each connection brings, until it ends its direction.
pub(super) fn echo(args: &[Vec<u8>]) -> Result<u8, Failure> {
    let listener = socket()?;
    bind(
        &listener,
        &VsockAddr {
            cid: VsockAddr::ANY_CID,
            port: number(args, 0)?,
        },
    )?;
    listen(&listener, BACKLOG)?;
    say("listening")?;
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
        // A connection that fails ends alone.
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

/// `vsock-dial PORT`: connects to the host; stdin goes there, what comes back goes to stdout.
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

fn socket() -> Result<OwnedFd, Errno> {
    socket_with(
        AddressFamily::VSOCK,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )
}

/// Waits until something happens where something is wanted; says where.
fn wait(wanted: &[(BorrowedFd<'_>, PollFlags)]) -> Result<Vec<bool>, Errno> {
    // A hang-up is reported whether it is asked for or not: what is not wanted is not looked at.
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

/// One direction: a chunk that was read and not written, and whether the source has ended.
struct Flow {
    chunk: Vec<u8>,
    ended: bool,
    /// The end is passed on.
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
    /// What to wait for at the source.
    fn input(&self) -> PollFlags {
        if self.chunk.is_empty() && !self.ended {
            PollFlags::IN
        } else {
            PollFlags::empty()
        }
    }

    /// What to wait for at the destination.
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

    /// Reads once if nothing waits, then writes what it can.
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
