//! A connection's socket or serial line, with its buffers in both directions.

use alloc::vec::Vec;

use hearth_agent::proto::{FrameBuffer, FrameError, Hello, Response, encode};
use rustix::{
    fd::{AsFd, BorrowedFd, OwnedFd},
    io::{Errno, read, write},
    net::{RecvFlags, SendFlags, recv, send, sockopt::socket_error},
};

/// Bytes of unsent output from which no more is produced: the peer does not read.
const HIGH_WATER: usize = 64 * 1024;

/// A socket and its buffers. They are bounded: input by the longest frame, output by [`HIGH_WATER`]
/// and one frame.
#[derive(Debug)]
pub(crate) struct Channel {
    socket: OwnedFd,
    pub(crate) input: FrameBuffer,
    pub(crate) output: Output,
}

/// The bytes to be sent.
#[derive(Debug, Default)]
pub(crate) struct Output {
    bytes: Vec<u8>,
    sent: usize,
}

/// The connection has ended: its peer closed it (`None`), or it failed with an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Lost(pub(crate) Option<Errno>);

impl Channel {
    pub(crate) fn new(socket: OwnedFd) -> Self {
        Self {
            socket,
            input: FrameBuffer::new(),
            output: Output::default(),
        }
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Returns how the attempt to connect ended, once the socket is writable.
    pub(crate) fn connected(&self) -> Result<(), Lost> {
        match socket_error(&self.socket).and_then(|result| result) {
            // A serial line needs no connecting.
            Ok(()) | Err(Errno::NOTSOCK) => Ok(()),
            Err(errno) => Err(Lost(Some(errno))),
        }
    }

    /// Reads once; returns false if there was nothing to read or no room for it.
    pub(crate) fn read(&mut self) -> Result<bool, Lost> {
        let room = self.input.spare().map_err(|_| Lost(None))?;
        if room.is_empty() {
            return Ok(false);
        }
        match receive(&self.socket, room) {
            Ok(0) => Err(Lost(None)),
            Ok(count) => {
                self.input.filled(count);
                Ok(true)
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(false),
            Err(errno) => Err(Lost(Some(errno))),
        }
    }

    /// Sends as much as the socket takes.
    pub(crate) fn flush(&mut self) -> Result<(), Lost> {
        let Output { bytes, sent } = &mut self.output;
        while let Some(rest) = bytes.get(*sent..).filter(|rest| !rest.is_empty()) {
            match transmit(&self.socket, rest) {
                Ok(count) => *sent += count,
                Err(Errno::INTR) => {}
                // The kernel has no room for more now.
                Err(Errno::AGAIN | Errno::NOBUFS | Errno::NOMEM) => return Ok(()),
                Err(errno) => return Err(Lost(Some(errno))),
            }
        }
        bytes.clear();
        *sent = 0;
        Ok(())
    }
}

/// Reads once, without waiting.
fn receive(socket: &OwnedFd, room: &mut [u8]) -> Result<usize, Errno> {
    match recv(socket, &mut *room, RecvFlags::DONTWAIT) {
        Err(Errno::NOTSOCK) => read(socket, room),
        received => received.map(|(count, _)| count),
    }
}

/// Sends once, without waiting.
fn transmit(socket: &OwnedFd, bytes: &[u8]) -> Result<usize, Errno> {
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    match send(socket, bytes, flags) {
        Err(Errno::NOTSOCK) => write(socket, bytes),
        sent => sent,
    }
}

impl Output {
    /// Whether more output may be produced.
    pub(crate) fn has_room(&self) -> bool {
        self.unsent() < HIGH_WATER
    }

    pub(crate) fn unsent(&self) -> usize {
        self.bytes.len().saturating_sub(self.sent)
    }

    /// Queues a response.
    pub(crate) fn push(&mut self, response: &Response<'_>) -> Result<(), FrameError> {
        encode(response, &mut self.bytes)
    }

    /// Queues the greeting.
    pub(crate) fn greet(&mut self, hello: &Hello) -> Result<(), FrameError> {
        hello.encode(&mut self.bytes)
    }
}
