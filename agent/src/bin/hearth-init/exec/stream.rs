//! An output of a program and how far it was read.

use hearth_agent::proto::OutputEnd;
use rustix::{
    fd::{AsFd, BorrowedFd, OwnedFd},
    io::ioctl_fionread,
};

#[derive(Debug)]
pub(super) enum Stream {
    Open(OwnedFd),
    /// The linger time is over; `rest` bytes are still to be read.
    Last {
        pipe: OwnedFd,
        rest: usize,
    },
    /// A terminal that no process has open. Closing the agent's end, too, would hang up the
    /// program.
    Unattended(OwnedFd),
    Closed {
        end: OutputEnd,
    },
}

impl Stream {
    /// Creates the stream of a pipe; without a pipe it is complete.
    pub(super) fn of(pipe: Option<OwnedFd>) -> Self {
        let closed = Self::Closed {
            end: OutputEnd::Complete,
        };
        pipe.map_or(closed, Self::Open)
    }

    /// Returns the number of bytes that can be read now.
    pub(super) fn waiting(&self) -> usize {
        let count = self.pipe().and_then(|pipe| ioctl_fionread(pipe).ok());
        count
            .and_then(|count| usize::try_from(count).ok())
            .unwrap_or(0)
    }

    pub(super) fn pipe(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Open(pipe) | Self::Last { pipe, .. } => Some(pipe.as_fd()),
            Self::Unattended(_) | Self::Closed { .. } => None,
        }
    }

    pub(super) fn leave(&mut self) {
        self.exchange(|stream| match stream {
            Self::Open(terminal) => Self::Unattended(terminal),
            other => other,
        });
    }

    pub(super) fn attend(&mut self) {
        self.exchange(|stream| match stream {
            Self::Unattended(terminal) => Self::Open(terminal),
            other => other,
        });
    }

    fn exchange(&mut self, change: impl FnOnce(Self) -> Self) {
        let closed = Self::Closed {
            end: OutputEnd::StillOpen,
        };
        *self = change(core::mem::replace(self, closed));
    }

    pub(super) fn passed(&mut self, count: usize) {
        if let Self::Last { rest, .. } = self {
            *rest = rest.saturating_sub(count);
            if *rest == 0 {
                *self = Self::Closed {
                    end: OutputEnd::StillOpen,
                };
            }
        }
    }

    /// Handles an empty pipe. Another process has read from it: the bytes counted are not there.
    pub(super) fn emptied(&mut self) {
        if let Self::Last { .. } = self {
            *self = Self::Closed {
                end: OutputEnd::StillOpen,
            };
        }
    }

    /// Limits what is read to the bytes in the pipe now, which include all that the main process
    /// wrote.
    pub(super) fn give_up(&mut self) {
        if let Self::Open(_) = self {
            let rest = self.waiting();
            self.exchange(|stream| match stream {
                Self::Open(pipe) if rest > 0 => Self::Last { pipe, rest },
                _ => Self::Closed {
                    end: OutputEnd::StillOpen,
                },
            });
        }
    }
}
