//! A program's stdin: a pipe or a terminal.

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
    /// Input that the pipe had no room for.
    waiting: Vec<u8>,
    /// Bytes that the program took and that are not yet reported to the host.
    unreported: usize,
    eof: bool,
    /// Whether a line was begun, on a terminal whose end of input is not yet written; else `None`.
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

    /// Returns the descriptor to wait for while input is buffered.
    pub(super) fn waits_for(&self) -> Option<BorrowedFd<'_>> {
        let pipe = self.pipe.as_ref().filter(|_| !self.waiting.is_empty());
        pipe.map(AsFd::as_fd)
    }

    /// Takes input, and buffers it where the program has no room for it.
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

    /// Ends the input: the host sends no more.
    pub(super) fn end(&mut self) {
        self.eof = true;
        self.finish();
    }

    /// Closes stdin and drops buffered input; returns false if it was closed before.
    pub(super) fn close(&mut self) -> bool {
        self.waiting = Vec::new();
        self.pipe.take().is_some()
    }

    /// Writes buffered input and reports the bytes that the program took.
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
                    // After the end the host needs no more window, and the end-of-input character
                    // was not sent by it.
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

    /// Ends the program's input, once all of it is written and no more comes.
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
