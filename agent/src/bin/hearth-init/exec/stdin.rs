//! A program's stdin: a pipe, or a terminal that is typed on.

use alloc::vec::Vec;

use hearth_agent::proto::{FrameError, Rejection, Response, STDIN_UNREPORTED, STDIN_WINDOW};
use rustix::{
    fd::{AsFd, BorrowedFd, OwnedFd},
    io::{Errno, write},
};

use crate::{channel::Output, terminal};

#[derive(Debug)]
pub(super) struct Stdin {
    pipe: Option<OwnedFd>,
    /// What the pipe had no room for.
    waiting: Vec<u8>,
    /// What the program took and the host does not know.
    unreported: usize,
    eof: bool,
    /// On a terminal whose end of input is still to be typed: whether a line was begun.
    line_begun: Option<bool>,
}

impl Stdin {
    pub(super) fn new(pipe: Option<OwnedFd>, is_terminal: bool) -> Self {
        Self {
            pipe,
            waiting: Vec::new(),
            unreported: 0,
            eof: false,
            line_begun: is_terminal.then_some(false),
        }
    }

    /// The descriptor to wait for, while some input waits.
    pub(super) fn waits_for(&self) -> Option<BorrowedFd<'_>> {
        let pipe = self.pipe.as_ref().filter(|_| !self.waiting.is_empty());
        pipe.map(AsFd::as_fd)
    }

    /// Takes input; what the program has no room for waits.
    pub(super) fn take(&mut self, bytes: &[u8], out: &mut Output) -> Result<(), Rejection> {
        let Stdin {
            pipe,
            waiting,
            unreported,
            eof,
            ..
        } = self;
        if pipe.is_none() {
            return Ok(());
        }
        if *eof || waiting.len() + *unreported + bytes.len() > STDIN_WINDOW {
            return Err(Rejection::StdinOverrun);
        }
        waiting.extend_from_slice(bytes);
        self.pump(out).map_err(|_| Rejection::Malformed)
    }

    /// No more comes.
    pub(super) fn end(&mut self) {
        self.eof = true;
        self.finish();
    }

    /// Lets go of it, and of what waits; false if that was done before.
    pub(super) fn close(&mut self) -> bool {
        self.waiting = Vec::new();
        self.pipe.take().is_some()
    }

    /// Writes waiting input and reports what was taken.
    pub(super) fn pump(&mut self, out: &mut Output) -> Result<(), FrameError> {
        let Stdin {
            pipe,
            waiting,
            unreported,
            eof,
            line_begun,
        } = self;
        let Some(fd) = pipe else { return Ok(()) };
        if !waiting.is_empty() {
            match write(&*fd, waiting) {
                Ok(count) => {
                    let mut written = waiting.drain(..count.min(waiting.len()));
                    if let (Some(begun), Some(last)) = (line_begun, written.next_back()) {
                        *begun = last != b'\n';
                    }
                    // After the end nobody waits for room, and the end itself was not sent.
                    if !*eof {
                        *unreported += count;
                    }
                }
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(_) => {
                    *pipe = None;
                    waiting.clear();
                    return out.push(&Response::StdinClosed);
                }
            }
        }
        self.finish();
        if self.pipe.is_some() && self.unreported >= STDIN_UNREPORTED {
            let taken = core::mem::take(&mut self.unreported);
            out.push(&Response::StdinTaken(
                u32::try_from(taken).unwrap_or(u32::MAX),
            ))?;
        }
        Ok(())
    }

    /// Once all input is written and no more comes: the end.
    fn finish(&mut self) {
        if !self.eof || !self.waiting.is_empty() {
            return;
        }
        match (&self.pipe, self.line_begun.take()) {
            (Some(terminal), Some(begun)) => {
                self.waiting = terminal::end_of_input(terminal.as_fd(), begun);
            }
            _ => self.pipe = None,
        }
    }
}
